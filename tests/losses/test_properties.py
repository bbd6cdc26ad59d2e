"""What holds for any input: distances are not negative, logits have no zero point, what is masked is not there."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import kdkernels as kd
from kdkernels import backends

BACKENDS = ("native", "reference") if backends.native.available() else ("reference",)
every_backend = pytest.mark.parametrize("backend", BACKENDS)

seeds = st.integers(0, 2**31 - 1)
spreads = st.sampled_from([0.1, 1.0, 10.0, 30.0])
temperatures = st.sampled_from([0.5, 1.0, 2.0, 5.0])
shares = st.sampled_from([0.0, 0.3, 0.5, 1.0])
names = st.sampled_from(kd.divergences())
sizes = st.integers(1, 12)
vocabularies = st.sampled_from([1, 2, 5, 17, 300])


def logits(seed: int, rows: int, vocab: int, spread: float, backend: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if backend == "reference" else torch.float32
    generator = torch.Generator().manual_seed(seed)
    x, z = torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64).to(dtype) * spread
    return x, z


def rounding(tensor: Tensor, spread: float) -> float:
    """Of log-probabilities at this spread."""
    return 20 * torch.finfo(tensor.dtype).eps * max(1.0, 5 * spread)


def loss_and_grad(x: Tensor, z: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = kd.kd_loss(x, z, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), [x])[0]


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...], tolerance: float = 1e-6) -> None:
    for found, right in zip(one, other, strict=True):
        torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance)


@every_backend
@hypothesis.given(seeds, sizes, vocabularies, spreads, temperatures, shares, names)
def test_a_divergence_is_not_negative(
    backend: str, seed: int, rows: int, vocab: int, spread: float, temperature: float, t: float, name: str
) -> None:
    x, z = logits(seed, rows, vocab, spread, backend)
    with backends.use(backend):
        losses = kd.kd_loss(x, z, divergence=name, t=t, temperature=temperature, square_temperature=False, reduction="none")
    assert (losses >= -rounding(x, spread / temperature)).all()
    if name in ("total_variation", "jsd"):
        assert (losses <= 1 + rounding(x, spread / temperature)).all()


@every_backend
@hypothesis.given(seeds, spreads, temperatures, names)
def test_it_is_zero_for_equal_models_and_for_no_others(
    backend: str, seed: int, spread: float, temperature: float, name: str
) -> None:
    x, z = logits(seed, 3, 17, spread, backend)
    options: dict[str, Any] = {"divergence": name, "temperature": temperature, "square_temperature": False, "reduction": "none"}
    with backends.use(backend):
        equal, _ = loss_and_grad(x, x.clone(), **options)
        different, _ = loss_and_grad(x, z + torch.randn(17, generator=torch.Generator().manual_seed(seed)), **options)
    assert (equal.abs() <= rounding(x, spread / temperature)).all()
    distance = 0.5 * ((x / temperature).softmax(1) - (z / temperature).softmax(1)).abs().sum(1)
    assert (different[distance > 0.1] > 1e-4).all()


@every_backend
@hypothesis.given(seeds, st.floats(-50, 50), st.floats(-50, 50), shares, names)
def test_logits_have_no_zero_point(backend: str, seed: int, up: float, down: float, t: float, name: str) -> None:
    x, z = logits(seed, 4, 17, 3.0, backend)
    labels = torch.tensor([0, 16, 3, 3])
    options: dict[str, Any] = {"labels": labels, "divergence": name, "t": t, "ce_weight": 0.5, "reduction": "none"}
    with backends.use(backend):
        same(loss_and_grad(x + up, z + down, **options), loss_and_grad(x, z, **options), tolerance=2e-4)


@every_backend
@hypothesis.given(seeds, sizes, st.data(), names, st.sampled_from(["mean", "sum"]))
def test_masked_tokens_and_tokens_of_weight_zero_are_not_there(
    backend: str, seed: int, rows: int, data: Any, name: str, reduction: str
) -> None:
    x, z = logits(seed, rows, 17, 3.0, backend)
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    generator = torch.Generator().manual_seed(seed)
    labels, weight = torch.randint(0, 17, (rows,), generator=generator), torch.rand(rows, generator=generator).to(x.dtype) + 0.1
    options: dict[str, Any] = {"divergence": name, "ce_weight": 0.5, "reduction": reduction}
    with backends.use(backend):
        if keep.any():
            loss, grad = loss_and_grad(x[keep], z[keep], labels=labels[keep], token_weight=weight[keep], **options)
        else:
            loss, grad = torch.zeros((), dtype=x.dtype), x[:0]
        masked = loss_and_grad(x, z, labels=labels.where(keep, -100), token_weight=weight, **options)
        weightless = loss_and_grad(x, z, labels=labels, token_weight=weight.where(keep, 0.0), **options)
        with_another_index = loss_and_grad(
            x, z, labels=labels.where(keep, 5), token_weight=weight.where(keep, 0.0), ignore_index=99, **options
        )
    for found in (masked, weightless, with_another_index):
        same((found[0], found[1][keep]), (loss, grad))
        assert (found[1][~keep] == 0).all()


@every_backend
@hypothesis.given(seeds, sizes, names, temperatures)
def test_mean_sum_and_none_are_one_loss(backend: str, seed: int, rows: int, name: str, temperature: float) -> None:
    x, z = logits(seed, rows, 17, 3.0, backend)
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(seed)).to(x.dtype) + 0.1
    options: dict[str, Any] = {"divergence": name, "temperature": temperature, "token_weight": weight}
    with backends.use(backend):
        each, each_grad = loss_and_grad(x, z, reduction="none", **options)
        total, total_grad = loss_and_grad(x, z, reduction="sum", **options)
        mean, mean_grad = loss_and_grad(x, z, **options)
        over_seven, over_seven_grad = loss_and_grad(x, z, normalizer=7, **options)
        over_tensor, _ = loss_and_grad(x, z, normalizer=torch.tensor(7), **options)
    same((total, total_grad), (each.sum(), each_grad), tolerance=1e-5)
    same((mean, mean_grad), (total / weight.sum(), total_grad / weight.sum()), tolerance=1e-5)
    same((over_seven, over_seven_grad, over_tensor), (total / 7, total_grad / 7, total / 7), tolerance=1e-5)


@every_backend
@hypothesis.given(seeds, names, st.floats(0.25, 4.0), st.floats(0.0, 3.0), st.floats(0.0, 3.0))
def test_the_loss_is_its_terms(backend: str, seed: int, name: str, temperature: float, kd_weight: float, ce_weight: float) -> None:
    x, z = logits(seed, 4, 17, 3.0, backend)
    labels = torch.tensor([0, 16, 3, -100])
    with backends.use(backend):
        divergence = loss_and_grad(x, z, labels=labels, divergence=name, temperature=temperature, square_temperature=False)
        cross_entropy = loss_and_grad(x, z, labels=labels, kd_weight=0.0, ce_weight=1.0, temperature=temperature)
        both = loss_and_grad(
            x, z, labels=labels, divergence=name, temperature=temperature, kd_weight=kd_weight, ce_weight=ce_weight
        )
    expected = [kd_weight * temperature**2 * d + ce_weight * c for d, c in zip(divergence, cross_entropy, strict=True)]
    same(both, tuple(expected), tolerance=3e-5)
    same(cross_entropy[:1], (torch.nn.functional.cross_entropy(x, labels),), tolerance=1e-5)


@every_backend
@hypothesis.given(seeds, sizes, names, st.permutations(range(17)))
def test_the_order_of_the_vocabulary_does_not_matter(backend: str, seed: int, rows: int, name: str, order: list[int]) -> None:
    x, z = logits(seed, rows, 17, 3.0, backend)
    labels = torch.randint(0, 17, (rows,), generator=torch.Generator().manual_seed(seed))
    moved = torch.tensor([order.index(label) for label in labels.tolist()])
    with backends.use(backend):
        loss, grad = loss_and_grad(x, z, labels=labels, divergence=name, ce_weight=0.5)
        shuffled, shuffled_grad = loss_and_grad(x[:, order], z[:, order], labels=moved, divergence=name, ce_weight=0.5)
    same((shuffled, shuffled_grad), (loss, grad[:, order]), tolerance=1e-5)


@every_backend
@hypothesis.given(seeds, sizes, names, shares)
def test_gradients_of_a_row_sum_to_zero(backend: str, seed: int, rows: int, name: str, t: float) -> None:
    """A step along the constant vector changes no probability."""
    x, z = logits(seed, rows, 300, 3.0, backend)
    with backends.use(backend):
        _, grad = loss_and_grad(x, z, divergence=name, t=t, reduction="sum")
    assert (grad.sum(1).abs() <= rounding(x, 3.0)).all()


@every_backend
@hypothesis.given(seeds, names, temperatures, st.integers(1, 40_000))
def test_from_hidden_states_or_from_logits_it_is_one_loss(
    backend: str, seed: int, name: str, temperature: float, budget: int
) -> None:
    """With identity heads; the budget cuts chunks anywhere."""
    x, z = logits(seed, 11, 17, 3.0, backend)
    labels = torch.randint(-1, 17, (11,), generator=torch.Generator().manual_seed(seed))
    identity = torch.eye(17, dtype=x.dtype)
    options: dict[str, Any] = {"divergence": name, "temperature": temperature, "ce_weight": 0.5, "ignore_index": -1, "t": 0.7}
    hidden = x.detach().requires_grad_()
    with backends.use(backend):
        loss = kd.linear_kd_loss(hidden, identity, z, identity, labels, memory_budget=budget, **options)
        expected = loss_and_grad(x, z, labels=labels, **options)
    same((loss.detach(), *torch.autograd.grad(loss, [hidden])), expected, tolerance=1e-5)
