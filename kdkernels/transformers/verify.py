"""Is what ``lm_head`` read what the model does? A probe of a few tokens, and the likely cause where it is not.

The way from hidden states to logits is tested in its two parts, so that a difference is found where it arises:

- the head: its output g against H Wᵀ + b, with H as it enters;
- what the model does to g afterwards: the head's output is replaced by numbers that span five decades, so that a softcap shows on a
  model whose logits are still small, and the logits that come out are held against softcap tanh(scale g / softcap);

and then as a whole, through ``hidden_states``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.backends.head import apply_head, cap_slope
from kdkernels.losses.head import LMHead
from kdkernels.transformers.batches.reading import most_positions
from kdkernels.transformers.finite import NotFinite, check_weights, is_finite
from kdkernels.transformers.heads import OutputHead, after_head, output_module, read_head, unwrapped
from kdkernels.transformers.hidden import hidden_states, model_inputs
from kdkernels.transformers.modes import evaluating, restored

PROBE = (2, 12)  # sequences, tokens
SMALLEST, LARGEST = 1e-2, 1e3  # of the numbers that replace the head's output; the largest fits float16


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards it and the generators of random numbers are as before."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None})
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),  # a probe is not worth a compilation
        restored(model),
        evaluating(model),
    ):
        yield


def _probe(base: Any) -> dict[str, Tensor]:
    weight = base.get_input_embeddings().weight
    sequences, tokens = PROBE[0], min(PROBE[1], most_positions(base) or PROBE[1])
    ids = torch.arange(sequences * tokens, device=weight.device) * max(1, weight.shape[0] // (sequences * tokens) - 1)
    ids = (ids % weight.shape[0]).view(sequences, tokens)
    seq2seq = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if seq2seq else {})}


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


def _levels(like: Tensor) -> Tensor:
    """Numbers in the shape of ``like``, of both signs, evenly spread over decades, without a pattern along either dimension."""
    place = torch.arange(like.numel(), dtype=torch.float64)
    exponent = (place * 0.6180339887498949) % 1  # golden ratio: even at any length
    sign = 1 - 2 * ((place * 0.41421356237309515) % 1 < 0.5).double()
    return (sign * SMALLEST * (LARGEST / SMALLEST) ** exponent).view(like.shape).to(like)


def _capped(g: Tensor, scale: float, softcap: float | None) -> Tensor:
    return apply_head(g, None, scale, softcap or 0.0)


def _fits(found: Tensor, expected: Tensor, allowed: Tensor) -> bool:
    """Of logits that are -inf, for banned tokens, the others have to be too."""
    return bool((((found - expected).abs() <= allowed) | (found == expected)).all())


def _ratio(found: Tensor, g: Tensor) -> float:
    """The factor a of found = a g + a number for each column; both (tokens, V). 0 where g does not vary."""
    g, found = g - g.mean(0), found - found.mean(0)
    square = float((g * g).sum())
    return float((found * g).sum()) / square if square else 0.0


def _softcap(found: Tensor, g: Tensor, scale: float) -> float:
    """The softcap that explains ``found`` best, from scale g: a search over nine decades, ever finer."""
    low, high = -3.0, 6.0
    for _ in range(12):
        candidates = torch.linspace(low, high, 31, dtype=torch.float64)
        costs = [float((_capped(g, scale, 10.0**e) - found).abs().sum()) for e in candidates.tolist()]
        best = candidates[costs.index(min(costs))].item()
        step = (high - low) / 30
        low, high = best - step, best + step
    return float(10.0**best)


def _same_numbers(found: Tensor, g: Tensor, allowed: Tensor) -> bool:
    """Every token has the numbers of g, in another order."""
    return bool(((found.sort(-1).values - g.sort(-1).values).abs() <= allowed.amax(-1, keepdim=True)).all())


def _after_cause(logits: Tensor, g: Tensor, scale: float, softcap: float | None, eps: float) -> str:
    """What the model does to the head's output g; logits and g (tokens, V) in float64."""
    rounding = 16 * eps
    digits = 6 if eps < 1e-5 else 3

    def show(number: float | None) -> str:
        return "none" if number is None else f"{number:.{digits}g}"

    small = g.abs() < 10 * SMALLEST  # below any softcap
    offset = logits[small].mean()  # keeps a bias out of the ratio
    slope = float(((logits - offset) * g)[small].sum() / (g * g)[small].sum())
    affine = _ratio(logits, g)
    bias = (logits - affine * g).mean(0)
    given = f"the head given has logit_scale={show(scale)}, softcap {show(softcap)}"
    if _fits(logits, affine * g, rounding * (affine * g).abs()):
        what = "another logit scale" if softcap is None else "no softcap"
        return f"{what}: the model multiplies the head's output by {show(affine)}; {given}"
    line = affine * g + bias
    if _fits(logits, line, rounding * (line.abs() + bias.abs() + (affine * g).abs().amax(0))):
        times = "" if abs(affine - scale) <= rounding * abs(scale) else f", after multiplying by {show(affine)}; {given}"
        return f"a bias: the model adds a constant to each vocabulary entry (largest {show(float(bias.abs().max()))}){times}"
    cap = _softcap(logits, g, slope)
    curve = _capped(g, slope, cap)
    if _fits(logits, curve, 0.01 * curve.abs() + rounding):
        return f"a softcap: the logits are c tanh(a g / c) with c = {show(cap)}, a = {show(slope)}; {given}"
    expected = _capped(g, scale, softcap)
    if _same_numbers(logits, expected, rounding * expected.abs()):
        return "another order: the model permutes the logits after its head"
    return "unknown: what the model does to the head's output is neither a scale, nor a softcap, nor a bias, nor another order"


