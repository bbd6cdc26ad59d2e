"""The losses under the names and conventions of other libraries: drop-ins.

- ``kdkernels.compat.liger`` has Liger-Kernel's ``LigerFusedLinearJSDLoss``; Liger need not be installed.
- ``kdkernels.compat.trl`` lets TRL's GKDTrainer and DistillationTrainer compute their loss here.

Each is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdkernels.compat import liger as liger
    from kdkernels.compat import trl as trl

_PARTS = ("liger", "trl")


def __dir__() -> list[str]:
    return [*globals(), *_PARTS]


if not TYPE_CHECKING:  # a type checker would take every name to be there

    def __getattr__(name: str) -> object:
        if name not in _PARTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")
