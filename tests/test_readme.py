"""What the README shows runs, and its measured table is the one that the results file makes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import kdkernels as kd
from benchmarks import readme, roofline
from benchmarks.linear import RESULTS

TEXT = readme.README.read_text()


def test_the_tables_come_from_the_results_files() -> None:
    results = (json.loads(path.read_text()) for path in (RESULTS, readme.METHODS))
    assert readme.updated(TEXT, *results) == TEXT, "run python -m benchmarks.readme"


def test_the_two_sides_of_you_had_you_write_agree() -> None:
    had, write = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0].split("# You write:")
    torch.manual_seed(0)
    scope = {
        "torch": torch,
        "kd": kd,
        "student_head": torch.nn.Linear(8, 50, bias=False),
        "teacher_head": torch.nn.Linear(12, 50, bias=False).requires_grad_(False),
        "student_hidden": torch.randn(2, 5, 8),
        "teacher_hidden": torch.randn(2, 5, 12),
    }
    exec(had, scope)
    expected = scope["loss"]
    exec(write, scope)
    torch.testing.assert_close(scope["loss"], expected)


def test_the_complete_step_runs_and_learns() -> None:
    block = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    scope: dict[str, object] = {}
    exec(block, scope)
    schedule = scope["schedule"]
    assert isinstance(schedule, kd.TAIDSchedule)
    assert schedule.t.item() == pytest.approx(1.0)


def test_the_online_step_runs_and_both_models_learn() -> None:
    block = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[2]
    scope: dict[str, Any] = {}
    exec(block, scope)
    for first, last in zip(scope["losses"][0], scope["losses"][-1], strict=True):
        assert last < first
    assert scope["up"].weight.count_nonzero() > 0


def test_every_divergence_is_in_its_table() -> None:
    assert re.findall(r"^\| `(\w+)` \| (?=.*KL|½)", TEXT, re.MULTILINE) == list(kd.divergences())


def test_the_files_it_links_exist() -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (Path(readme.README).parent / link).exists(), link


def test_the_median_errors_of_the_roofline_are_what_its_command_prints() -> None:
    found = roofline.rows()
    shown = re.search(r"<!-- roofline -->(.*?)<!-- end -->", TEXT, re.DOTALL)
    assert shown is not None
    for eager, what in ((True, "eager rows"), (False, "rows of Liger's kernels")):
        counted = [row for row in found if row.metric == "speed" and row.eager == eager and not row.reason]
        assert (
            f"{roofline.median_error(found, 'speed', eager=eager):.1%} for the {len(counted)} {what}".replace("%", " %") in shown[1]
        )
