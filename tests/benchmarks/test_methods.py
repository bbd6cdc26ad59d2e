"""The comparison of methods runs at a size that takes no time, does nothing twice, and chooses as it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import methods, plots
from benchmarks.methods import PLAN, SEARCH_SEED, Job, Results, jobs, measure
from benchmarks.methods_report import NARROW, WIDE, methods_table
from benchmarks.methods_runs import Bench, Plan, Windows, halves
from kdkernels.demo.settings import ModelSize
from kdkernels.errors import CommandError
from tests.support.demo import TINY

SMALL = Plan(
    settings=dataclasses.replace(TINY, student_steps=4, teacher_steps=4),
    students={WIDE: TINY.student, NARROW: ModelSize(width=24, layers=1, heads=2)},
    methods={
        name: {**options, **({"on_policy_max_new_tokens": 4} if "on_policy_max_new_tokens" in options else {})}
        for name, options in PLAN.methods.items()
    },
    steps=4,
    rates=(1e-3, 4e-3),
    seeds=2,
    timed_steps=2,
    rounds=2,
)
NAMES = tuple(SMALL.methods)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(SMALL, tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module")
def measured(bench: Bench) -> tuple[Path, dict[str, Any]]:
    path = bench.folder / "methods.json"
    return path, measure(bench, path, gaps=(WIDE,), seeds=1, names=NAMES, asked="a test")


def test_every_method_is_searched_for_run_and_timed(measured: tuple[Path, dict[str, Any]]) -> None:
    path, results = measured
    assert json.loads(path.read_text()) == results
    assert {name: list(losses) for name, losses in results["search"][WIDE].items()} == {key: ["0.001", "0.004"] for key in NAMES}
    runs = results["runs"][WIDE]
    assert {name: list(seeds) for name, seeds in runs.items()} == {key: ["0"] for key in NAMES}
    assert len({one["loss"] for seeds in runs.values() for one in seeds.values()}) == len(NAMES), "each makes another student"
    for one in [seeds["0"] for seeds in runs.values()]:
        assert all(0 <= one[share] <= 1 for share in ("accuracy", "ece", "rouge_l", "distinct"))
        assert one["teacher_loss"] > 0
    assert set(results["times"][WIDE]) == set(NAMES) - {"DistiLLM"}, "its steps are not alike"
    assert all(len(times["ratios"]) == SMALL.rounds and times["seconds"] > 0 for times in results["times"][WIDE].values())


def test_the_teacher_is_as_it_was_after_all_the_runs(bench: Bench, measured: tuple[Path, dict[str, Any]]) -> None:
    _, results = measured
    assert bench.judge.scores(bench.teacher, 0) == results["references"]["teacher"]
    assert not any("lora" in name for name, _ in bench.teacher.named_parameters())


def test_the_table_and_the_picture_are_drawn_from_a_part_of_the_runs(measured: tuple[Path, dict[str, Any]]) -> None:
    path, results = measured
    page = methods_table(results)
    assert f"Result of a test, with these seeds so far: 1 of 2 at {WIDE}, 0 of 2 at {NARROW}" in page
    assert all(f"| {name} |" in page for name in NAMES)
    assert "too few runs" in page
    assert plots.draw(path.parent) == [path.with_suffix(".png")]


def test_what_was_run_is_not_run_again(
    bench: Bench, measured: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.folder / "again.json"
    path.write_text(measured[0].read_text())
    ran: list[Job] = []

    def run(bench: Bench, results: Results, job: Job) -> dict[str, float]:
        saved = Results(path, SMALL, bench.corpus.facts)
        assert all(map(saved.has, ran)), "what is done is in the file"
        ran.append(job)
        return {"loss": 1.0}

    monkeypatch.setattr(methods, "run", run)
    measure(bench, path, gaps=(WIDE,), seeds=1, names=NAMES)
    assert ran == []
    measure(bench, path, gaps=(WIDE, NARROW), seeds=2, names=NAMES[:1])
    assert ran == [Job(WIDE, NAMES[0], 1), *(Job(NARROW, NAMES[0], SEARCH_SEED, rate) for rate in SMALL.rates)] + [
        Job(NARROW, NAMES[0], seed) for seed in (0, 1)
    ]
    ran.clear()
    measure(bench, path, gaps=(WIDE,), seeds=1, names=NAMES[1:2], fresh=True)
    assert ran == [*(Job(WIDE, NAMES[1], SEARCH_SEED, rate) for rate in SMALL.rates), Job(WIDE, NAMES[1], 0)]


def test_results_of_other_settings_are_put_aside(measured: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "methods.json"
    path.write_text(measured[0].read_text())
    corpus = measured[1]["corpus"]
    assert Results(path, SMALL, corpus).content["runs"] == measured[1]["runs"]
    assert Results(path, dataclasses.replace(SMALL, steps=5), corpus).content["runs"] == {}
    assert json.loads((tmp_path / "methods.old.json").read_text()) == measured[1]


def test_quick_is_the_first_part_of_the_whole() -> None:
    names = tuple(PLAN.methods)
    whole = list(jobs(PLAN, tuple(PLAN.students), PLAN.seeds, names))
    quick = list(jobs(PLAN, tuple(PLAN.students)[: methods.QUICK_GAPS], methods.QUICK_SEEDS, names))
    assert whole[: len(quick)] == quick
    assert len(set(whole)) == len(whole) == 2 * len(names) * (PLAN.seeds + len(PLAN.rates))
    first = [job for job in whole if job.rate is None][: len(names)]
    assert first == [Job(WIDE, name, 0) for name in names]
    assert all(job.seed == SEARCH_SEED for job in whole if job.rate is not None)
    assert SEARCH_SEED not in range(PLAN.seeds)


def test_a_run_takes_the_rate_of_the_lowest_validation_loss(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Made-up losses at each rate; the file's own figures come from another text."""
    rates: list[float] = []

    def further(start: Any, name: str, rate: float, seed: int, steps: int) -> Any:
        rates.append(rate)
        return start

    monkeypatch.setattr(bench, "further", further)
    monkeypatch.setattr(bench, "validation_loss", lambda model: {1e-3: 3.0, 4e-3: 2.0}[rates[-1]])
    results = Results(tmp_path / "methods.json", SMALL, bench.corpus.facts)
    for job in jobs(SMALL, (WIDE,), 1, NAMES[:1]):
        place, key = job.place(results.content)
        place[key] = methods.run(bench, results, job)["loss"]
    assert rates == [1e-3, 4e-3, 4e-3]


