"""What a type checker and a prompt show: the types that calls have, the names that are accepted, and reprs that can be read."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import kdkernels as kd
import kdkernels.transformers
from kdkernels.divergences import DivergenceName
from kdkernels.engine import outcomes
from kdkernels.engine.cut import STRATEGIES
from kdkernels.losses import signatures, tokens
from tests.support import ROOT

LOSSES = {
    kd.kd_loss: signatures.LogitsOptions,
    kd.linear_kd_loss: signatures.LinearOptions,
    kd.linear_topk_kd_loss: signatures.TopKOptions,
    kd.linear_okd_loss: signatures.OKDOptions,
}
# Each line with what mypy says of it: a type that is revealed, or a part of an error.
SNIPPET = """
import torch
from torch import Tensor
import kdkernels as kd
x, z, ids = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
flag: bool = bool(x.sum() > 0)
reveal_type(kd.kd_loss(x, z))  # Tensor
reveal_type(kd.kd_loss(x, z, return_metrics=False))  # Tensor
reveal_type(kd.kd_loss(x, z, t=0.5, return_metrics=True))  # tuple[Tensor, dict[str, Tensor]]
reveal_type(kd.kd_loss(x, z, return_metrics=flag))  # Tensor | tuple[Tensor, dict[str, Tensor]]
reveal_type(kd.linear_kd_loss(x, z, x, kd.LMHead(z), divergence="jsd", strategy="vocab", reduction="none"))  # Tensor
reveal_type(kd.linear_kd_loss(x, z, x, z, ids, divergence=kd.jsd(0.3), return_metrics=True)[1]["kd"])  # Tensor
reveal_type(kd.linear_topk_kd_loss(x, z, ids, x, tail="bucket"))  # Tensor
reveal_type(kd.linear_topk_kd_loss(x, z, ids, x, return_metrics=True))  # tuple[Tensor, dict[str, Tensor]]
reveal_type(kd.linear_okd_loss(x, z, x, z, ids).student)  # Tensor
reveal_type(kd.linear_okd_loss(x, z, x, z, ids).metrics)  # None
reveal_type(kd.linear_okd_loss(x, z, x, z, ids, return_metrics=True).metrics)  # dict[str, Tensor]
reveal_type(kd.linear_okd_loss(x, z, x, z, ids, return_metrics=flag).metrics)  # dict[str, Tensor] | None
reveal_type(kd.LinearKDLoss(divergence="jsd")(x, z, x, z))  # Tensor
reveal_type(kd.LinearKDLoss(return_metrics=True)(x, z, x, z, t=0.5))  # tuple[Tensor, dict[str, Tensor]]
reveal_type(kd.LinearKDLoss()(x, z, x, z, return_metrics=True))  # Tensor | tuple[Tensor, dict[str, Tensor]]
reveal_type([kd.kd_loss(x, z, divergence=name) for name in kd.divergences()])  # list[Tensor]
reveal_type(kd.plan(1, 2, 3, 4).seconds)  # float | None
reveal_type(kd.transformers.lm_head(x))  # kdkernels.losses.head.LMHead
reveal_type([kd.total_variation(), kd.jsd(0.3)])  # list[kdkernels.divergences.Divergence]
kd.hellinger()  # error: Module has no attribute "hellinger"
kd.kd_loss(x, z, divergence="forwardkl")  # error: No overload variant
kd.kd_loss(x, z, reduction="batchmean")  # error: No overload variant
kd.kd_loss(x, z, temprature=2.0)  # error: No overload variant
kd.kd_loss(x, z, strategy="auto")  # error: No overload variant
kd.linear_kd_loss(x, z, x, z, strategy="fast")  # error: No overload variant
kd.linear_kd_loss(x, torch.nn.Linear(3, 3), x, z)  # error: No overload variant
kd.linear_topk_kd_loss(x, z, ids, x, tail="rest")  # error: No overload variant
kd.linear_okd_loss(x, z, x, z, ids, t=0.5)  # error: No overload variant
kd.LinearKDLoss(divergence="forwardkl")  # error: No overload variant
kd.plan(1, 2, 3, 4, strategy="fast")  # error: Argument "strategy" to "plan" has incompatible type
""".strip().splitlines()


def test_mypy_sees_what_a_call_returns_and_which_names_are_wrong(tmp_path: Path) -> None:
    file = tmp_path / "snippet.py"
    file.write_text("\n".join(SNIPPET))
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", str(file)]  # with the settings and the cache of lint
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout
    said: dict[int, str] = {}
    for line in printed.splitlines():
        if found := re.match(r".*snippet\.py:(\d+): (?:error: (.*)|note: Revealed type is \"(.*)\")$", line):
            said[int(found[1])] = f"error: {found[2]}" if found[2] else re.sub(r"torch\.(_tensor\.)?|builtins\.", "", found[3])
    for number, line in enumerate(SNIPPET, 1):
        expected = line.partition("  # ")[2]
        got = said.get(number, "")
        assert expected in got if expected.startswith("error") else got == expected, f"{line}\nmypy: {got}\n{printed[:2000]}"


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(kd.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_the_keywords_for_type_checkers_are_those_of_the_signature(loss: Any) -> None:
    parameters = inspect.signature(loss).parameters.values()
    keywords = {one.name for one in parameters if one.kind == inspect.Parameter.KEYWORD_ONLY}
    assert LOSSES[loss].__annotations__.keys() | {"return_metrics"} == keywords
    assert all(one.default is not inspect.Parameter.empty for one in parameters if one.name in keywords)


def test_the_names_for_type_checkers_are_those_that_are_accepted() -> None:
    assert get_args(DivergenceName) == kd.divergences()
    assert get_args(signatures.Reduction) == tokens.REDUCTIONS
    assert get_args(signatures.Strategy) == STRATEGIES
    assert set(get_args(signatures.Tail)) == set(outcomes.TAILS)


@pytest.mark.parametrize("module", [kd, kdkernels.transformers], ids=["kdkernels", "kdkernels.transformers"])
def test_dir_lists_every_public_name(module: Any) -> None:
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_a_plan_is_shown_in_units_that_can_be_read() -> None:
    large = kd.plan(8192, 151_936, 896, 3584, torch.bfloat16, device="H100", strategy="vocab", memory_budget=2**29)
    assert re.fullmatch(
        r"Plan\('vocab', \d+ x [\d,]+ columns: peak [\d,]+ MiB, scratch [\d,]+ MiB, [\d,]+ GFLOP, [\d.,]+ ms; "
        r"eager: peak [\d,]+ MiB, scratch [\d,]+ MiB, [\d,]+ GFLOP, [\d.,]+ ms\)",
        repr(large),
    ), repr(large)
    assert f"{large.peak_bytes / 2**20:,.0f} MiB" in str(large)
    small = kd.plan(8, 100, 4, 4)
    assert repr(small).startswith("Plan('tokens', 1 x 8 tokens: peak 0.0")


def test_a_loss_of_both_models_is_a_tuple_with_names() -> None:
    student, teacher = torch.zeros(()), torch.ones(())
    both = kd.OKDLoss(student, teacher)
    assert tuple(both) == (both.student, both.teacher) == (student, teacher)
    assert both.metrics is None
    assert kd.OKDLoss(student, teacher, {"kd": student}).metrics == {"kd": student}
