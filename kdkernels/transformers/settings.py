"""How a setting is stated, once: as a field of a dataclass, whose annotation says what it may be and how the command line has it.

    okd_lora_rank: Annotated[int, COUNT, Flag("R", "of the LoRA that lets the teacher adapt", name="lora_rank")] = said(
        32, "Rank of the teacher's LoRA."
    )

The Kind in an annotation is what ``check`` holds a value to that comes from Python; a Flag makes an option of it, whose kind is the
same unless the Flag has another. Nothing here needs transformers, so that ``--help`` does not either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_type_hints

from kdkernels import scalars
from kdkernels.console.arguments import MEMORY, memory, number

Check = Callable[[str, Any], object]


@dataclass(frozen=True)
class Kind:
    """What a value is.

    accepted: in words; types: in a configuration file; parse, allowed: of the command line's text; names: where it is one of these.
    check: of a name and a value from Python; raises ValueError or TypeError that names what came and what is accepted.
    """

    accepted: str
    types: tuple[type, ...]
    parse: Callable[[Any], Any] = str
    allowed: Callable[[Any], bool] = lambda value: True
    names: tuple[str, ...] = ()
    check: Check = lambda name, value: None

    def of_text(self) -> Callable[[str], Any]:
        """For argparse."""
        return number(self.parse, self.accepted, self.allowed)

    def of_value(self, value: Any) -> Any:
        """What a configuration file has, or a ValueError. YAML reads 1e-4, which has no dot, as text: as a number it is meant."""
        if float in self.types and isinstance(value, str):
            value = self.parse(value)
        if not isinstance(value, self.types) or (isinstance(value, bool) and bool not in self.types) or not self.allowed(value):
            raise ValueError
        return self.parse(value) if float in self.types else value


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is a whole number of at least 1, got {value!r}")


def integer(least: int, most: int = 2**40, check: Check = lambda name, value: None) -> Kind:
    return Kind(f"an integer from {least} on", (int,), int, lambda value: least <= value <= most, check=check)


def between(accepted: str, allowed: Callable[[float], bool], check: Check = lambda name, value: None) -> Kind:
    return Kind(accepted, (int, float), float, lambda value: math.isfinite(value) and allowed(value), check=check)


def one_of(*names: str) -> Kind:
    return Kind(
        f"one of {', '.join(names)}",
        (str,),
        allowed=lambda value: value in names,
        names=names,
        check=lambda name, value: scalars.one_of(name, value, names),
    )


def at_least_0(otherwise: str = "") -> Kind:
    """otherwise: what is accepted besides, as ", or None"."""

    def check(name: str, value: Any) -> None:
        scalars.number(name, value, f"a number of at least 0{otherwise}", 0.0)

    return between("a number of at least 0", lambda value: value >= 0, check)


TEXT = Kind("text", (str,), allowed=bool)
SWITCH = Kind("true or false", (bool,))
POSITIVE = between("a positive number", lambda value: value > 0)
TEMPERATURE = between("a positive number from 1e-9 to 1e5", lambda value: 1e-9 <= value <= 1e5, scalars.temperature_of)
NOT_NEGATIVE = at_least_0()
SHARE = between("a number from 0 to 1", lambda value: 0 <= value <= 1, scalars.share)
PART = between("a number from 0, below 1", lambda value: 0 <= value < 1)
NUMBER = between("a number", lambda value: True)
COUNT = integer(1, check=_whole)
BYTES = Kind(MEMORY, (int, float), memory, check=_whole)


@dataclass(frozen=True)
class Flag:
    """How the command line has a field. name: there (None: the field's own). kind: where it is not the annotation's, or where the
    field is checked in another place. required: it has no default there."""

    metavar: str
    help: str
    name: str | None = None
    kind: Kind | None = None
    required: bool = False


@dataclass(frozen=True)
class Option:
    """An option of a command, on the command line and in a configuration file.

    name: with underscores, as in the file. default: None where it has none. usual: what stands in for a default of None, to be told
    by --help. needs: the method that it is of, if it is of one only. sets: names of KDConfig's fields that it gives its value to.
    """

    name: str
    kind: Kind
    metavar: str
    help: str
    default: Any = None
    usual: Any = None
    needs: str | None = None
    sets: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def shown(self) -> str:
        """In --help, as argparse shows choices."""
        return f"{{{','.join(self.kind.names)}}}" if self.kind.names else self.metavar

    @property
    def told(self) -> str:
        """In --help, what it is and its default."""
        value = self.usual if self.default is None else self.default
        if value is None or self.kind is SWITCH:
            return self.help
        return f"{self.help} (default: {f'{value:g}' if isinstance(value, float) else value})"


def said(default: Any, text: str) -> Any:
    """A field with a default and what it is, as transformers' HfArgumentParser tells it."""
    return field(default=default, metadata={"help": text})


class Settings:
    """Some fields of KDConfig, which inherits from them all.

    method_of: the method that they are of, if they are of one only. What is refused is a ValueError or TypeError that names it.
    """

    method_of: ClassVar[str | None] = None

    @classmethod
    def stated(cls) -> dict[str, tuple[Any, Kind | None, Flag | None]]:
        """Of each field its default, its kind and its flag."""
        hints: dict[str, Any] = get_type_hints(cls, include_extras=True)
        found: dict[str, tuple[Any, Kind | None, Flag | None]] = {}
        for each in fields(cls):  # type: ignore[arg-type]  # of the dataclasses that inherit from this
            more = getattr(hints[each.name], "__metadata__", ())
            kind = next((one for one in more if isinstance(one, Kind)), None)
            flag = next((one for one in more if isinstance(one, Flag)), None)
            found[each.name] = (each.default, kind, flag)
        return found

    @classmethod
    def options(cls) -> list[Option]:
        """The options of the command line that follow from the fields.

        One of a single method has no default there: what is not given is not there in a run of another method.
        """
        made = []
        for name, (default, kind, flag) in cls.stated().items():
            if flag is not None:
                kind = flag.kind or kind
                assert kind is not None, name
                usual = None if flag.required else default
                given = None if cls.method_of else usual
                made.append(Option(flag.name or name, kind, flag.metavar, flag.help, given, usual, cls.method_of, (name,)))
        return made

    @classmethod
    def check_fields(cls, config: Any) -> None:
        """Hold each value to the kind of its field; None passes where it is the default."""
        for name, (default, kind, _) in cls.stated().items():
            value = getattr(config, name)
            if kind is not None and not (value is None and default is None):
                kind.check(name, value)

    @classmethod
    def check(cls, config: Any) -> None:
        """What fields have to do with one another, and with those of transformers."""

    @classmethod
    def check_cached(cls, config: Any, cache: Any) -> None:
        """Whether a TopKCache can be the teacher of such a run."""
