"""How exact the losses are where float32 runs out of digits: close distributions, high temperatures, small parameters; many
draws."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import FLAT
from tests.support import oracle
from tests.support.cases import Case, Result, divergence, draw, keywords, parameters, ratios, root_mean_square, running
from tests.support.oracle import Options

EPS = torch.finfo(torch.float32).eps
ROW_VARIANTS = ("reference", "avx512", "avx2", "plain")
CHOSEN = [
    *((name, None) for name in kd.divergences()),
    *(("jsd", 0.9), ("skew_forward_kl", 0.5), ("skew_reverse_kl", 0.5), ("skew_reverse_kl", 1e-3)),
]
every_choice = pytest.mark.parametrize(("name", "parameter"), CHOSEN)
DRAWS = 24


def both(x: Tensor, z: Tensor, options: Options) -> tuple[Result, Result]:
    """Exact, and eager's in float32."""

    def plain(dtype: torch.dtype) -> Result:
        return oracle.with_gradients(lambda x: (x, z.to(dtype)), {"x": x}, dtype, None, None, replace(options, normalizer=1.0))

    return plain(torch.float64), plain(torch.float32)


@functools.cache
def drawn(options: Options, spread: float) -> Any:
    found = []
    for seed in range(DRAWS):
        x, z = torch.randn(2, 6, 501, generator=torch.Generator().manual_seed(seed)) * spread
        found.append((x, z, *both(x, z, options)))
    return found


def run(x: Tensor, z: Tensor, options: Options) -> Result:
    x = x.clone().requires_grad_()
    losses = kd.kd_loss(x, z, **{**keywords(options), "reduction": "none", "normalizer": None})
    (grad,) = torch.autograd.grad(losses.sum(), [x])
    return {"losses": losses.detach(), "x": grad}


def roundings(x: Tensor, z: Tensor, exact: Result, options: Options) -> Result:
    """One of each result, row by row: of a loss; and of the slopes, whose differences gradients are, the largest. A slope holds a
    probability e^v, which is off by |v| roundings."""
    lp, lq = z.double().log_softmax(-1), x.double().log_softmax(-1)
    _, slope = divergence(options).textbook(lp, lq)
    return {"losses": EPS * exact["losses"], "x": EPS * (slope.abs() * (1 - torch.minimum(lp, lq))).amax(-1, keepdim=True)}


@pytest.mark.parametrize("spread", [1.0, 3.0, 10.0, 12.0, 20.0, 30.0])
@every_choice
@pytest.mark.parametrize("variant", parameters(ROW_VARIANTS))
def test_errors_over_many_draws(variant: str, name: str, parameter: float | None, spread: float) -> None:
    """At most twice eager's over all draws together. In a single one eager may hit what it rounds, and twice what it is off by is
    next to nothing then: some roundings come on top."""
    options = Options(name, parameter)
    ours: dict[str, list[Tensor]] = {"losses": [], "x": []}
    theirs: dict[str, list[Tensor]] = {"losses": [], "x": []}
    with running(variant):
        for x, z, exact, eager in drawn(options, spread):
            found, one = run(x, z, options), roundings(x, z, exact, options)
            for of in found:
                ours[of].append((found[of] - exact[of]) / one[of])
                theirs[of].append((eager[of] - exact[of]) / one[of])
    for of in ours:
        together = root_mean_square(ours[of]) / root_mean_square(theirs[of])
        assert together <= 2, f"{of}: error {together:.3g} times eager's over {DRAWS} draws"
        above = max((one.abs().amax() - 2 * other.abs().amax()).item() for one, other in zip(ours[of], theirs[of], strict=True))
        assert above <= 8, f"{of}: in one draw {above:.3g} roundings more than twice eager's"


# The sign of p - q, which is all that total variation's gradient knows of them, is float32's own where they are this close. The
# value of the skewed forward KL has the digits of eager's but where the temperature is high (see its formula).
SIGNS = {"total_variation"}
CLOSE = [(name, parameter) for name, parameter in CHOSEN if name not in {*SIGNS, "skew_forward_kl"}]


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize(("name", "parameter"), CLOSE)
@pytest.mark.parametrize("variant", parameters(ROW_VARIANTS))
def test_a_student_that_has_almost_learned_has_a_value_and_a_gradient(
    variant: str, name: str, parameter: float | None, noise: float
) -> None:
    """Teacher = student + noise: the value is about noise² / 2, less than the rounding of any log-probability."""
    options = Options(name, parameter)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 1003, generator=generator) * 3
    z = x + torch.randn(12, 1003, generator=generator) * noise
    exact, _ = both(x, z, options)
    with running(variant):
        found = run(x, z, options)
    assert relative(found["losses"], exact["losses"]) <= 3e-5
    assert relative(found["x"], exact["x"]) <= 3e-5


def relative(found: Tensor, exact: Tensor) -> float:
    return root_mean_square([found - exact]) / root_mean_square([exact])


# Errors of the value.
BOUNDS = {FLAT: 3e-6, 1e3: 3e-6, 1e4: 3e-5, 1e5: 3e-3}
HOT = [
    *((variant, temperature) for variant in (*ROW_VARIANTS, "reference-vocab", "native-vocab") for temperature in BOUNDS),
    *(("triton", FLAT), ("triton", 1e4), ("triton-vocab", 1e4)),
]


@every_choice
@pytest.mark.parametrize(("variant", "temperature"), parameters(HOT))
def test_a_high_temperature_leaves_every_digit(variant: str, temperature: float, name: str, parameter: float | None) -> None:
    """T² D tends to a variance of the logits' difference, though D itself falls below any rounding; from 1e4 on the value, but not
    the gradient, loses some."""
    bound = BOUNDS[temperature]
    case = replace(draw(5, (4,), 150, (16, 16), 2.0), options=Options(name, parameter, temperature=temperature))
    exact = case.plain()
    with running(variant):
        found = case.run()
    if name not in SIGNS:
        for gradient in ("student_hidden", "student_weight"):
            assert relative(found[gradient], exact[gradient]) <= 3e-6, gradient
    assert relative(found["losses"], exact["losses"]) <= (bound if name not in SIGNS else 1e3 * bound)


def test_a_temperature_beyond_all_digits_is_refused() -> None:
    case: Case = draw()
    with pytest.raises(ValueError, match=r"temperature is a positive number from 1e-9 to 1e5, got 1000000.0"):
        replace(case, options=Options(temperature=1e6)).run()


@pytest.mark.parametrize("alpha", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("variant", parameters((*ROW_VARIANTS, "triton")))
def test_a_small_parameter_keeps_its_digits(variant: str, name: str, alpha: float) -> None:
    """1 - a in float32, taken from 1 again, would leave 1e-5 two digits; the log of m = a p + (1 - a) q holds it where p >> q."""
    options = Options(name, alpha)
    compared = []
    for seed in range(1 if variant == "triton" else 4):
        x, z = torch.randn(2, 6, 150, generator=torch.Generator().manual_seed(seed)) * 12
        exact, eager = both(x, z, options)
        with running(variant):
            compared.append(ratios([run(x, z, options)], [eager], [exact])["losses"])
    assert max(compared) <= 1
