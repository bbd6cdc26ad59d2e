"""The bytes of Liger's loss and of ours: by its source, by the closed forms, and as recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import traffic
from benchmarks.cases import DTYPES, Case
from tests.support.meter import Meter

pytest.importorskip("triton")


def _case(*shape: int, dtype: str = "fp32") -> Case:
    (case,) = (case for case in traffic.cases([shape]) if case.dtype == dtype)
    return case


def _liger(case: Case) -> Meter:
    pytest.importorskip("liger_kernel", reason="pip install --no-deps liger-kernel==0.8.5")
    return traffic.liger_fused_linear_jsd(case)


@pytest.mark.parametrize("dtype", traffic.COUNTED)
def test_ligers_bytes_are_those_of_its_source(dtype: str) -> None:
    tokens, vocab, student, teacher, size = 48, 256, 16, 24, DTYPES[dtype].itemsize
    meter = _liger(_case(tokens, vocab, student, teacher, dtype=dtype))
    logits, chunk = tokens * vocab, 4  # the power of 2 from tokens * student / vocab up
    # log q and log p in, losses and slopes out
    assert (meter.kinds["kernel"], meter.kinds["kernel operands"]) == (logits * 16, 0)
    assert meter.loaded["_jsd_kernel"] == meter.stored["_jsd_kernel"] == logits * 8
    # x and z out in float32, dx in twice
    assert meter.kinds["product logits"] == logits * (8 + 2 * size)
    # every chunk: the student's head twice, the teacher's once, its dW in and out; hidden states three times, the teacher's once
    heads, hiddens = vocab * (4 * student + teacher), tokens * (3 * student + teacher)
    # gradients filled with zeros, dH copied into its place
    gradients = vocab * student + 3 * tokens * student
    assert meter.kinds["product"] == size * (heads * tokens // chunk + hiddens + gradients)
    # 80 bytes for each logit, 6 more to round dx
    passes = logits * (80 + (4 + size if size < 4 else 0))
    few = meter.kinds["operator"] - passes
    assert 0 <= few < 64 * tokens  # sums of rows, the loss


def test_liger_and_the_eager_loss_give_the_same_gradients() -> None:
    """What is compared is the same loss, and metering does not change it."""
    seen: list[tuple[Tensor, ...]] = []
    operands = traffic._operands

    def kept(case: Case) -> tuple[Tensor, ...]:
        seen.append(operands(case))
        return seen[-1]

    with mock.patch.object(traffic, "_operands", kept):
        _liger(_case(12, 64, 8, 12))
        traffic.eager_jsd(_case(12, 64, 8, 12))
    for fused, eager in zip(seen[0][:2], seen[1][:2], strict=True):
        torch.testing.assert_close(fused.grad, eager.grad)


def test_without_liger_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("liger_kernel")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match="pip install --no-deps liger-kernel"):
        traffic.liger_fused_linear_jsd(_case(4, 32, 4, 4))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A command that measures eager and something that is not there, at one small shape."""
    monkeypatch.setattr(
        traffic, "MEASURED", {"eager JSD": traffic.eager_jsd, traffic.LIGER: mock.Mock(side_effect=ImportError("no x"))}
    )
    monkeypatch.setattr(traffic, "SHAPES", ((8, 32, 4, 4),))
    monkeypatch.setattr(traffic, "RESULTS", tmp_path / "traffic.json")
    return tmp_path / "traffic.json"


def test_the_command_writes_bytes_for_each_token_and_logit(small: Path) -> None:
    assert traffic.main([]) == 0
    cases = json.loads(small.read_text())["cases"]
    result = cases["eager JSD fp32 N=8 V=32 D=4,4"]
    assert result["bytes_per_logit"]["product logits"] == 16  # x, z, and dx twice
    assert result["bytes_per_token"]["operator"] == 32 * result["bytes_per_logit"]["operator"]
    assert result["least_possible_bytes_per_logit"] == 4 * 7
    assert cases[f"{traffic.LIGER} bf16 N=8 V=32 D=4,4"] == {"failed": "no x"}


def test_a_quick_run_shows_what_is_recorded_where_liger_is_missing(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = _case(8, 32, 4, 4, dtype="bf16")
    recorded = traffic.summary(traffic.LIGER, case, traffic.eager_jsd(case))
    content = {"versions": {"liger-kernel": "0.8.5"}, "cases": {f"{traffic.LIGER} bf16 N=8 V=32 D=4,4": recorded}}
    small.write_text(json.dumps(content))
    assert traffic.main(["--quick"]) == 0
    assert json.loads(small.read_text()) == content
    shown = capsys.readouterr().out
    assert f"{traffic.LIGER} (recorded, liger-kernel 0.8.5)" in shown
    assert f"{traffic.LIGER}: not measured" in shown  # fp32 is not recorded
    assert "not measured here: no x" in shown
    assert "eager JSD (measured)" in shown


@pytest.mark.parametrize("dtype", traffic.COUNTED)
def test_ours_is_close_to_the_least_possible(dtype: str) -> None:
    """JSD takes one sweep of the logits more than a divergence whose value needs no log-sum-exps first, and each sweep reads."""
    tokens, vocab, size = 64, 1024, DTYPES[dtype].itemsize
    logits = tokens * vocab
    chunked, streamed = (traffic.ours(strategy, _case(tokens, vocab, 32, 48, dtype=dtype)) for strategy in ("tokens", "vocab"))
    # x and z out in float32, dx in twice; the row kernel sweeps both three times
    assert chunked.kinds["product logits"] == logits * (8 + 2 * size)
    assert chunked.kinds["kernel"] == pytest.approx(logits * (3 * 8 + size), rel=0.01)
    assert chunked.kinds["kernel operands"] == 0
    assert streamed.kinds["product logits"] == logits * 2 * size
    assert streamed.stored["gradient_kernel"] == logits * size
    assert streamed.kinds["kernel operands"] > 0
    for meter, name in ((chunked, "kdkernels tokens"), (streamed, "kdkernels vocab")):
        assert meter.total(*traffic.LOGIT_TRAFFIC) >= logits * traffic.least_possible(name, DTYPES[dtype])
    # The columns of rows, weights and losses: a few numbers for each token.
    assert chunked.kinds["operator"] < 128 * tokens


def test_the_recorded_results_are_of_the_same_shapes_and_definitions() -> None:
    """benchmarks/results/traffic.json is made again whenever what is measured changes."""
    results = json.loads(traffic.RESULTS.read_text())
    assert set(results["cases"]) == {
        traffic.called(case, name) for name in traffic.MEASURED for case in traffic.cases(traffic.SHAPES)
    }
    for case, found in results["cases"].items():
        assert set(found["bytes_per_token"]) == set(traffic.KINDS), case
        assert found["logit_traffic_bytes_per_token"] > 0
    assert results["meanings"] == traffic.MEANINGS
