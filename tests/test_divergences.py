"""Each divergence is one function of two log-probabilities; its value is the textbook's and its slope is the value's derivative."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import reference
from kdkernels.divergences import FLAT, bind, resolve
from tests.support import ROOT, oracle
from tests.support.cases import VARIANTS, parameters, running

PARAMETERS = {"jsd": (0.1, 0.5, 0.9), "skew_forward_kl": (0.1, 0.5), "skew_reverse_kl": (0.1, 0.5)}
CHOSEN = [(name, parameter) for name in kd.divergences() for parameter in PARAMETERS.get(name, (None,))]
every_choice = pytest.mark.parametrize(("name", "parameter"), CHOSEN)


def make(name: str, parameter: float | None) -> kd.Divergence:
    return getattr(kd, name)() if parameter is None else getattr(kd, name)(parameter)


def log_probabilities(seed: int = 0, rows: int = 4, vocab: int = 50, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64) * spread
    lp, lq = logits.log_softmax(-1)
    return lp, lq


@pytest.mark.parametrize("name", kd.divergences())
def test_the_slope_is_the_derivative_of_the_value(name: str) -> None:
    divergence = resolve(name)
    lp, lq = log_probabilities()
    lq.requires_grad_()
    for temperature in (1.0, FLAT):
        value, slope, _ = divergence.pair(lp, lq, lq - lp, divergence.shares(temperature))
        (by_autograd,) = torch.autograd.grad(value.sum(), [lq])
        torch.testing.assert_close(slope, by_autograd, rtol=1e-12, atol=1e-14)


@every_choice
def test_value_and_slope_are_those_of_the_textbook(name: str, parameter: float | None) -> None:
    divergence = make(name, parameter)
    lp, lq = log_probabilities(1)
    lq.requires_grad_()
    textbook = oracle.FORMULAS[name](lp, lq, parameter or 0.0)
    (slope,) = torch.autograd.grad(textbook.sum(), [lq])
    value, own_slope = divergence.textbook(lp, lq.detach())
    torch.testing.assert_close(value, textbook.detach(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(own_slope, slope, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, FLAT])
@every_choice
def test_what_an_entry_has_more_than_the_textbook_leaves_rows_as_they_are(
    name: str, parameter: float | None, temperature: float
) -> None:
    """Tokens that one model bans, and all of the models' mass with them, included."""
    divergence = make(name, parameter)
    lp, lq = log_probabilities(4)
    lp[0, 3] = lq[0, 3] = lp[1, :9] = lq[1, 7:12] = -math.inf
    lp, lq = lp.log_softmax(-1), lq.log_softmax(-1)
    found, textbook = divergence.balanced(lp, lq, lq - lp, temperature), divergence.textbook(lp, lq)
    torch.testing.assert_close(found[0].sum(-1), textbook[0].sum(-1), rtol=1e-12, atol=1e-14)
    ours, theirs = (slope - lq.exp() * slope.sum(-1, keepdim=True) for slope in (found[1], textbook[1]))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@every_choice
def test_no_entry_of_close_distributions_has_a_negative_value(name: str, parameter: float | None) -> None:
    """So nothing cancels over a row, whatever its length; the formulas in float32, on differences down to 1e-7."""
    divergence = make(name, parameter)
    generator = torch.Generator().manual_seed(0)
    for size in (2e-1, 1e-3, 1e-5, 1e-7):
        lp = torch.randn(1000, generator=generator).log_softmax(-1)
        d = (torch.rand(1000, generator=generator) * 2 - 1) * size
        value, slope, _ = divergence.pair(lp, lp + d, d, divergence.shares(FLAT))
        assert (value >= 0).all()
        p, q = lp.double().exp(), (lp + d).double().exp()
        wide = divergence.pair(p.log(), q.log(), d.double(), divergence.shares(FLAT))
        torch.testing.assert_close(value.double(), wide[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(slope.double(), wide[1], rtol=1e-4, atol=0)


@every_choice
@pytest.mark.parametrize("variant", parameters(VARIANTS))
def test_the_parameter_reaches_every_backend(variant: str, name: str, parameter: float | None) -> None:
    lp, lq = (log.float() for log in log_probabilities(2))
    options = oracle.Options(name, parameter)
    expected = oracle.divergence(lq.double(), lp.double(), options)
    with running(variant):
        found = kd.kd_loss(lq, lp, divergence=make(name, parameter), reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-6)


def test_the_oracle_agrees_with_sums_over_probabilities_written_out() -> None:
    p, q = [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]

    def kl(left: list[float], right: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(left, right, strict=True))

    def mixed(share: float) -> list[float]:
        return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]

    expected = {
        ("forward_kl", None): kl(p, q),
        ("reverse_kl", None): kl(q, p),
        ("jsd", 0.3): 0.3 * kl(p, mixed(0.3)) + 0.7 * kl(q, mixed(0.3)),
        ("skew_forward_kl", 0.2): kl(p, mixed(0.2)),
        ("skew_reverse_kl", 0.2): kl(q, mixed(0.8)),
        ("total_variation", None): 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True)),
    }
    x, y = torch.tensor(q, dtype=torch.float64).log(), torch.tensor(p, dtype=torch.float64).log()
    for (name, parameter), value in expected.items():
        assert oracle.divergence(x, y, oracle.Options(name, parameter)).item() == pytest.approx(value, rel=1e-12), name


