"""What the site needs of the repository beside docs/: the README is its first page, and links lead to where things are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent.parent
# Files of the repository, by what they are called in the site.
BROUGHT = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    **{
        f"results/{picture.name}": f"benchmarks/results/{picture.name}"
        for picture in (ROOT / "benchmarks" / "results").glob("*.png")
    },
}


def on_files(files: Any, config: Any) -> Any:
    for name, source in BROUGHT.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository as links between pages; a link to what is no page of the site, as its words."""
    markdown = re.sub(r"\]\((?:\.\./)?docs/", "](", markdown)
    for name, source in BROUGHT.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}", f"]({name}", markdown)
    return re.sub(r"\[([^\]]*)\]\((?:\.\./|examples)[^)]*\)", r"\1", markdown)
