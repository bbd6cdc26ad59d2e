"""Holds kdkernels.planning.roofline against published GPU measurements: ``python -m benchmarks.roofline [--csv PATH]``.

benchmarks/published.csv holds measurements that others published, with their source. Nothing here was measured by us.

For eager PyTorch the passes are not written down by hand: each benchmark's step is run on tensors without data (device "meta") and
every operation that reaches the device is counted, with the bytes it reads and writes and the storage that is alive. The softmax
backward, one operation on meta, is counted as the two kernels that it is on a GPU. For Liger's own kernels the passes are those of
their source, for the ones whose time is that of their memory traffic.

What the model counts as a benchmark's step is what the published scripts time: gradients add to those of the step before, and the
backward of the bare losses goes on through the log-softmax that made their input.

What it gets wrong, and why:

- B200: eager rows took 1.1 to 1.3 times the predicted time. Elementwise kernels reached 0.70 to 0.76 of its 8 TB/s where the same
  ones reach 0.92 on an H100. The model has one efficiency for all devices; predictions for a B200 are too fast by so much.
- Liger's JSD kernel: for vocabularies from 16,384 the forward took 6 times the predicted time on an H100 PCIe, 10 times on a B200.
  A row is a block of up to 65,536 elements in 4 warps (Triton's default), too many for its registers: presumably they spill, and a
  roofline knows no spills. On the B200 its memory is one tensor [N, V] more than counted, as if the upstream gradient were not 1.
- Eager JSD on logits, forward, on an H100 PCIe: 10 % too fast, as if the mixture had been made in three operations, not in one;
  the formula at that release could not be looked up.
- Eager JSD with cross-entropy (distill_jsd_loss), memory: published peaks are 4.5 GiB higher at N = 1,024 and 8 GiB at 8,192. Most
  of it does not grow with N and is in the other provider's rows too, presumably left from earlier benchmarks.
- Eager cross-entropy of trl#7244 is taken to be that of transformers (a float32 copy of the logits), and its "NVIDIA H100" to be
  the SXM one, whose bare products run at 728 Tflop/s. Its published peak is 3.5 GiB above the predicted one. Its row of bare
  products is listed and not counted: MATRIX_EFFICIENCY and EXPOSED are fitted to products that were timed on an H100.
- MEMORY_EFFICIENCY is from the forward rows of the same table, so the rows for H100 do not test that one number. The passes, the
  device, the dtype and the size are what the other rows test.
- Host time is not in the model: where a step is many small kernels (Liger's chunked losses) it would predict far too little.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.planning.devices import Device, device
from kdkernels.planning.roofline import Pass, seconds
from tests.support.trace import Trace

PUBLISHED = Path(__file__).parent / "published.csv"
UNITS = {"ms": 1e-3, "MB": 2**20, "GiB": 2**30}  # Liger's MB are 2**20 bytes
DEVICE_NAMES = {
    "NVIDIA H100 PCIe": "H100-PCIe",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100": "H100",
    "NVIDIA B200": "B200",
}
# One step of a benchmark: a function that makes its inputs and returns the function that computes the loss.
Step = Callable[[], Callable[[], Tensor]]


def _random(*shape: int, dtype: torch.dtype = torch.float32, learned: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=learned)


def kl_div(tokens: int, vocab: int) -> Callable[[], Tensor]:
    """nn.KLDivLoss of log-probabilities and probabilities, float32."""
    log_q = _random(tokens, vocab, learned=True).log_softmax(-1)
    p = _random(tokens, vocab).softmax(-1)
    return lambda: F.kl_div(log_q, p, reduction="batchmean")


def _jsd(log_q: Tensor, log_p: Tensor) -> Tensor:
    """The mixture in probability space, two KLs to its logarithm; beta = 1/2."""
    log_q, log_p = log_q.float(), log_p.float()
    mixture = torch.lerp(log_q.exp(), log_p.exp(), 0.5)
    of_p = F.kl_div(mixture.log(), log_p, reduction="none", log_target=True).sum(-1)
    of_q = F.kl_div(mixture.log(), log_q, reduction="none", log_target=True).sum(-1)
    return ((of_p * 0.5 + of_q * 0.5) / len(log_q)).sum()


def jsd(tokens: int, vocab: int) -> Callable[[], Tensor]:
    """JSD of log-probabilities, float32."""
    log_q, log_p = _random(tokens, vocab, learned=True).log_softmax(-1), _random(tokens, vocab).log_softmax(-1)
    return lambda: _jsd(log_q, log_p)


def tvd(tokens: int, vocab: int) -> Callable[[], Tensor]:
    """Total variation of probabilities, float32."""
    q, p = _random(tokens, vocab, learned=True).softmax(-1), _random(tokens, vocab).softmax(-1)

    def loss() -> Tensor:
        halves = torch.abs(q - p) / 2.0
        return halves.sum() / tokens

    return loss


def fused_linear_jsd(tokens: int, vocab: int, hidden: int) -> Callable[[], Tensor]:
    """JSD from hidden states in bfloat16. The benchmark trains the teacher's head too, so its gradient is part of the time."""
    half = torch.bfloat16
    student, teacher = _random(tokens, hidden, dtype=half, learned=True), _random(tokens, hidden, dtype=half)
    heads = [_random(vocab, hidden, dtype=half, learned=True) for _ in range(2)]

    def loss() -> Tensor:
        x, z = student @ heads[0].t(), teacher @ heads[1].t()
        return _jsd((x / 1.0).log_softmax(-1), (z / 1.0).log_softmax(-1)).to(half)

    return loss


