"""The package installs and works without a compiler, without the extension and without optional packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import kdkernels as kd
from kdkernels.backends import native

ROOT = Path(__file__).parent.parent


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


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler here, so the reference runs")
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
    for part in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / part, to)
    (to / "README.md").touch()
    shutil.copytree(ROOT / "csrc", to / "csrc", ignore=shutil.ignore_patterns("generated", "__pycache__"))
    shutil.copytree(ROOT / "kdkernels", to / "kdkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return to


def build(sources: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *options],
        capture_output=True,
        text=True,
        cwd=sources,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize(("compiler", "options"), [("/nonexistent/c++", ("--build-lib", "built")), ("false", ("--inplace",))])
def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path: Path, compiler: str, options: tuple[str, ...]) -> None:
    for part in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / part, tmp_path)
    (tmp_path / "README.md").touch()
    for part in ("csrc", "kdkernels"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("generated", "*.so", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "CXX": compiler, "CC": compiler},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the native backend was not built" in done.stderr
    assert "the reference backend will run" in done.stderr
    assert list(tmp_path.rglob("*.so")) == []


def test_functors_are_printed_for_every_divergence(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "csrc" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "kdkernels").mkdir()
    shutil.copy(ROOT / "kdkernels" / "divergences.py", tmp_path / "kdkernels")
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
