"""What the site needs of the repository beside docs/: the README is its first page, and links lead to where things are there."""

from __future__ import annotations

import base64
import json
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
NOTEBOOK = ("first-steps.md", "examples/first_steps.ipynb")


def on_files(files: Any, config: Any) -> Any:
    for name, source in BROUGHT.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    for name, content in pages_of(json.loads((ROOT / NOTEBOOK[1]).read_text())).items():
        files.append(File.generated(config, name, content=content))
    return files


def pages_of(notebook: dict[str, Any]) -> dict[str, str | bytes]:
    """The notebook as it is stored, as a page, and its pictures."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if "data" in output:
                name = f"first-steps-{len(pictures)}.png"
                pictures[name] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![what the cell above draws]({name})")
            else:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
    return {NOTEBOOK[0]: "\n\n".join(parts), **pictures}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository as links between pages; a link to what is no page of the site, as its words."""
    markdown = re.sub(r"\]\((?:\.\./)?docs/", "](", markdown)
    for name, source in (*BROUGHT.items(), NOTEBOOK):
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}", f"]({name}", markdown)
    return re.sub(r"\[([^\]]*)\]\((?:\.\./|examples)[^)]*\)", r"\1", markdown)