def _head_cause(output: Tensor, product: Tensor, hidden: Tensor, base: Any, weight: Tensor, allowed: Tensor) -> str:
    """Why the head's output (tokens, V) is not the product H Wᵀ + b, both in float64; hidden: (tokens, D) as it enters."""
    if output.shape != product.shape:
        return f"another height: the head makes {output.shape[-1]} logits, the weight has {product.shape[-1]} rows"
    if not torch.equal(output.isinf(), product.isinf()):
        return "banned tokens: others have the logit -inf in the head than in its product with the hidden states"
    heard = product.isfinite().all(0)
    output, product, allowed = output[:, heard], product[:, heard], allowed[:, heard]
    allowed = allowed.amax().expand_as(allowed)  # an explanation may leave what the worst token leaves
    ratio = _ratio(output, product)
    if _fits(output, ratio * product, allowed):
        return f"a scale: the head multiplies its output, or the hidden states inside it, by {ratio:.6g}"
    difference = output - product
    if _fits(difference, difference.mean(0).expand_as(difference), allowed):
        return f"a bias: the head adds a constant to each vocabulary entry (largest {float(difference.abs().max()):.6g})"
    if _same_numbers(output, product, allowed):
        return "another order: the rows of the weight are permuted"
    embeddings = base.get_input_embeddings().weight
    if embeddings.shape == (product.shape[-1], hidden.shape[-1]):
        if torch.equal(embeddings, weight):
            return "tied weights: the weight given is that of the input embeddings, the head multiplies by another"
        if _fits(output, _product(hidden, LMHead(embeddings)), allowed):
            return "tied weights: the head multiplies by the input embeddings, the weight given is another"
    softcap = _softcap(output, product, 1.0)
    if _fits(output, _capped(product, 1.0, softcap), allowed + 0.01 * output.abs()) and softcap < 1e5:
        return f"a softcap: the head itself caps its output at {softcap:.6g}"
    singular = torch.linalg.svdvals(difference)
    rank = int((singular > float(allowed.max()) * max(difference.shape) ** 0.5).sum())
    if rank < min(*difference.shape, hidden.shape[-1]):
        return f"a low-rank update (rank {rank}): the weight given lacks an adapter on the head, such as LoRA"
    return "unknown: another weight, or hidden states that are changed inside the head"


