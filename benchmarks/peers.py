"""The losses of other libraries, as contenders (contenders.py), and what each of them offers, read from its source.

Nothing of a library is imported before its contender is asked for; whatever is raised then is the reason in the result file,
``NotOfferedError`` where the library has no such loss.

Conventions. Liger's and TRL's beta is 0 for KL(teacher ‖ student) and 1 for KL(student ‖ teacher), and at 1/2 their divergence is
the symmetric Jensen-Shannon one, as here. Liger's fused_linear_kl_div is given the teacher's probabilities [N, V]: each step makes
them of the teacher's hidden states, in their dtype, and holds them whole. torchtune is given the logits of both models as its
recipes make them, in eight chunks that are all kept; its symmetric KL is the mean of two KLs, which is no JSD, and its forward KL
lacks the teacher's entropy: it is the cross-entropy, whose gradient is the same.

Masked tokens: Liger's and torchtune's take all rows and the labels. TRL gets hidden[kept], as its trainer does on a GPU, and
flash-linear-attention too, which has no mask.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import IGNORED, Problem

Loss = Callable[[Problem], Tensor]
_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
_CHUNKED_OUTPUT = {"forward_kl": "ForwardKLWithChunkedOutputLoss", "reverse_kl": "ReverseKLWithChunkedOutputLoss"}


class NotOfferedError(Exception):
    """Says which loss a contender does not have."""


def _of(library: str, offered: dict[str, Any], loss: str) -> Any:
    if loss not in offered:
        raise NotOfferedError(f"{library} has no {loss.upper()}")
    return offered[loss]


def _labels(given: Problem) -> Tensor:
    """Those of the problem; where it has none, labels that count every token."""
    if given.labels is not None:
        return given.labels
    return torch.zeros(len(given.hidden), dtype=torch.int64, device=given.hidden.device)


def _liger(loss: str, compiled: bool) -> Loss:
    """Liger-Kernel's chunked loss in torch, compiled by itself or not; without its hard-label term."""
    beta = _of("Liger-Kernel", _BETA, loss)
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    torch._dynamo.reset()
    module = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, ignore_index=IGNORED, compiled=compiled)

    def run(given: Problem) -> Tensor:
        inputs = (given.hidden, given.head, given.teacher_hidden, given.cut_teacher_head, _labels(given))
        value: Tensor = module(*inputs, student_bias=None, teacher_bias=None)
        return value

    return run


def _liger_triton(loss: str) -> Loss:
    """Liger-Kernel's fused linear JSD around its Triton kernel."""
    beta = _of("Liger-Kernel", _BETA, loss)
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=beta, ignore_index=IGNORED)

    def run(given: Problem) -> Tensor:
        value: Tensor = module(given.hidden, given.head, given.teacher_hidden, given.cut_teacher_head, given.labels)
        return value

    return run


def _liger_kl_div(loss: str) -> Loss:
    """Liger-Kernel's fused linear KL around its Triton kernel, and the teacher's probabilities for it."""
    _of("Liger-Kernel's fused_linear_kl_div", {"forward_kl": None}, loss)
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    module = LigerFusedLinearKLDivLoss(ignore_index=IGNORED)

    def run(given: Problem) -> Tensor:
        with torch.no_grad():
            target = (given.teacher_hidden @ given.cut_teacher_head.t()).softmax(-1)
        value: Tensor = module(given.hidden, given.head, target, given.labels)
        return value

    return run


def _trl(loss: str) -> Loss:
    """TRL's chunked divergence: a value per token, whose mean is taken."""
    beta = _of("TRL", _BETA, loss)
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(given: Problem) -> Tensor:
        hidden, teacher_hidden = given.kept
        student, teacher = (hidden, given.head, None), (teacher_hidden, given.cut_teacher_head, None)
        divergence, _ = ChunkedDivergenceFunction.apply(*student, *teacher, beta)
        value: Tensor = divergence.mean()
        return value

    return run


