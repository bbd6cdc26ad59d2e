"""Time and memory of ``linear_kd_loss`` and ``linear_okd_loss`` against their bare matrix products, in one process, interleaved.

    python -m benchmarks.linear                     # everything; about 25 minutes on 2 cores
    python -m benchmarks.linear --only 32k --repeats 3
    python -m benchmarks.linear --only okd

The bare products (x, z, dH, dW, in blocks of 512 tokens) are the work that no loss from hidden states can avoid; for a teacher
that learns too, its head frozen (OKD), a fifth makes the dH of its hidden states. Their logits go into buffers that exist already;
dH and dW are new tensors, as a gradient is (on a virtual machine the first touch of a large dW alone can cost some percent of the
products). A time is reported as the median over the repeats of loss step / mean of the products
before and after it. A step with half of its labels ignored is held against the step with all of them instead. Memory is the
process's high-water mark during one step, above the inputs and the returned gradients.

Where the processor has no 16-bit matrix path, torch's bfloat16 products are many times slower than its float32 ones. The products
that bfloat16 cases are held against are then the float32 ones (the stricter yardstick), and the bfloat16 ones are timed once, on
the first eighth of the vocabulary, and reported beside them.

Each case runs in its own process; the result goes to benchmarks/results/linear.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kdkernels as kd
from benchmarks.contenders import bare_logits
from benchmarks.measure import MIB, in_own_process, interleaved, machine, seconds
from kdkernels.backends.dtypes import product_dtype
from tests.support.memory import peak_above

RESULTS = Path(__file__).parent / "results" / "linear.json"
BLOCK = 512
SHAPES = {"152k": (151_936, 896, 1536), "32k": (32_000, 512, 1024)}
LOSSES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {"divergence": "reverse_kl"},
    "taid": {"t": 0.4},
    "jsd": {"divergence": "jsd"},
    "okd": {"teacher_alpha": 0.5},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """What one process measures. kind: "time", "eager" (time and memory of plain PyTorch), "memory"."""

    kind: str
    shape: str
    dtype: str = "fp32"
    loss: str = "forward_kl"
    tokens: int = 1024
    budget: int | None = None
    masked: bool = False
    repeats: int = 3

    @property
    def online(self) -> bool:
        """Whether the teacher learns too."""
        return "teacher_alpha" in LOSSES[self.loss]


def cases(repeats: int) -> list[Case]:
    listed = [Case("time", shape, dtype, loss, repeats=repeats) for shape in SHAPES for dtype in DTYPES for loss in LOSSES]
    for shape in SHAPES:
        listed += [
            Case("time", shape, budget=128 * MIB, repeats=repeats),
            Case("time", shape, masked=True, repeats=repeats),
            Case("eager", shape, repeats=repeats),
        ]
    listed += [Case("memory", "152k", dtype, tokens=tokens) for dtype in DTYPES for tokens in (1024, 8192)]
    listed += [Case("memory", "152k", dtype, budget=128 * MIB) for dtype in DTYPES]
    listed += [Case("memory", "152k", dtype, "okd") for dtype in DTYPES]
    return listed


class Inputs:
    def __init__(self, case: Case) -> None:
        vocab, student_dim, teacher_dim = SHAPES[case.shape]
        dtype = DTYPES[case.dtype]
        torch.manual_seed(0)

        def head(dim: int) -> torch.Tensor:
            return torch.randn(vocab, dim).mul_(dim**-0.5).to(dtype)

        self.hidden = torch.randn(case.tokens, student_dim).to(dtype).requires_grad_()
        self.head = head(student_dim).requires_grad_()
        self.teacher_hidden = torch.randn(case.tokens, teacher_dim).to(dtype).requires_grad_(case.online)
        self.teacher_head = head(teacher_dim)
        self.labels = torch.arange(case.tokens) % vocab
        self.half_of_labels = self.labels.masked_fill(self.labels % 2 == 1, -100)

    def step(self, case: Case, labels: torch.Tensor | None = None) -> None:
        self.hidden.grad = self.head.grad = self.teacher_hidden.grad = None
        inputs = self.hidden, self.head, self.teacher_hidden, self.teacher_head
        options = {"memory_budget": case.budget, **LOSSES[case.loss]}
        if case.online:
            both = kd.linear_okd_loss(*inputs, self.labels if labels is None else labels, **options)
            (both.student + both.teacher).backward()
        else:
            kd.linear_kd_loss(*inputs, labels, **options).backward()

    def eager_step(self) -> None:
        """Forward KL as one writes it."""
        self.hidden.grad = self.head.grad = None
        log_q = (self.hidden @ self.head.t()).log_softmax(-1)
        log_p = (self.teacher_hidden @ self.teacher_head.t()).log_softmax(-1)
        torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).div(len(log_q)).backward()

    def products(self, dtype: torch.dtype, fraction: int = 1) -> Callable[[], None]:
        """The bare products in ``dtype``, on the first 1 / fraction of the vocabulary."""
        vocab = self.head.shape[0] // fraction
        hidden, teacher_hidden = self.hidden.detach().to(dtype), self.teacher_hidden.detach().to(dtype)
        online = self.teacher_hidden.requires_grad
        head, teacher_head = self.head.detach()[:vocab].to(dtype), self.teacher_head[:vocab].to(dtype)
        x, z = torch.zeros(BLOCK, vocab, dtype=dtype), torch.zeros(BLOCK, vocab, dtype=dtype)

        def run() -> None:
            hidden_grad, head_grad = torch.empty_like(hidden), torch.empty_like(head)
            teacher_grad = torch.empty_like(teacher_hidden) if online else None
            for begin in range(0, len(hidden), BLOCK):
                here = slice(begin, begin + BLOCK)
                bare_logits(hidden[here], head, x)
                bare_logits(teacher_hidden[here], teacher_head, z)
                torch.mm(x, head, out=hidden_grad[here])
                torch.addmm(head_grad, x.t(), hidden[here], beta=float(begin > 0), out=head_grad)
                if teacher_grad is not None:
                    torch.mm(z, teacher_head, out=teacher_grad[here])

        return run


def measure(case: Case) -> dict[str, Any]:
    inputs = Inputs(case)
    returned = sum(tensor.nbytes for tensor in (inputs.hidden, inputs.head, inputs.teacher_hidden) if tensor.requires_grad)
    if case.kind == "memory":
        # What the libraries keep for good is paid by a small step, outside the measurement.
        small = Inputs(dataclasses.replace(case, shape="32k", tokens=64))
        small.step(case)
        del small
        sizes = case.tokens, *SHAPES[case.shape]
        plan = kd.plan(*sizes, DTYPES[case.dtype], memory_budget=case.budget, online_teacher=case.online)
        peak = peak_above(lambda: inputs.step(case)) - returned
        return {"scratch_bytes": peak, "planned_scratch_bytes": plan.scratch_bytes, "accumulator_bytes": plan.accumulator_bytes}
    if case.kind == "eager":
        result: dict[str, Any] = {"scratch_bytes": peak_above(inputs.eager_step) - returned}
        step = inputs.eager_step
    else:
        result = {}
        inputs.step(case)

        def step() -> None:
            inputs.step(case, inputs.half_of_labels if case.masked else None)

    dtype = DTYPES[case.dtype]
    product = product_dtype(dtype, torch.device("cpu"))
    yardstick = (lambda: inputs.step(case, inputs.labels)) if case.masked else inputs.products(product)
    result |= {
        **interleaved(step, yardstick, case.repeats),
        "yardstick": "the step with every label" if case.masked else f"products in {product}",
    }
    if product != dtype and case.loss == "forward_kl":
        del yardstick
        result["own_dtype_products_seconds"] = 8 * seconds(inputs.products(dtype, fraction=8))
    return result


def name(case: Case) -> str:
    """What a case is called in the results."""
    extras = [f"{case.budget // MIB} MiB budget"] if case.budget else []
    extras += ["half masked"] if case.masked else []
    loss = "eager forward_kl" if case.kind == "eager" else case.loss
    return ", ".join([f"{case.kind}: {case.shape} {case.dtype} N={case.tokens} {loss}", *extras])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps per case (default 3)")
    parser.add_argument("--only", default="", help="run cases whose line contains this, and keep the other results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(Case(**json.loads(arguments.case)))))
        return 0
    kept: dict[str, Any] = json.loads(RESULTS.read_text())["cases"] if arguments.only and RESULTS.exists() else {}
    for case in cases(arguments.repeats):
        key = name(case)
        if arguments.only not in key:
            continue
        kept[key] = in_own_process("benchmarks.linear", dataclasses.asdict(case))
        report(key, kept[key])
        RESULTS.write_text(json.dumps({"machine": machine(), "cases": kept}, indent=1) + "\n")
    print(f"wrote {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")
    return 0


def report(key: str, result: dict[str, Any]) -> None:
    parts = [f"{key:58}"]
    if "failed" in result:
        parts.append(f"failed: {result['failed']}")
    if "ratio" in result:
        spread = f"{min(result['ratios']):.3f}-{max(result['ratios']):.3f}"
        parts.append(f"{result['ratio']:.3f}x {result['yardstick']} ({spread}), {result['seconds']:.2f} s")
    if "own_dtype_products_seconds" in result:
        parts.append(f"(its 16-bit products take {result['own_dtype_products_seconds']:.0f} s)")
    if "scratch_bytes" in result:
        parts.append(f"{result['scratch_bytes'] / MIB:.0f} MiB above inputs and gradients")
    if "planned_scratch_bytes" in result:
        parts.append(f"(planned {result['planned_scratch_bytes'] / MIB:.0f})")
    print("  ".join(parts), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
