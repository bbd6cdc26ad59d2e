"""The package installs and works without a compiler, without the extension and without optional packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends import native
from tests.support import ROOT

HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None


def fresh(script: str, **environment: str) -> str:
    """What a script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HIDE = """
import importlib.abc, pathlib, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
if {no_extension!r}:
    glob = pathlib.Path.glob
    pathlib.Path.glob = lambda self, pattern: [] if pattern.startswith("_C") else glob(self, pattern)
"""
LOSS = """
import torch
import kdkernels as kd
torch.manual_seed(0)
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(37, 8, requires_grad=True)
loss, metrics = kd.linear_kd_loss(
    hidden, weight, torch.randn(6, 12), torch.randn(37, 12), torch.arange(6), ce_weight=0.5, return_metrics=True
)
loss.backward()
print(kd.backend(), repr(loss.item()), repr(weight.grad.sum().item()), repr(hidden.grad.sum().item()))
"""


def test_importing_it_asks_for_no_optional_package() -> None:
    optional = ["triton", "transformers", "matplotlib", "rich", "safetensors", "tokenizers", "peft"]
    assert fresh(HIDE.format(missing=optional, no_extension=False) + LOSS).split()[0] == kd.backend()


def test_its_other_parts_are_attributes_that_load_when_asked_for() -> None:
    script = """
    import kdkernels as kd
    assert not [name for name in sys.modules if name.startswith(("kdkernels.transformers", "kdkernels.compat"))]
    assert {"transformers", "compat"} <= set(dir(kd)) and {"liger", "trl"} <= set(dir(kd.compat))
    kd.transformers.lm_head, kd.compat.liger.LigerFusedLinearJSDLoss, kd.compat.trl.patch_gkd_trainer
    for module in (kd, kd.compat):
        try:
            module.unheard_of
        except AttributeError as error:
            assert str(error) == f"module {module.__name__!r} has no attribute 'unheard_of'"
        else:
            raise AssertionError(module)
    """
    fresh(HIDE.format(missing=["transformers", "liger_kernel", "trl"], no_extension=False) + textwrap.dedent(script))


def test_without_the_extension_the_reference_runs_and_says_the_same() -> None:
    name, *numbers = fresh(HIDE.format(missing=[], no_extension=True) + LOSS).split()
    assert name == "reference"
    with_it = fresh(LOSS).split()[1:]
    assert [float(number) for number in numbers] == pytest.approx([float(number) for number in with_it], rel=1e-4, abs=1e-5)


def test_without_the_extension_every_operator_still_keeps_its_contract() -> None:
    """The same operators, on the reference: what torch.library.opcheck says of them."""
    script = """
    import torch
    import kdkernels as kd
    from kdkernels.backends import native

    assert kd.backend() == "reference"
    assert native.instruction_sets() == ()
    assert not native.available()
    try:
        with kd.backends.use("native"):
            raise SystemExit("a backend that is not there was accepted")
    except ValueError as error:
        refused, accepted = str(error).split("accepted: ")
        assert "'native'" in refused and "reference" in accepted and "native" not in accepted, error

    operators, check = torch.ops.kdkernels, torch.library.opcheck
    for dtype in (torch.float64, torch.bfloat16):
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        x, z = torch.randn(2, 3, 11, dtype=sums).to(dtype)
        logits, labels, t = (x, z, None, None), torch.tensor([1, 5, 10]), torch.tensor(0.5, dtype=sums)
        loss = (torch.ones(3, dtype=sums), t, "jsd", 0.5, 2.0, 1.0, 0.5, [1.0, 0.0, 1.0, 5.0])
        check(operators.row_loss.default, (*logits, labels, *loss, True, True))
        check(operators.row_loss.default, (*logits, labels, *loss, True, True, torch.empty_like(x)))
        statistics = (*logits, labels, t, 2.0, loss[-1], "target", True, True)
        check(operators.block_stats.default, statistics)
        stats = operators.block_stats(*statistics)
        reduce = (*logits, t, "jsd", 0.5, 2.0, loss[-1], stats, True)
        check(operators.block_reduce.default, reduce)
        check(operators.block_grad.default, (*logits, labels, *loss, stats, operators.block_reduce(*reduce)))
    """
    fresh(HIDE.format(missing=[], no_extension=True) + textwrap.dedent(script))


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here, so the reference runs")
def test_where_there_is_a_compiler_the_native_backend_runs() -> None:
    assert native.available(), "the extension was not built; make setup builds it"
    assert kd.backend() == "native"
    assert "plain" in native.instruction_sets()


