"""The pages of docs run: their code in order, what it prints, their commands, and every link and name in them.

A page's ``python`` blocks share one namespace, as a reader who pastes them one after another has it. A comment ``# -> text`` is a
line that the block prints. A ``sh`` block holds commands, whose options are parsed as the programs would; where a ``text`` block
follows, the command runs and prints that. The blocks of the README stand each for itself: tests/project/test_readme.py runs them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import itertools
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import kdkernels as kd
from kdkernels.cli import commands as cli
from kdkernels.errors import CommandError, to_install
from kdkernels.transformers.distill.configuration import merged
from kdkernels.transformers.distill.options import BY_NAME
from tests.support import README, ROOT
from tests.support.pages import blocks

DOCS = sorted((ROOT / "docs").glob("*.md"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
every_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def prose(page: Path) -> str:
    """What is not in a fenced block."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def printed(run: Callable[[], object]) -> list[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run()
    return [line.rstrip() for line in out.getvalue().splitlines()]


def commands(page: Path) -> list[list[str]]:
    """The words of each command, continued lines joined, without settings of the environment before it."""
    lines = [line for language, content in blocks(page) if language == "sh" for line in content.replace("\\\n", " ").splitlines()]
    words = (shlex.split(line, comments=True) for line in lines)
    return [[word for at, word in enumerate(one) if at or not re.fullmatch(r"[A-Z_]+=\S*", word)] for one in words if one]


def lacking(content: str) -> set[str]:
    """The libraries that code imports and that are not installed here."""
    imported = re.findall(r"^(?:from|import) (\w+)", content, re.MULTILINE)
    return {library for library in imported if importlib.util.find_spec(library) is None}