def _allowed(exact: Tensor, eager: Tensor, size: Tensor, eps: float, terms: int) -> Tensor:
    """How far a computation in the model's dtype may be from the exact one, (tokens, V): from how far the eager one is.

    size: (tokens, V), what the rounding of each logit is proportional to. terms: how many products each logit sums up.

    Eight root mean squares, in units of size, are beyond what one rounding does in 10^9 entries. The eager computation need not
    show them: it may round as the exact one does (in float64), where the model adds up in another order, as with a LoRA on a head.
    So they are taken to be at least those of a running sum, sqrt(terms) roundings of the dtype that sums are in.
    """
    unit = size.clamp(min=torch.finfo().tiny)
    measured = ((eager.double() - exact) / unit).masked_fill(exact.isinf(), 0.0).square().mean().sqrt()
    summed = terms**0.5 * min(eps, torch.finfo(torch.float32).eps)
    return 8 * measured.clamp(min=summed) * unit + 4 * eps * exact.abs().masked_fill(exact.isinf(), 0.0) + torch.finfo().tiny


def _size(hidden: Tensor, head: LMHead) -> Tensor:
    """The norm of the products that each logit sums up, sqrt(sum (h w)^2): (tokens, V). Rows of a head differ by orders in it."""
    return _by_parts(hidden.double().square(), head.weight, torch.square).sqrt()


def _refuse(base: Any, where: str, cause: str, found: Tensor, expected: Tensor) -> None:
    error = f"{float((found - expected).abs().max()):.3g}" if found.shape == expected.shape else "not comparable"
    raise ValueError(
        f"the head given does not make the logits of {type(base).__name__}; {where}: {cause} (largest difference {error})"
    )


def verify_lm_head(model: Any, head: LMHead | None = None, batch: Any = None, *, role: str = "model") -> None:
    """Hold head(hidden_states) against the model's own logits, on a few tokens; for the start of a training run.

    model: as for ``lm_head``, whose result is tested. head: an LMHead made by hand instead, for its hidden states (..., D) as
        ``hidden_states`` returns them. batch: the model's keyword arguments, where 24 token ids are not enough (images, encoder
        inputs). role: what errors call the model. Three forwards without gradients, in evaluation mode, not compiled.

    The model is left as it was: modes, weights, buffers, gradients, random numbers. Layers that keep weights in a form of their own
    (quantised ones) run in training mode, as some change that form for good in evaluation mode. What is allowed is the error of the
    same computation in the model's dtype against float64.

    Raises ValueError that names the likely cause: the logit scale, a softcap, a bias, another order of the vocabulary, tied
    weights, an adapter on the head; where a weight, or what the probe makes of finite ones, is NaN or infinite; and as ``lm_head``
    does.
    """
    base = unwrapped(model)
    read = read_head(model, own_forward=True)
    if head is None:
        scale, softcap = after_head(model)
        head = LMHead(read.weight(), read.bias(), logit_scale=scale, softcap=softcap)
    check_weights(model, role)
    for name in ("weight", "bias"):
        if (given := getattr(head, name)) is not None and not is_finite(given, low=name == "weight"):
            raise NotFinite(f"the head given has a {name} that is NaN or infinite; accepted: finite numbers")
    with _as_it_was(model):
        _verify(model, base, read, head, model_inputs(model, _probe(base) if batch is None else batch), role)