def test_every_divergence_has_a_textbook_formula() -> None:
    assert set(kd.divergences()) == set(oracle.FORMULAS)


@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_a_mixture_stays_finite_where_both_probabilities_underflow(name: str) -> None:
    divergence = resolve(name)
    far = torch.tensor([-120.0, -2000.0, -1e5])
    value, slope, _ = divergence.pair(far, far - 7.0, torch.full_like(far, -7.0), divergence.shares())
    assert value.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("beta", [0, 0.0, 1, 1.0])
def test_jsd_at_its_ends_names_what_to_use_instead(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta.*forward_kl.*reverse_kl"):
        kd.jsd(beta)


@pytest.mark.parametrize(("factory", "other"), [(kd.skew_forward_kl, "forward_kl"), (kd.skew_reverse_kl, "reverse_kl")])
@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_skew_outside_its_range_is_refused(factory: object, other: str, alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha.*{other}"):
        factory(alpha)  # type: ignore[operator]


@pytest.mark.parametrize("wrong", ["0.5", None, True, torch.tensor(0.5)])
def test_a_parameter_that_is_no_number_is_refused(wrong: object) -> None:
    for factory, argument in ((kd.jsd, "beta"), (kd.skew_forward_kl, "alpha"), (kd.skew_reverse_kl, "alpha")):
        with pytest.raises(TypeError, match=rf"{argument} is a number.*got {type(wrong).__name__}"):
            factory(wrong)  # type: ignore[arg-type]


def test_names_and_factories_are_the_same_divergences() -> None:
    assert set(kd.divergences()) <= set(kd.__all__)
    for name in kd.divergences():
        assert resolve(name) == getattr(kd, name)()
        assert resolve(name).name == name
    assert resolve(kd.jsd(0.3)).a == 0.3


def test_what_is_no_divergence_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"'kullback'.*forward_kl, reverse_kl"):
        resolve("kullback")
    with pytest.raises(TypeError, match=r"did you mean forward_kl\(\)"):
        resolve(kd.forward_kl)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got int"):
        resolve(3)  # type: ignore[arg-type]


def test_a_divergence_can_be_bound_to_another_namespace() -> None:
    """The build traces formulas this way; numbers of plain Python are the simplest other namespace."""

    class Scalars:
        exp, log, maximum = math.exp, math.log, max
        abs = abs

        @staticmethod
        def where(condition: bool, yes: float, no: float) -> float:
            return yes if condition else no

        @staticmethod
        def near(d: float) -> bool:
            return -0.25 < d < 0.25

        @staticmethod
        def excess(d: float) -> float:
            return math.expm1(d) - d

        @staticmethod
        def deficit(g: float) -> float:
            return g - math.log1p(g)

    for name in kd.divergences():
        divergence = resolve(name)
        for lp, lq in ((-1.0, -2.5), (-1.0, -1.125)):
            found = bind(divergence.pair, Scalars)(lp, lq, lq - lp, divergence.shares())
            tensors = (torch.tensor(part, dtype=torch.float64) for part in (lp, lq, lq - lp))
            expected = divergence.pair(*tensors, divergence.shares())
            assert found == pytest.approx([float(part) for part in expected], rel=1e-12)


def test_the_reference_keeps_a_custom_parameter() -> None:
    """Operators take name and parameter apart and put them together again."""
    x, z = log_probabilities(3)
    weight, t = torch.ones(4, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    rows = reference.row_loss(
        x.clone(), z, None, None, None, weight, t, "jsd", 0.2, 1.0, 1.0, 0.0, [1.0, 0.0, 1.0, 0.0], False, False
    )
    expected = oracle.divergence(x, z, oracle.Options("jsd", 0.2))
    torch.testing.assert_close(rows[:, 0], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "other",
    [
        replace(kd.forward_kl(), pair=kd.reverse_kl().pair),
        replace(kd.reverse_kl(), one_sweep=""),
        kd.Divergence("jsd", lambda lp, lq, a: (lp, lq), 0.5),
    ],
    ids=["formula", "sweeps", "lambda"],
)
def test_another_formula_under_a_listed_name_is_refused(other: kd.Divergence) -> None:
    """The fast backends know formulas by their names, and would run the listed one."""
    x, z = torch.randn(2, 3, 9)
    with pytest.raises(ValueError, match=rf"divergence '{other.name}' came with the formula .*; accepted under that name: _"):
        kd.kd_loss(x, z, divergence=other)


GENERATE = """
import sys
from pathlib import Path
sys.modules["kdkernels"] = None  # as where nothing is installed yet
sys.path.insert(0, sys.argv[1])
import generate
generate.write(Path(sys.argv[2]))
"""


def test_the_build_reads_the_formulas_without_the_package(tmp_path: Path) -> None:
    for name in ("csrc", "kdkernels/backends"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("divergences.py", "backends/functors.py", "backends/columns.py", "backends/polynomials.py"):
        shutil.copy(ROOT / "kdkernels" / name, tmp_path / "kdkernels" / name)
    subprocess.run([sys.executable, "-c", GENERATE, str(ROOT / "csrc"), str(tmp_path)], check=True, cwd=tmp_path)
    listed = (tmp_path / "csrc" / "generated" / "names.inc").read_text()
    assert all(f"KD_DIVERGENCE({name})" in listed for name in kd.divergences())
