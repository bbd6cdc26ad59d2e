"""The kernel of whole rows: its tile, the dtypes that it writes, and rows that do not count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import reference
from kdkernels.backends.columns import ROW_COLUMNS
from tests.support.cases import NATIVE_DTYPES
from tests.support.kernels import CPU, EPS, VOCAB

pytest.importorskip("triton", reason="Triton is not installed")
from kdkernels.backends.triton import blocks, rows
from tests.support.interpreter import as_on_a_gpu
from tests.support.meter import metered


def row_arguments(x: Tensor, z: Tensor, weight: Tensor, labels: Tensor | None = None) -> tuple[Any, ...]:
    loss = ("jsd", 0.3, 2.0, 1.5, 0.5 if labels is not None else 0.0, [0.75, 30.0, 1.25, 0.0])
    return x, z, None, None, labels, weight, torch.tensor(0.7), *loss


@pytest.mark.parametrize(
    ("logits", "to", "width"),
    [
        (torch.float32, torch.bfloat16, 8),
        (torch.float32, torch.float32, 4),
        (torch.float32, None, 4),
        (torch.float16, torch.float16, 8),
        (torch.bfloat16, None, 8),
    ],
    ids=str,
)
def test_each_thread_takes_a_part_of_16_bytes(
    logits: torch.dtype, to: torch.dtype | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the narrowest tensor; of a part that two threads share, each sweep would shuffle the sums between them."""
    seen: list[dict[str, Any]] = []

    class Kernel:
        def __getitem__(self, _: Any) -> Callable[..., None]:
            return lambda *_, **keywords: seen.append(keywords)

    monkeypatch.setattr(rows, "row_loss_kernel", Kernel())
    x, z = torch.randn(2, 3, 96).to(logits)
    rows.row_loss(*row_arguments(x, z, torch.ones(3)), to is not None, False, None if to is None else torch.empty(3, 96, dtype=to))
    row = blocks.row_entry(CPU)
    assert seen[0]["WIDTH"] == width
    assert seen[0]["LANES"] * width == row.num_warps * 32 * row.entries
    # rows that start anywhere: a thread's part is one entry
    rows.row_loss(*row_arguments(*torch.randn(2, 3, 97).to(logits), torch.ones(3)), False, False)
    assert seen[1]["WIDTH"] == 1
    assert seen[1]["LANES"] == row.num_warps * 32 * rows.MOST_PARTS