def distill_jsd_loss(tokens: int, vocab: int, hidden: int) -> Callable[[], Tensor]:
    """Cross-entropy and JSD from hidden states in bfloat16, float32 logits; the student is half as wide.

    The formula is that of the project's tests at about that release. Whether the teacher's head was trained then, as it is in
    ``fused_linear_jsd``, could not be looked up: it is taken to be, because the published backward is too long for the student's
    gradients alone (with those alone these rows are predicted at 0.75 of the published time instead of 0.97).
    """
    half = torch.bfloat16
    student, teacher = _random(tokens, hidden // 2, dtype=half, learned=True), _random(tokens, hidden, dtype=half)
    head, teacher_head = (_random(vocab, width, dtype=half, learned=True) for width in (hidden // 2, hidden))
    # those of the other provider are on the device too
    beside = [_random(vocab, width, dtype=half) for width in (hidden // 2, hidden)]
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")

    def loss() -> Tensor:
        x, z = (student @ head.t()).float(), (teacher @ teacher_head.t()).float()
        hard = F.cross_entropy(x, labels)
        x /= 1.0
        z /= 1.0
        log_q, log_p = x.log_softmax(-1), z.log_softmax(-1)
        log_m = (0.5 * log_q.exp() + 0.5 * log_p.exp()).log()
        of_q = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
        of_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
        assert beside
        return 0.5 * hard + 0.5 * (0.5 * of_p + 0.5 * of_q)

    return loss


def linear_cross_entropy(tokens: int, vocab: int, hidden: int) -> Callable[[], Tensor]:
    """Cross-entropy of float32 logits from a bfloat16 head."""
    states = _random(tokens, hidden, dtype=torch.bfloat16, learned=True)
    head = _random(vocab, hidden, dtype=torch.bfloat16, learned=True)
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    return lambda: F.cross_entropy((states @ head.t()).float(), labels)


def trace(make: Step, cached_row: int, *, retain: bool = False) -> tuple[list[Pass], list[Pass], int]:
    """Passes of the forward, passes of the backward, and the peak in bytes, of the second step: gradients of the first are there.

    retain: whether the backward keeps the graph, as it must where the loss's input was made once for all steps.
    """
    with Trace(cached_row) as counted:
        loss = make()
        loss().backward(retain_graph=retain)
        counted.restart()
        value = loss()
        at = len(counted.passes)
        value.backward(retain_graph=retain)
    return counted.passes[:at], counted.passes[at:], counted.peak


def liger_kl_div(tokens: int, vocab: int, cached_row: int) -> tuple[list[Pass], list[Pass], int]:
    """ops/kl_div.py: reads both; writes the gradient from the target, then divides it by the batch."""
    one = tokens * vocab * 4
    return [Pass(0.0, 2 * one)], [Pass(0.0, 2 * one), Pass(0.0, 2 * one), *_log_softmax_back(one, vocab, cached_row)], 6 * one


def liger_jsd(tokens: int, vocab: int, cached_row: int) -> tuple[list[Pass], list[Pass], int]:
    """ops/jsd.py: zeroes a loss per logit, reads both and writes loss and gradient, sums the losses."""
    one = tokens * vocab * 4
    return [Pass(0.0, one), Pass(0.0, 4 * one), Pass(0.0, one)], _log_softmax_back(one, vocab, cached_row), 6 * one


def liger_tvd(tokens: int, vocab: int, cached_row: int) -> tuple[list[Pass], list[Pass], int]:
    """ops/tvd.py: reads both and writes the gradient; the batch divides the sum outside. Its input came from a softmax."""
    one = tokens * vocab * 4
    return [Pass(0.0, 3 * one)], [Pass(0.0, 3 * one), *_log_softmax_back(one, vocab, cached_row)], 7 * one


def _log_softmax_back(one: int, vocab: int, cached_row: int) -> list[Pass]:
    """The backward of the log-softmax that made the input, and the sum with the gradient of the step before."""
    return [Pass(0.0, (3 if vocab * 4 <= cached_row else 4) * one), Pass(0.0, 3 * one)]


LOGIT_LOSSES = {"kl_div": kl_div, "jsd": jsd, "tvd": tvd}
LINEAR_LOSSES = {
    "fused_linear_jsd": fused_linear_jsd,
    "distill_jsd_loss": distill_jsd_loss,
    "linear_cross_entropy": linear_cross_entropy,
}
LIGER = {"kl_div": liger_kl_div, "jsd": liger_jsd, "tvd": liger_tvd}
EAGER = ("torch", "huggingface", "naive", "eager")
NOT_MODELLED = {
    ("fused_linear_jsd", "liger"): "many small kernels a chunk and a host wait: bound by launches, not by a roofline",
    ("distill_jsd_loss", "liger"): "torch.compile decides what is fused: the passes are not known from the source",
    ("linear_cross_entropy", "TRL chunked_nll (chunk 256)"): "32 chunks, nearly three times eager: not explained by its traffic",
    ("linear_cross_entropy", "liger FLCE"): "small chunks, over three times eager: not explained by its traffic",
    (
        "linear_cross_entropy",
        "bare head products forward+backward",
    ): "library products alone, of which the model is fitted to others",
}


@dataclass(frozen=True)
class Row:
    """A published figure beside the predicted one. Values in seconds or bytes; predicted is None where reason says why."""

    device: str
    kernel: str
    provider: str
    operation: str
    metric: str
    sizes: dict[str, int]
    published: float
    predicted: float | None
    reason: str = ""

    @property
    def eager(self) -> bool:
        return self.provider in EAGER

    @property
    def error(self) -> float:
        """Relative: |predicted - published| / published."""
        assert self.predicted is not None
        return abs(self.predicted - self.published) / self.published


def _sizes(record: dict[str, str]) -> dict[str, int]:
    """Tokens N, vocabulary V and, for losses from hidden states, the teacher's hidden size H."""
    config = json.loads(record["config"])
    known = {**config, record["x_name"]: int(record["x_value"])}
    sizes = {"N": known["BT"] if "BT" in known else known["B"] * known["T"], "V": known.get("V") or known["vocab_size"]}
    if "H" in known:
        sizes["H"] = known["H"]
    return sizes


def _model(kernel: str, provider: str, sizes: dict[str, int], on: Device) -> tuple[list[Pass], list[Pass], int]:
    if provider == "liger":
        return LIGER[kernel](sizes["N"], sizes["V"], on.cached_row)
    if kernel in LOGIT_LOSSES:
        return trace(lambda: LOGIT_LOSSES[kernel](sizes["N"], sizes["V"]), on.cached_row, retain=True)
    return trace(lambda: LINEAR_LOSSES[kernel](sizes["N"], sizes["V"], sizes["H"]), on.cached_row)


def row(record: dict[str, str]) -> Row:
    """The model's answer to one line of the file."""
    kernel, provider, operation, metric = (record[name] for name in ("kernel", "provider", "operation", "metric"))
    published = float(record["median"]) * UNITS[record["unit"]]
    reason = NOT_MODELLED.get((kernel, provider), "")
    predicted: float | None = None
    on = device(DEVICE_NAMES[record["device"]])
    sizes = _sizes(record)
    if not reason:
        forward, backward, peak = _model(kernel, provider, sizes, on)
        timed = {"forward": forward, "backward": backward, "full": [*forward, *backward]}[operation]
        predicted = float(peak) if metric == "memory" else seconds(timed, on)
    return Row(record["device"], kernel, provider, operation, metric, sizes, published, predicted, reason)


def rows(path: Path = PUBLISHED) -> list[Row]:
    """All lines of the file, modelled or with the reason why not."""
    with path.open(newline="") as file:
        return [row(record) for record in csv.DictReader(file)]


def median_error(found: Sequence[Row], metric: str, *, eager: bool = True) -> float:
    """Median relative error of the modelled rows of a metric ("speed" or "memory")."""
    return statistics.median(one.error for one in found if one.metric == metric and one.eager == eager and not one.reason)


def table(found: Sequence[Row]) -> str:
    """Plain text: every row, then the medians, then what is not modelled."""
    lines = [
        f"{'device':22} {'loss':20} {'provider':9} {'step':8} {'N':>6} {'V':>7} {'published':>14} {'predicted':>14}"
        "  predicted/published"
    ]
    for one in found:
        if one.predicted is None:
            continue
        unit, scale = ("ms", 1e-3) if one.metric == "speed" else ("MiB", 2**20)
        lines.append(
            f"{one.device:22} {one.kernel:20} {one.provider:9} {one.operation:8} {one.sizes['N']:6} {one.sizes['V']:7} "
            f"{one.published / scale:10.2f} {unit:3} {one.predicted / scale:10.2f} {unit:3}  {one.predicted / one.published:.2f}"
        )
    lines.append("")
    for eager, who in ((True, "eager PyTorch"), (False, "Liger's kernels")):
        for metric in ("speed", "memory"):
            count = sum(1 for one in found if one.metric == metric and one.eager == eager and not one.reason)
            error = median_error(found, metric, eager=eager)
            lines.append(f"median relative error of the predicted {metric}, {who}: {error:.1%} of {count} rows")
    worst = sorted((one for one in found if not one.reason), key=lambda one: one.error, reverse=True)
    lines.append("")
    lines.append("furthest off, one for each device, loss, provider and step:")
    shown: set[tuple[str, ...]] = set()
    for one in worst:
        key = (one.device, one.kernel, one.provider, one.operation, one.metric)
        if key not in shown and len(shown) < 8:
            shown.add(key)
            lines.append(f"  {one.error:6.1%}  {' '.join(key)}, N = {one.sizes['N']}, V = {one.sizes['V']}")
    lines.append("")
    lines.append("not modelled:")
    for (kernel, provider), reason in NOT_MODELLED.items():
        count = sum(1 for one in found if (one.kernel, one.provider) == (kernel, provider))
        lines.append(f"  {kernel}, {provider}, {count} rows: {reason}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--csv", type=Path, default=PUBLISHED, metavar="PATH", help="published figures (default: %(default)s)")
    path = parser.parse_args(argv).csv
    if not path.is_file():
        print(f"error: --csv {path} is not a file", file=sys.stderr)
        return 2
    print(table(rows(path)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
