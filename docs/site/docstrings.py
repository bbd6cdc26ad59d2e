"""Docstrings as the sources have them, for the site: what they say of each argument is an item of a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"(?:\w+(?:=\S+)?(?:, )?)+: ")


class Items(griffe.Extension):
    """``name: text``, and the lines indented below it, become an item."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = itemised(obj.docstring.value)


def itemised(text: str) -> str:
    lines, before = [], ""
    for line in text.splitlines():
        item = ITEM.match(line)
        if item:
            if before and not before.startswith(("- ", "    ")):
                lines.append("")
            line = f"- **{item[0][:-2]}**: {line[item.end() :]}"
        lines.append(line)
        before = line
    return "\n".join(lines)