@pytest.mark.skipif(not native.available(), reason="the C++ extension was not built here")
def test_an_instruction_set_is_chosen_and_given_back() -> None:
    before = native.instruction_sets()
    for name in before:
        with native.instruction_set(name):
            assert native.instruction_sets()[0] == name
            assert set(native.instruction_sets()) == set(before)
    assert native.instruction_sets() == before
    with pytest.raises(RuntimeError, match=r"avx1024.*usable: .*plain"), native.instruction_set("avx1024"):
        pass
    assert native.instruction_sets() == before


def copied_sources(to: Path) -> Path:
    """What a build reads, as in a fresh clone."""
    for part in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / part, to)
    for part in ("csrc", "kdkernels"):
        shutil.copytree(ROOT / part, to / part, ignore=shutil.ignore_patterns("generated", "*.so", "__pycache__"))
    return to


def ran(command: list[str], sources: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=sources, env={**os.environ, **environment}, check=False
    )


def built(kind: str, sources: Path, to: Path, **environment: str) -> Path:
    """An "sdist", a "wheel" or an "editable" wheel, made as pip makes it, without a network."""
    script = f"import setuptools.build_meta as made; print(made.build_{kind}({str(to)!r}))"
    done = ran(["-c", script], sources, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return to / done.stdout.splitlines()[-1]


def installed(wheel: Path, to: Path) -> Path:
    done = ran(["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(to), str(wheel)], to.parent)
    assert done.returncode == 0, done.stderr
    return to


NO_COMPILER = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}


@pytest.mark.parametrize(("compiler", "options"), [("/nonexistent/c++", ("--build-lib", "built")), ("false", ("--inplace",))])
def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path: Path, compiler: str, options: tuple[str, ...]) -> None:
    sources = copied_sources(tmp_path)
    done = ran(["setup.py", "build_ext", *options], sources, CXX=compiler, CC=compiler)
    assert done.returncode == 0, done.stderr
    assert "the native backend was not built" in done.stderr
    assert compiler in done.stderr, "what is wrong with it"
    assert "the reference backend will run" in done.stderr
    assert list(tmp_path.rglob("*.so")) == []


def test_a_wheel_without_the_extension_is_of_no_platform_and_its_first_loss_says_once_what_that_costs(tmp_path: Path) -> None:
    wheel = built("wheel", copied_sources(tmp_path), tmp_path, **NO_COMPILER)
    assert wheel.name.endswith("-py3-none-any.whl"), wheel.name
    assert "Root-Is-Purelib: true" in read(wheel, "WHEEL")
    folder = installed(wheel, tmp_path / "installed")
    assert list(folder.rglob("*.so")) == []
    before = textwrap.dedent("""
    import sys, torch, kdkernels as kd
    assert kd.backend() == "reference"
    kd.plan(64, 37, 8, 12)
    hidden, head = torch.randn(6, 8, dtype=torch.float64), torch.randn(37, 8, dtype=torch.float64)
    kd.linear_kd_loss(hidden, head, hidden, head)
    print("plain PyTorch is what float64 always takes", file=sys.stderr)
    """)
    after = "\nfor cut in ('tokens', 'vocab'): kd.linear_kd_loss(hidden, weight, hidden.detach(), weight.detach(), strategy=cut)"
    done = ran(["-W", "error", "-c", before + LOSS + after], folder)
    assert done.returncode == 0, done.stderr
    said, warning, *rest = done.stderr.splitlines()
    assert said == "plain PyTorch is what float64 always takes"
    assert rest == [], "once, whatever follows"
    for part in ("C++ extension is not built", "several times as long", "pip install --no-build-isolation"):
        assert part in warning
    assert "pip install --no-build-isolation" in ran(["-m", "kdkernels", "info"], folder).stdout


def test_an_editable_install_without_a_compiler_warns_too(tmp_path: Path) -> None:
    sources = copied_sources(tmp_path)
    wheel = built("editable", sources, tmp_path, **NO_COMPILER)
    assert wheel.name.endswith("-none-any.whl"), wheel.name
    assert list(sources.rglob("*.so")) == []
    assert ran(["-c", LOSS], sources).stderr.count("C++ extension is not built") == 1


def test_an_extension_that_cannot_be_loaded_is_said_and_the_reference_runs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kdkernels", tmp_path / "kdkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "kdkernels" / "_C.abi3.so").write_bytes(b"of another machine")
    done = ran(["-c", LOSS], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "reference"
    assert "C++ extension cannot be loaded (" in done.stderr
    assert "_C.abi3.so" in done.stderr


def test_a_gpu_without_triton_is_said_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backends, "usable", lambda: ("native", "reference"))
    backends._say_what_is_missing.cache_clear()
    for _ in range(2):
        for dtype in (torch.float64, torch.bfloat16):
            backends.operators_of_loss(backends.reference.BACKEND, torch.device("cuda"), dtype)
    backends.operators_of_loss(backends.reference.BACKEND, torch.device("mps"), torch.bfloat16)
    (said,) = caplog.messages
    assert "Triton is not installed" in said
    assert "pip install triton" in said


