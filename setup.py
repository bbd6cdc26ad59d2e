"""Builds kdkernels._C, the native CPU backend, on the LibTorch stable ABI. Without a compiler the package installs without it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))
import generate  # noqa: E402  (lies beside the sources that it writes)

# The oldest LibTorch whose stable ABI the extension uses; one build then serves every later release.
STABLE_ABI = "0x020a000000000000"
# -fno-trapping-math lets selects become blends; NaN and inf keep their meaning (no -ffast-math).
FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
# `make sanitize` builds with these: any access out of bounds and any undefined operation then ends the process. Frames are kept
# for the report. Some Pythons build extensions with -fwrapv, under which no overflow is undefined: others do not.
SANITIZE = ["-g", "-fno-omit-frame-pointer", "-fno-wrapv", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


class BuildOrGoWithout(BuildExtension):
    """A build that failed leaves a package that runs the reference, and says so."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            print(
                f"kdkernels: the native backend was not built ({error}); the reference backend will run.",
                file=sys.stderr,
            )
            self.extensions: list[Any] = []

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]

    def copy_extensions_to_source(self) -> None:
        if self.extensions:
            super().copy_extensions_to_source()


def extension() -> Any:
    generate.write(ROOT)
    sanitize = SANITIZE if os.environ.get("KDKERNELS_SANITIZE") == "1" else []
    sources = ["register.cpp", "rows_plain.cpp", "rows_avx2.cpp", "rows_avx512.cpp"]
    return CppExtension(
        "kdkernels._C",
        [f"csrc/{source}" for source in sources],
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        extra_compile_args={"cxx": [*FLAGS, *sanitize]},
        extra_link_args=sanitize,
        depends=["csrc/vec.h", "csrc/rows.h", "csrc/kernels.h", "kdkernels/divergences.py"],
    )


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildOrGoWithout},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
