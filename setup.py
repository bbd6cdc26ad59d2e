"""Builds kdkernels._C, the native CPU backend, on the LibTorch stable ABI.

Where no C++20 GCC or Clang is found, or with KDKERNELS_NATIVE=0, the package has nothing native in it, and its wheel is tagged so
(py3-none-any). A compiler that is fit, and finds an error in the sources, stops the installation.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

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


# Commands that compile; the others ask for names and files, with or without a compiler.
BUILDING = {"bdist_egg", "bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
# What the sources ask of a compiler: C++20 with its library, GCC's vectors, and a shared library out of them.
PROBE = """
#include <algorithm>
#include <optional>
typedef float four __attribute__((vector_size(16)));
template <class T> requires(sizeof(T) == 16) T twice(T x) { return x + x; }
extern "C" float probe(float x) { return std::max(twice(four{x, x, x, x})[0], std::optional<float>(x).value()); }
"""


def unfit() -> str:
    """Why the extension cannot be built with the C++ compiler that is here, if any; "" where it can."""
    if os.environ.get("KDKERNELS_NATIVE") == "0":
        return "KDKERNELS_NATIVE=0"
    compiler = get_cxx_compiler()
    # which may differ from what links: setuptools asks the environment, then how Python itself was built
    linker = os.environ.get("CXX") or sysconfig.get_config_var("LDCXXSHARED") or compiler
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        built = ["-fPIC", "-shared", str(source), "-o", str(source.with_suffix(".so"))]
        for command in dict.fromkeys((compiler, linker)):
            try:
                done = subprocess.run([*shlex.split(command), *FLAGS, *built], capture_output=True, text=True, check=False)
            except OSError as error:
                return f"no C++ compiler: {shlex.split(command)[0]}: {error.strerror}"
            if done.returncode:
                said = done.stderr.strip() or f"exit status {done.returncode}"
                return f"no C++20 GCC or Clang: {shlex.split(command)[0]} does not compile a small program of that kind: {said}"
    return ""


class Build(BuildExtension):
    """Says how to install all the same where the compiler does not take the sources."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            raise SystemExit(
                f"kdkernels: {get_cxx_compiler()} did not build the native backend; what it said stands above ({error}).\n"
                "KDKERNELS_NATIVE=0 in the environment installs without it: plain PyTorch then does the work, and takes longer."
            ) from error


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
        depends=[
            *(f"csrc/{header}" for header in ("vec.h", "rows.h", "kernels.h")),
            *(
                f"kdkernels/{source}"
                for source in ("divergences.py", "backends/functors.py", "backends/columns.py", "backends/polynomials.py")
            ),
        ],
    )


reason = unfit() if BUILDING & set(sys.argv) else ""
if reason:
    print(
        f"kdkernels: the native backend was not built ({reason}); the reference backend will run, in plain PyTorch.",
        file=sys.stderr,
    )
setup(
    ext_modules=[] if reason else [extension()],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