def _fla(loss: str) -> Loss:
    """flash-linear-attention's fused KL: the mean over its rows, around its Triton kernel."""
    _of("flash-linear-attention", {"forward_kl": None}, loss)
    from fla.modules.fused_kl_div import FusedKLDivLoss

    module = FusedKLDivLoss()

    def run(given: Problem) -> Tensor:
        hidden, teacher_hidden = given.kept
        value: Tensor = module(hidden, teacher_hidden, given.head, given.cut_teacher_head)
        return value

    return run


def _file_of(package: str, path: str) -> ModuleType:
    """A file of an installed package as a module, without whatever else the package imports."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}")
    file = Path(found.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torchtune(loss: str) -> Loss:
    """torchtune's KL of chunked logits. The file of its losses needs PyTorch alone; the package wants a torchao of its time."""
    name = _of("torchtune", _CHUNKED_OUTPUT, loss)
    module = getattr(_file_of("torchtune", "modules/loss/kd_losses.py"), name)(ignore_index=IGNORED)

    def chunks(hidden: Tensor, head: Tensor) -> list[Tensor]:
        return [rows @ head.t() for rows in hidden[None].chunk(module.num_output_chunks, dim=1)]

    def run(given: Problem) -> Tensor:
        student, teacher = chunks(given.hidden, given.head), chunks(given.teacher_hidden, given.cut_teacher_head)
        value: Tensor = module(student, teacher, _labels(given)[None])
        return value

    return run


CONTENDERS: dict[str, Callable[[str], Loss]] = {
    "liger": lambda loss: _liger(loss, compiled=False),
    "liger compiled": lambda loss: _liger(loss, compiled=True),
    "liger triton": _liger_triton,
    "liger kl_div": _liger_kl_div,
    "trl": _trl,
    "fla": _fla,
    "torchtune": _torchtune,
}


class Offers(NamedTuple):
    """What a loss can be asked for, in a few words. source: the release, or commit, that was read.

    masked: tokens that do not count. larger_teacher: what a teacher's head with more rows than the student's leads to. banned: what
    an entry whose logit is -inf in either model adds to the loss. both_learn: whether the teacher gets its gradient too.
    """

    source: str
    losses: str
    masked: str
    temperature: str
    larger_teacher: str
    banned: str
    both_learn: str


_WRITTEN = Offers("PyTorch", "any, as one writes it", "as one writes it", "yes", "cut by hand", "inf or NaN", "yes")
_LIGER = Offers(
    "liger-kernel 0.8.5",
    "two KLs, JSD; cross-entropy beside them",
    "by labels, but computed",
    "yes",
    "student padded with logits of 0",
    "inf or NaN",
    "no",
)
_OURS = Offers(
    "this library",
    "[all of these](losses.md), TAID; cross-entropy beside them",
    "by labels or weights, in no product",
    "yes",
    "cut (`vocab_size`), else an error",
    "0",
    "yes",
)
OFFERS = {
    "tokens": _OURS,
    "vocab": _OURS,
    "eager": _WRITTEN,
    "compiled": _WRITTEN,
    "checkpointed": _WRITTEN,
    "liger": _LIGER,
    "liger compiled": _LIGER,
    "liger triton": _LIGER._replace(losses="two KLs, JSD", larger_teacher="cut, not renormalised"),
    "liger kl_div": _LIGER._replace(
        losses="forward KL with given probabilities",
        temperature="the student's",
        larger_teacher="cut, not renormalised",
        banned="0 in the target, inf or NaN in the student",
    ),
    "trl": Offers("trl 1.16.0", "two KLs, JSD", "none: a value per token", "yes", "cut", "inf or NaN", "no"),
    "fla": Offers("fla-core 0.6.0", "forward KL", "none", "no", "wrong rows are read", "inf or NaN", "no"),
    "torchtune": Offers(
        "torchtune 0.6.1",
        "two KLs, their mean",
        "by labels, but computed",
        "no",
        "an error",
        "0; NaN in the gradient of reverse KL",
        "by reverse KL",
    ),
    "taid published": Offers("SakanaAI/TAID a062892", "TAID", "by a mask, but computed", "no", "an error", "0", "no"),
}