def test_a_loss_that_another_backend_was_asked_for_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    backends._say_what_is_missing.cache_clear()
    hidden, head = torch.randn(6, 8), torch.randn(37, 8)
    with backends.use("reference"):
        kd.linear_kd_loss(hidden, head, hidden, head)
    assert caplog.messages == []


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here whose error could be told from its absence")
def test_an_error_in_the_sources_stops_the_build_and_says_what_the_compiler_said(tmp_path: Path) -> None:
    sources = copied_sources(tmp_path)
    for source in ("register.cpp", "rows_plain.cpp", "rows_avx2.cpp", "rows_avx512.cpp"):
        (sources / "csrc" / source).write_text("#error spoilt by the test\n")
    script = f"import setuptools.build_meta as made; made.build_wheel({str(tmp_path)!r})"
    done = ran(["-c", script], sources)
    assert done.returncode == 1
    assert "spoilt by the test" in done.stdout + done.stderr
    last = done.stderr.splitlines()[-2:]
    assert "did not build the native backend" in last[0]
    assert "KDKERNELS_NATIVE=0" in last[1]
    assert list(tmp_path.glob("*.whl")) == []
    assert built("wheel", sources, tmp_path, KDKERNELS_NATIVE="0").name.endswith("-py3-none-any.whl")


def read(wheel: Path, file: str) -> str:
    """A file of the wheel's dist-info."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(f".dist-info/{file}"))
        return archive.read(name).decode()


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here, so there is no extension to build")
def test_the_source_distribution_installs_with_its_extension(tmp_path: Path) -> None:
    """From the sources to a loss, as who downloads it goes: sdist, unpacked, wheel, installed, used from elsewhere."""
    (tmp_path / "clone").mkdir()
    clone = copied_sources(tmp_path / "clone")
    (clone / "tests").mkdir()
    (clone / "tests" / "test_none.py").touch()
    sdist = built("sdist", clone, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    held = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if file.is_file()}
    sources = {str(file.relative_to(ROOT)) for part in ("csrc", "kdkernels") for file in (ROOT / part).rglob("*")
               if file.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".typed")}  # fmt: skip
    besides = {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO", "setup.cfg"}
    assert {name for name in held if not name.startswith("kdkernels.egg-info/")} == sources | besides

    wheel = built("wheel", unpacked, tmp_path)
    assert f"-cp310-abi3-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}.whl" in wheel.name
    folder = installed(wheel, tmp_path / "installed")
    held = {str(file.relative_to(folder)) for file in (folder / "kdkernels").rglob("*.*") if "__pycache__" not in file.parts}
    package = {name for name in sources if name.startswith("kdkernels/")}
    assert {name for name in held if ".dist-info/" not in name and not name.startswith("bin/")} == package | {
        "kdkernels/_C.abi3.so"
    }

    done = ran(["-W", "error", "-c", f"import kdkernels; print(kdkernels.__file__)\n{LOSS}"], folder)
    assert done.returncode == 0, done.stderr
    where, name, *_ = done.stdout.split()
    assert Path(where).is_relative_to(folder)
    assert name == "native"
    assert done.stderr == ""


def test_functors_are_printed_for_every_divergence(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "csrc" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "kdkernels" / "backends").mkdir(parents=True)
    for name in ("divergences.py", "backends/functors.py", "backends/columns.py", "backends/polynomials.py"):
        shutil.copy(ROOT / "kdkernels" / name, tmp_path / "kdkernels" / name)
    generate.write(tmp_path)
    printed = (tmp_path / "csrc" / "generated" / "divergences.inc").read_text()
    names = (tmp_path / "csrc" / "generated" / "names.inc").read_text()
    for name in kd.divergences():
        assert f"struct {name} {{" in printed
        assert f"KD_DIVERGENCE({name})" in names


def test_every_public_name_is_there_and_the_package_says_that_it_is_typed() -> None:
    assert (Path(kd.__file__).parent / "py.typed").exists()
    for name in kd.__all__:
        assert getattr(kd, name) is not None
