"""The comparison of methods runs at a size that takes no time, and its results are what they say they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import methods, plots
from benchmarks.methods import RUNS, Windows, held_out, measure
from tests.cli.test_demo import TINY


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("methods")
    quick = {**RUNS["GKD"], "on_policy_max_new_tokens": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNS, "GKD", quick)
        return place, measure(TINY, place, place / "methods.json", steps=8, seeds=2, names=tuple(RUNS))


def test_every_method_runs_for_every_seed(measured: tuple[Path, dict[str, Any]]) -> None:
    place, results = measured
    assert json.loads((place / "methods.json").read_text()) == results
    losses = {name: [one["loss"] for one in seeds.values()] for name, seeds in results["runs"].items()}
    assert {name: len(found) for name, found in losses.items()} == dict.fromkeys(RUNS, 2)
    # each method makes another student, and each seed
    assert len({loss for found in losses.values() for loss in found}) == 2 * len(RUNS)
    for seeds in results["runs"].values():
        for one in seeds.values():
            assert 0 <= one["accuracy"] <= 1
            assert one["seconds_per_step"] > 0


def test_what_was_measured_is_not_measured_again(measured: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    place, results = measured
    ran = []

    def run(name: str, seed: int, *_: Any) -> dict[str, float]:
        ran.append((name, seed))
        return {"loss": 1.0, "error": 0.1, "accuracy": 0.5, "seconds_per_step": 0.1}

    monkeypatch.setattr(methods, "run", run)
    monkeypatch.setitem(RUNS, "GKD", results["settings"]["GKD"])
    path = place / "again.json"
    path.write_text((place / "methods.json").read_text())
    measure(TINY, place, path, steps=8, seeds=2, names=tuple(RUNS))
    assert ran == []
    measure(TINY, place, path, steps=8, seeds=2, names=("TAID",), fresh=True)
    assert ran == [("TAID", 0), ("TAID", 1)]
    ran.clear()
    measure(TINY, place, path, steps=9, seeds=1, names=tuple(RUNS))  # other settings: nothing of before holds
    assert ran == [(name, 0) for name in RUNS]


def test_the_plot_is_drawn_from_the_results(measured: tuple[Path, dict[str, Any]]) -> None:
    place, results = measured
    assert plots.draw(place) == [place / "methods.png"]
    drawn = plots.methods(results)
    shown = [float(value) for line in drawn.axes[0].get_lines() if line.get_marker() == "o" for value in line.get_xdata()]
    plots.plt.close(drawn)
    assert shown == [one["loss"] for seeds in results["runs"].values() for one in seeds.values()]


def test_seeds_see_other_windows_and_methods_the_same() -> None:
    class Stream:
        def batch(self, settings: Any, stream: str, step: int) -> Any:
            return torch.full((2, 4), 10 * int(stream.split()[-1]) + step), None

    one, same, other = (list(Windows(Stream(), TINY, seed, 3)) for seed in (0, 0, 1))  # type: ignore[arg-type]
    assert len(one) == 6
    assert one == same != other


def test_held_out_loss_and_accuracy_are_those_of_whole_logits() -> None:
    from kdkernels.demo.models import build

    model = build(TINY.student, 50, 8, 0)
    inputs, labels = torch.randint(50, (5, 8)), torch.randint(50, (5, 8))
    logits = model(input_ids=inputs).logits.detach().double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    found = held_out(model, inputs, labels)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
