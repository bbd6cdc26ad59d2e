"""Where the options of a run come from: the command line, a file, and the run that is resumed."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdkernels.errors import CommandError
from kdkernels.transformers.distill.options import BY_NAME, EXCLUDING, REQUIRED

RUN = "run.json"


def read_config(path: Path) -> dict[str, Any]:
    """The options of a YAML or JSON file, checked; names may have dashes or underscores, and a value of null is none.

    Raises CommandError that names the file and the option: not known (with the nearest that is), given twice, or of a wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise CommandError(f"--config {path} cannot be read: {reason}") from error
    content = _parsed(text, path)
    if not isinstance(content, Mapping):
        raise CommandError(
            f"--config {path} holds no names with values; accepted: for example {{'teacher': 'folder', 'steps': 100}}"
        )
    if "settings" in content and path.name in (RUN, "results.json"):
        raise CommandError(f"--config {path} is what a run has written; to go on with that: --resume --out {path.parent}")
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in BY_NAME:
            near = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.0)[0]
            raise CommandError(f"--config {path}: {key!r} is not known; the nearest is {near}")
        if name in found:
            raise CommandError(f"--config {path}: {name} is there twice")
        if value is None:
            continue
        found[name] = _taken(name, value, f"--config {path}: {key}")
    return found


def _taken(name: str, value: Any, where: str) -> Any:
    """A value of a file, for an option."""
    try:
        return BY_NAME[name].kind.of_value(value)
    except ValueError as error:
        raise CommandError(f"{where} is {value!r}; accepted: {BY_NAME[name].kind.accepted}") from error


def recorded(out: Path) -> dict[str, Any]:
    """The options of the run in a folder that --resume is to go on with; none where it was cut off before it had written them.

    Raises CommandError where there is no such run.
    """
    accepted = "accepted: the --out of an earlier run, or the same command without --resume, which begins one"
    if not out.exists():
        raise CommandError(f"--resume: there is no folder {out}; {accepted}")
    if not (out / "kdkernels-distill.json").is_file():
        whole = out.absolute().parent
        hint = f"; the run that it is a part of is in {whole}" if (whole / "kdkernels-distill.json").is_file() else ""
        raise CommandError(f"--resume: {out} holds no run of distill{hint}; {accepted}")
    if not (out / RUN).exists() and not (out / "results.json").exists() and not any(out.glob("checkpoint-*")):
        return {}
    found = read_run(out)["settings"]
    given = {name: value for name, value in found.items() if name in BY_NAME and value is not None}
    return {name: _taken(name, value, f"{out / RUN}: {name}") for name, value in given.items()}


def read_run(out: Path) -> dict[str, Any]:
    """run.json, with "settings", "data" and "before" at least."""
    try:
        found = json.loads((out / RUN).read_bytes())
        if not isinstance(found["settings"], dict):
            raise TypeError("its settings are none")
        return {"before": None, "data": None, **found}
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise CommandError(
            f"{out / RUN}, which says what the run was, cannot be read ({reason}); accepted: another --out"
        ) from error


def merged(given: Mapping[str, Any], configured: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """All options: from the command line, else from the file, else as they were ``before`` in a run that is resumed, else defaults.

    Raises CommandError where one is missing, two exclude each other, or one belongs to another method.
    """
    lost = " (the run was cut off before it had kept its own)" if before is not None and not before else ""
    configured, before = dict(configured), dict(before or {})
    for pair in EXCLUDING:
        for name, other in (pair, pair[::-1]):
            if name in given:
                configured.pop(other, None)
            if name in given or name in configured:
                before.pop(other, None)
    chosen = {**configured, **given}
    for name in REQUIRED:
        if name not in chosen and name not in before:
            raise CommandError(f"{BY_NAME[name].flag} is required, on the command line or in the file of --config{lost}")
    for first, second in EXCLUDING:
        if first in chosen and second in chosen:
            raise CommandError(f"{BY_NAME[first].flag} and {BY_NAME[second].flag} exclude each other; give one of them")
    for name in chosen:
        needs = BY_NAME[name].needs
        method = chosen.get("method", before.get("method"))
        if needs is not None and method != needs:
            raise CommandError(f"{BY_NAME[name].flag} is of method {needs}; the method is {method}")
    defaults = {name: option.default for name, option in BY_NAME.items()}
    return argparse.Namespace(**{**defaults, **before, **chosen})


def _parsed(text: str, path: Path) -> Any:
    def paired(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_once([name for name, _ in pairs], path)
        return dict(pairs)

    if path.suffix == ".json":
        try:
            return json.loads(text, object_pairs_hook=paired)
        except CommandError:
            raise
        except ValueError as error:
            raise CommandError(f"--config {path} is not JSON: {error}") from error
    import yaml  # type: ignore[import-untyped]  # comes with transformers

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode):
            _check_once([key.value for key, _ in node.value], path)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CommandError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error


def _check_once(names: Sequence[Any], path: Path) -> None:
    """Both readers would take the last of two values of one name, and say nothing."""
    for name in names:
        if names.count(name) > 1:
            raise CommandError(f"--config {path}: {name} is there twice")