class TestRows:
    def draw(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.randn(2, 5, VOCAB, generator=torch.Generator().manual_seed(0)) * 3)  # type: ignore[return-value]

    @pytest.mark.parametrize("to", NATIVE_DTYPES)
    @pytest.mark.parametrize("dtype", NATIVE_DTYPES)
    def test_gradients_can_go_to_another_tensor_of_another_dtype(self, dtype: torch.dtype, to: torch.dtype) -> None:
        x, z = (part.to(dtype) for part in self.draw())
        before, labels = x.clone(), torch.arange(5) * 30
        out = torch.full((5, VOCAB), torch.nan, dtype=to)
        wide = x.float().clone()
        with as_on_a_gpu():
            columns = rows.row_loss(*row_arguments(x, z, torch.ones(5), labels), True, True, out)
            right = rows.row_loss(*row_arguments(wide, z, torch.ones(5), labels), True, True)
        torch.testing.assert_close(x, before, rtol=0, atol=0)
        torch.testing.assert_close(columns, right, rtol=0, atol=0)
        torch.testing.assert_close(out, wide.to(to), rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["forward_kl", "jsd"])
    @pytest.mark.parametrize("metrics", [False, True])
    def test_rows_of_weight_zero_write_zeros_and_are_not_read(self, metrics: bool, name: str) -> None:
        x, z = self.draw()
        weight = torch.tensor([1.0, 0.0, 2.0, 0.0, -0.0])
        live, labels = weight != 0, torch.arange(5) * 30
        with as_on_a_gpu():
            kept = x[live].clone()
            arguments = list(row_arguments(kept, z[live], weight[live], labels[live]))
            arguments[7] = name
            with metered() as alone:
                right = rows.row_loss(*arguments, True, metrics)
            x[~live], z[~live] = torch.nan, torch.inf
            arguments[:2], arguments[4:6] = (x, z), (labels, weight)
            with metered() as meter:
                columns = rows.row_loss(*arguments, True, metrics)
        assert (x[~live] == 0).all()
        assert (columns[~live] == 0).all()
        torch.testing.assert_close(x[live], kept, rtol=0, atol=0)
        torch.testing.assert_close(columns[live], right, rtol=0, atol=0)
        per_row = meter.loaded.total() - alone.loaded.total()
        assert per_row <= 3 * (4 + 4 + 8), "of a dropped row its weight, its label and t are read, and no logit"

    @pytest.mark.parametrize("name", kd.divergences())
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_a_bad_target_makes_the_whole_gradient_nan(self, bad: float, name: str) -> None:
        """A slope that only compares would hide it."""
        x, z = self.draw()
        z[1, 140] = bad
        arguments = list(row_arguments(x, z, torch.ones(5)))
        arguments[7], arguments[-1] = name, [1.0, 0.0, 1.0, 0.0]
        with as_on_a_gpu():
            columns = rows.row_loss(*arguments, True, False)
        assert columns[:, 0].isnan().tolist() == x.isnan().all(1).tolist() == [False, True, False, False, False]
        assert not x[[0, 2, 3, 4]].isnan().any()

    def test_no_rows_are_no_launch(self) -> None:
        with as_on_a_gpu():
            columns = rows.row_loss(*row_arguments(torch.empty(0, 37), torch.empty(0, 37), torch.empty(0)), True, False)
        assert columns.shape == (0, len(ROW_COLUMNS))

    @pytest.mark.parametrize("metrics", [False, True])
    @pytest.mark.parametrize("banned", ["student", "teacher", "both"])
    def test_the_slope_of_forward_kl_sums_to_what_the_student_alone_bans(self, banned: str, metrics: bool) -> None:
        """Tokens of which the teacher is nearly sure; a whole part of a row among them, and an entry that comes last."""
        x, z = self.draw()
        places = torch.zeros(5, VOCAB, dtype=torch.bool)
        places[1, :40] = places[2, 3] = places[3, -1] = True
        z[1:4][places[1:4]] += 8.0
        for side in {"student": (x,), "teacher": (z,)}.get(banned, (x, z)):
            side[places] = -torch.inf
        arguments = list(row_arguments(x.clone(), z, torch.linspace(-1, 2, 5)))
        arguments[6:8], arguments[-1] = (torch.tensor(1.0), "forward_kl"), [1.0, 0.0, 1.0, 0.0]
        double = [part.double() if isinstance(part, Tensor) else part for part in arguments]
        right = reference.row_loss(*double, True, True)
        arguments[0] = x
        with as_on_a_gpu(row=32):
            columns = rows.row_loss(*arguments, True, metrics)
        found = slice(None) if metrics else slice(0, 2)
        torch.testing.assert_close(columns[:, found].double(), right[:, found].double(), rtol=VOCAB * EPS, atol=VOCAB * EPS)
        torch.testing.assert_close(x.double(), double[0], rtol=0, atol=VOCAB * EPS)

    @pytest.mark.parametrize("row", [32, 256])
    @pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
    def test_every_size_of_tile(self, name: str, row: int) -> None:
        x, z = self.draw()
        arguments = list(row_arguments(x.clone(), z, torch.linspace(-1, 2, 5), torch.arange(5) * 30))
        arguments[7] = name
        right = reference.row_loss(*arguments, True, True)
        dx = arguments[0]
        arguments[0] = x
        with as_on_a_gpu(row=row):
            columns = rows.row_loss(*arguments, True, True)
        torch.testing.assert_close(columns, right, rtol=VOCAB * EPS, atol=VOCAB * EPS)
        torch.testing.assert_close(x, dx, rtol=0, atol=VOCAB * EPS * dx.abs().max().item())