def _verify(model: Any, base: Any, read: OutputHead, head: LMHead, inputs: dict[str, Any], role: str) -> None:
    module = output_module(model)
    seen: dict[str, Tensor] = {}

    def observe(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen["hidden"], seen["output"] = args[0], output

    def replace(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        levels = seen["levels"] = _levels(output)
        return levels

    def run(hook: Any) -> Tensor:
        handle = module.register_forward_hook(hook)
        try:
            return _rows(_logits(model(**inputs)))
        finally:
            handle.remove()

    logits = run(observe)
    if "output" not in seen:
        raise ValueError(f"the forward of {type(base).__name__} did not call its output head ({type(module).__name__})")
    for what, made in (("hidden states", seen["hidden"]), ("logits", seen["output"])):
        if not is_finite(made, low=made is seen["hidden"]):
            raise NotFinite(
                f"the {role}'s {what} are NaN or infinite, though its weights are not: {made.dtype} may be too narrow for it"
            )
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (seen["hidden"], seen["output"], head.weight, logits))

    hidden = _rows(read.extend(seen["hidden"]))
    if hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"the head given has D = {head.weight.shape[1]}, hidden states that enter the model's have {hidden.shape[-1]}"
        )
    product, eager = _product(hidden, head), _eager(hidden, head)
    output, allowed = _rows(seen["output"]).double(), _allowed(product, eager, _size(hidden, head), eps, hidden.shape[-1])
    if output.shape != product.shape or not _fits(output, product, allowed):
        cause = _head_cause(output, product, _rows(seen["hidden"]), base, head.weight, allowed)
        _refuse(base, "the head differs", cause, output, product)

    scaled = run(replace).double()
    levels = _rows(seen["levels"]).double()[:, : scaled.shape[-1]]  # some models cut padded rows off
    expected = _capped(levels, head.logit_scale, head.softcap)
    if scaled.shape != expected.shape or not _fits(scaled, expected, 8 * eps * expected.abs()):
        cause = "another height"
        if scaled.shape == expected.shape:
            cause = _after_cause(scaled, levels, head.logit_scale, head.softcap, eps)
        _refuse(base, "what comes after the head differs", cause, scaled, expected)

    # As a whole: the head on what hidden_states returns. The parts agree, so this can only differ where the model does not see
    # the same hidden states twice.
    hidden = _rows(hidden_states(model, inputs))
    exact, eager = (
        _capped(g, head.logit_scale, head.softcap)[:, : logits.shape[-1]] for g in (_product(hidden, head), _eager(hidden, head))
    )
    size = head.logit_scale * _size(hidden, head)[:, : logits.shape[-1]]
    if head.softcap is not None:
        size *= cap_slope(exact, head.softcap)  # the cap presses errors together as it does logits
    if not _fits(logits.double(), exact, _allowed(exact, eager, size, eps, hidden.shape[-1])):
        cause = "unknown: two forwards on the same tokens give different hidden states"
        _refuse(base, "the whole differs", cause, logits.double(), exact)


def mixes_documents(model: Any, rows: int = 1) -> bool:
    """Whether documents that follow each other in a row, and whose position_ids restart, see each other in the model.

    rows: of a batch; some kernels know one only. The first of two documents is changed, in four forwards of a few tokens in
    evaluation mode: as two documents the second must not notice, beyond rounding and far less than where both are one.
    """
    weight = unwrapped(model).get_input_embeddings().weight
    ids = torch.arange(8, device=weight.device).expand(rows, -1) % weight.shape[0]
    changed = torch.cat([ids[:, :4].flip(1), ids[:, 4:]], 1)
    two = {"position_ids": torch.arange(4, device=weight.device).repeat(2).expand(rows, -1)}
    one = {"attention_mask": torch.ones_like(ids)}
    with _as_it_was(model):
        found = [
            [hidden_states(model, {"input_ids": each, **more})[:, 4:].double() for each in (ids, changed)] for more in (two, one)
        ]
    apart, together = (float((before - after).abs().max()) for before, after in found)
    return apart > min(64 * torch.finfo(weight.dtype).eps * float(found[0][0].abs().max()), 0.25 * together)


def check_documents(models: Mapping[str, Any], rows: int) -> None:
    """Raises ValueError where a model mixes documents of a row. models: by the names of the arguments; a model may be None."""
    for name, model in models.items():
        if model is not None and mixes_documents(model, min(rows, 2)):
            base = unwrapped(model)
            attention = getattr(base.config, "_attn_implementation", None)
            raise ValueError(
                f"the batch has several documents in a row (position_ids restart), and in {rows} rows the {name} "
                f"({type(base).__name__}, attention {attention}) mixes them; accepted: a document a row, or a model and "
                "attention that keep them apart"
            )


def _by_parts(hidden: Tensor, weight: Tensor, of_weight: Callable[[Tensor], Tensor] = lambda rows: rows) -> Tensor:
    """H f(W)ᵀ in float64: (tokens, D) -> (tokens, V). By parts of the weight, whose copy in float64 is large."""
    return torch.cat([hidden.double() @ of_weight(rows.double()).mT for rows in weight.split(8192)], -1)


def _product(hidden: Tensor, head: LMHead) -> Tensor:
    """H Wᵀ + b in float64: (tokens, D) -> (tokens, V)."""
    product = _by_parts(hidden, head.weight)
    return product if head.bias is None else product + head.bias.double()


def _eager(hidden: Tensor, head: LMHead) -> Tensor:
    """The same in the head's dtype."""
    dtype = head.weight.dtype
    return nn.functional.linear(hidden.to(dtype), head.weight, None if head.bias is None else head.bias.to(dtype))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