def test_runs_start_from_the_same_weights_and_leave_them(bench: Bench) -> None:
    one, same = bench.student(WIDE, 0), bench.student(WIDE, 0)
    other = bench.student(WIDE, 1)
    weights = {name: parameter.clone() for name, parameter in one.named_parameters()}
    assert all(torch.equal(parameter, weights[name]) for name, parameter in same.named_parameters())
    assert not all(torch.equal(parameter, weights[name]) for name, parameter in other.named_parameters())
    after = bench.further(one, "forward KL", 4e-3, 0, 2)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in one.named_parameters())
    assert not any(torch.equal(parameter, weights[name]) for name, parameter in after.named_parameters())


def test_what_is_chosen_by_and_what_is_judged_by_are_different_files(bench: Bench) -> None:
    corpus = dataclasses.replace(bench.corpus, heldout=torch.tensor([5, 6, 0, 7, 0, 8, 9, 9, 0], dtype=torch.int32))
    first, second = halves(corpus)
    assert first.heldout.tolist() == [5, 6, 0]
    assert second.heldout.tolist() == [7, 0, 8, 9, 9, 0]
    with pytest.raises(CommandError, match="one held-out file is too few"):
        halves(dataclasses.replace(bench.corpus, heldout=torch.tensor([5, 6, 7, 0], dtype=torch.int32)))


def test_the_students_of_the_gaps_have_an_eighth_and_a_third_of_the_teachers_parameters() -> None:
    from kdkernels.demo.models import build

    settings = PLAN.settings
    sizes = [settings.teacher, PLAN.students[WIDE], PLAN.students[NARROW]]
    teacher, wide, narrow = (build(size, settings.vocab, settings.window, 0).num_parameters() for size in sizes)
    assert teacher / wide == pytest.approx(8, rel=0.05)
    assert teacher / narrow == pytest.approx(3, rel=0.05)


def test_seeds_see_other_windows_and_methods_the_same() -> None:
    class Stream:
        def batch(self, settings: Any, stream: str, step: int) -> Any:
            return torch.full((2, 4), 10 * int(stream.split()[-1]) + step), None

    one, same, other = (list(Windows(Stream(), TINY, seed, 3)) for seed in (0, 0, 1))  # type: ignore[arg-type]
    assert len(one) == 6
    assert one == same != other