@pytest.mark.filterwarnings("ignore::FutureWarning:lightning", "ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("page", DOCS, ids=[page.name for page in DOCS])
def test_the_code_of_a_page_runs_and_prints_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the only process that torchrun starts, and without what transformers' Trainer prints by itself. A block whose library is
    not installed is left out; the page says so of one that ``make setup`` does not install."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    left_out: set[str] = set()
    of_divergences = importlib.import_module("kdkernels.divergences")
    monkeypatch.setattr(of_divergences, "_factories", dict(of_divergences._factories))  # a page may list one more
    scope: dict[str, object] = {}
    for content in (content for language, content in blocks(page) if language == "python"):
        if missing := lacking(content) - set(re.findall(r"\*\*Not run in CI\*\*: it needs `(\w+)`", page.read_text())):
            left_out |= missing
        elif not lacking(content):
            compiled = compile(content, f"{page.name}: {content.splitlines()[0]}", "exec")
            shown = re.findall(r"# -> (.*)$", content, re.MULTILINE)
            lines = printed(lambda compiled=compiled: exec(compiled, scope))
            assert [line for line in lines if not line.startswith("{'")] == shown, content
    if left_out:
        assert all(re.search(rf'^    "{library}==', PYPROJECT, re.MULTILINE) for library in left_out), left_out
        pytest.skip(f"not installed, so that its code was left out: {', '.join(left_out)}; make setup installs it")


@every_page
def test_nothing_that_a_page_prints_is_left_unsaid(page: Path) -> None:
    """A claim in a comment is held by the test above only where the block prints it."""
    for language, content in blocks(page):
        if language == "python":
            calls = [node for node in ast.walk(ast.parse(content)) if isinstance(node, ast.Call)]
            prints = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
            assert prints == ("# -> " in content), content


def parsed(command: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    subparsers = parser.add_subparsers(required=True, dest="command")
    for add in cli.COMMANDS:
        add(subparsers)
    return parser.parse_args(command)


def check_module(name: str, arguments: list[str]) -> None:
    """``python -m``: of our own command all options, of other programs here their flags, of pytest its files."""
    if name == "kdkernels":
        found = vars(parsed(arguments))
        if found["command"] == "distill" and not {"config", "resume", "help"} & {key for key, value in found.items() if value}:
            merged({key: found[key] for key in found if key in BY_NAME}, {})
    elif name == "pytest":
        files = [word.partition("::")[0] for word in arguments if word.startswith("tests/")]
        assert files, arguments
        assert all((ROOT / file).exists() for file in files), arguments
    else:
        source = ROOT / f"{name.replace('.', '/')}.py"
        assert source.exists(), name
        for flag in (word for word in arguments if word.startswith("--")):
            assert f'"{flag}"' in source.read_text(), f"{name} has no {flag}"


def check(command: list[str]) -> None:
    """Raises what the command itself would find wrong."""
    match command:
        case ["python" | ".venv/bin/python", "-m", name, *arguments]:
            check_module(name, arguments)
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        case ["pip", "install", *arguments]:
            for extra in (name for word in arguments for one in re.findall(r"\.\[(.*)\]", word) for name in one.split(",")):
                assert re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE), extra
        case ["pre-commit", "install"]:
            assert (ROOT / ".pre-commit-config.yaml").exists()
        case _:
            raise AssertionError(f"a command that this test does not know: {shlex.join(command)}")


def complaint(command: list[str]) -> str:
    """What is wrong with a command, in one line; nothing if it is right."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            check(command)
    except (SystemExit, CommandError, argparse.ArgumentError) as error:
        return f"{shlex.join(command)}: {error} {said.getvalue()}"
    return ""


@every_page
def test_its_commands_exist_and_take_their_options(page: Path) -> None:
    assert [wrong for command in commands(page) if (wrong := complaint(command))] == []


@every_page
def test_the_commands_in_its_text_exist(page: Path) -> None:
    """These are named, not written out: a module, or a command of ours, or a target of make."""
    for quoted in re.findall(r"`((?:make|python -m) [^`\n]+)`", prose(page)):
        match quoted.split():
            case ["python", "-m", "kdkernels", name, *_]:
                with pytest.raises(SystemExit, match="0"):
                    parsed([name, "--help"])
            case words:
                check(words)


def test_a_commit_is_checked_by_what_make_lint_runs() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nlint: setup\n")[2].partition("\n\n")[0]
    hooks = re.findall(r"^ +entry: (.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    assert hooks == [line.strip() for line in recipe.splitlines()]


def test_what_the_code_says_to_install_can_be_installed() -> None:
    """The package is on no index: its extras come from a checkout, by names that pyproject.toml has."""
    sources = sorted((ROOT / "kdkernels").rglob("*.py"))
    assert [source for source in (*sources, *PAGES) if re.search(r"pip install [^\n`]*\bkdkernels\b", source.read_text())] == []
    named = {extra for source in sources for extra in re.findall(r"to_install\(['\"](\w+)['\"]\)", source.read_text())}
    assert {"demo", "transformers", "trl"} <= named
    for extra in named:
        command = re.search("pip install .*", to_install(extra))
        assert command is not None
        check(shlex.split(command[0]))


@every_page
def test_its_commands_print_what_is_shown(page: Path) -> None:
    found = blocks(page)
    for (language, content), (after, shown) in zip(found, [*found, ("", "")][1:], strict=True):
        if language == "sh" and after == "text":
            (words,) = (shlex.split(line) for line in content.replace("\\\n", " ").splitlines())
            assert words[:3] == ["python", "-m", "kdkernels"], words
            assert printed(lambda words=words: cli.main(words[3:])) == shown.splitlines()
    assert all(before == "sh" for (before, _), (after, _) in itertools.pairwise(found) if after == "text")


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """To places in the repository."""
    return re.findall(r"\]\((?!https?://)([^)]+)\)", prose(page))


@every_page
def test_its_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in links(README)}
    assert {f"docs/{page.name}" for page in DOCS} <= linked


@every_page
def test_the_names_in_its_text_exist(page: Path) -> None:
    """Files of the repository and attributes of the library, in backticks."""
    modules: dict[str, ModuleType] = {"kd": kd, "transformers": importlib.import_module("kdkernels.transformers")}
    for quoted in re.findall(r"`([^`\n]+)`", prose(page)):
        if path := re.fullmatch(r"(?:kdkernels|tests|benchmarks|csrc|docs)/[\w./-]+", quoted):
            assert (ROOT / path[0]).exists(), quoted
        elif name := re.match(r"kd(?:kernels\.(transformers))?\.(\w+)", quoted):
            module = modules[name[1] or "kd"]
            assert hasattr(module, name[2]) or importlib.util.find_spec(f"{module.__name__}.{name[2]}"), quoted


@every_page
def test_the_sources_that_it_names_are_there(page: Path) -> None:
    """By their place in the repository or in the package, in backticks or not."""
    for path in re.findall(r"(?<![\w./-])(?:\w+/)+\w+\.(?:py|cpp|cuh?|h)\b", prose(page)):
        assert (ROOT / path).exists() or (ROOT / "kdkernels" / path).exists(), path


def imported(source: Path) -> set[str]:
    """Names of ours that a file imports, from the package's root on."""
    imports = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.ImportFrom)]
    names = (f"{node.module}.{alias.name}" for node in imports for alias in node.names)
    return {name.removeprefix("kdkernels.") for name in names if name.startswith("kdkernels.")}


def test_imports_go_down_the_picture_of_the_architecture() -> None:
    (picture,) = (content for language, content in blocks(ROOT / "docs" / "architecture.md") if language == "text")
    above: list[str] = []
    for room in filter(None, itertools.chain(*re.findall(r"^ (\w+)(?: ── (\w+))?", picture, re.MULTILINE))):
        sources = [ROOT / "kdkernels" / f"{room}.py", *(ROOT / "kdkernels" / room).rglob("*.py")]
        for source in (source for source in sources if source.exists()):
            assert not {name for name in imported(source) if name.partition(".")[0] in above}, source
        above.append(room)
    assert above[0] == "cli"
    assert above[-1] == "divergences"

    folder = ROOT / "kdkernels" / "backends"
    may = {"reference": set(), "native": set(), "triton": {"cuda"}, "cuda": set()}
    for source in folder.rglob("*.py"):
        here = source.relative_to(folder).with_suffix("").parts[0]
        others = {name.split(".")[1] for name in imported(source) if name.startswith("backends.")} & set(may) - {here}
        assert here not in may or others <= may[here], source
