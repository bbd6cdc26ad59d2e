"""The pictures show what the result files hold: every figure at its place, every failure as a mark."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

import matplotlib.image
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import drawing, plots
from benchmarks.cases import GIB, MIB

MACHINE = {"processor": "a processor", "threads": 2, "torch": "2.13.0", "date": "2026-11-24", "instruction_sets": ["avx512"]}
RATIOS = {
    "tokens": 1.04,
    "vocab": 1.5,
    "eager": 1.7,
    "compiled": 1.2,
    "checkpointed": 2.3,
    "liger": 2.9,
    "liger compiled": 1.25,
    "trl": 3.0,
}
HEADS = {
    "qwen2.5": (151_936, 896, 1536, 256),
    "llama3.2": (128_256, 2048, 3072, 128),
    "gemma3": (262_144, 1152, 2560, 128),
    "32k": (32_000, 512, 1024, 512),
}


def compare_results() -> dict[str, Any]:
    """Every loss at the 32k head, forward KL alone at the others, bfloat16 at one; no TAID from Liger and TRL, and a failure."""
    rows = []
    for at, (head, (vocab, student_dim, teacher_dim, tokens)) in enumerate(HEADS.items()):
        for loss in ("forward_kl", "reverse_kl", "jsd", "taid") if head == "32k" else ("forward_kl",):
            for dtype in ("fp32", "bf16") if head == "qwen2.5" else ("fp32",):
                for masked in (False, True) if head in ("qwen2.5", "32k") else (False,):
                    for contender, ratio in RATIOS.items():
                        row = {
                            "part": "heads",
                            "head": head,
                            "loss": loss,
                            "masked": masked,
                            "contender": contender,
                            "dtype": dtype,
                        }
                        row |= {"tokens": tokens, "vocab": vocab, "student_dim": student_dim, "teacher_dim": teacher_dim}
                        middle = ratio * (1 + 0.05 * at) * (1.8 if dtype == "bf16" and ratio > 1.6 else 1) * (1.1 if masked else 1)
                        if loss == "taid" and contender.startswith(("liger", "trl")):
                            row["skipped"] = f"{contender} has no TAID"
                        elif head == "gemma3" and contender == "trl":
                            row["failed"] = "not done after 1200 s"
                        else:
                            row |= {"ratio": middle, "ratios": [0.97 * middle, middle, 1.06 * middle], "peak_bytes": 500 * MIB}
                        rows.append(row)
    return {"machine": MACHINE, "rows": rows}


def growth_results() -> dict[str, Any]:
    """Constant ratios and scratch for ours, memory that grows for the others, eager out of memory at both ends."""
    rows = []
    points = [("tokens", tokens, 32_000) for tokens in (256, 1024, 4096, 16_384)]
    points += [("vocab", 1024, vocab) for vocab in (16_384, 65_536, 262_144)]
    for sweep, tokens, vocab in points:
        for at, (contender, ratio) in enumerate(RATIOS.items()):
            row = {"part": sweep, "head": "narrow", "loss": "forward_kl", "masked": False, "contender": contender, "dtype": "fp32"}
            row |= {"tokens": tokens, "vocab": vocab, "student_dim": 256, "teacher_dim": 512}
            if contender == "eager" and tokens * vocab > 2e8:
                row["failed"] = "RuntimeError: DefaultCPUAllocator: can't allocate memory"
            else:
                scratch = 512 * MIB if at < 2 else tokens * vocab * 4 * (7 - at if at < 4 else 2)
                row |= {"ratio": ratio, "ratios": [ratio, 1.1 * ratio], "peak_bytes": scratch + 40 * MIB}
            rows.append(row)
    return {"machine": MACHINE, "rows": rows}


def limits_results() -> dict[str, Any]:
    """As benchmarks.limits writes them: two strategies that stay flat, two others that meet the limit."""
    rows: list[dict[str, Any]] = []
    points = [("tokens", tokens, 262_144) for tokens in (1024, 2048, 4096, 8192, 16_384, 32_768)]
    points += [("vocab", 8192, vocab) for vocab in (16_384, 32_768, 65_536, 131_072, 262_144)]
    copies = {"tokens": 0, "vocab": 0, "eager": 7, "compiled": 2}
    failed: set[tuple[str, str]] = set()
    for sweep, tokens, vocab in points:
        for contender, copy in copies.items():
            row = {"part": sweep, "contender": contender, "dtype": "fp32", "tokens": tokens, "vocab": vocab, "limit": 8 * GIB}
            row |= {"student_dim": 16, "teacher_dim": 32}
            peak = copy * tokens * vocab * 4 if copy else 520 * MIB + tokens * (40 if contender == "vocab" else 900)
            if contender != "compiled":
                row["planned_peak_bytes"] = 5 * tokens * vocab * 4 if copy else int(0.98 * peak)
            if (sweep, contender) in failed:
                row["skipped"] = "not run"
            elif peak > 7.5 * GIB:
                failed.add((sweep, contender))
                row["failed"] = "RuntimeError: DefaultCPUAllocator: can't allocate memory"
            else:
                row["peak_bytes"] = peak
            rows.append(row)
    for name, scale in (("fp32 forward_kl", 1.0), ("fp32 jsd", 0.8), ("bf16 forward_kl", 1.6)):
        dtype, loss = name.split()
        case = {"part": "break-even", "contender": "tokens", "dtype": dtype, "loss": loss}
        case |= {"tokens": 1024, "vocab": 32_768, "student_dim": 512, "teacher_dim": 1024}
        for budget in (1, 2, 4, 8, 16, 32, 64):
            ratio = scale * (0.6 + 4.0 / budget)
            plans = {"planned_seconds": 1.1 * ratio, "planned_yardstick_seconds": 1.0, "auto": "vocab" if ratio > 1.2 else "tokens"}
            ratios = [0.95 * ratio, ratio, 1.04 * ratio]
            rows.append({**case, "budget": budget * MIB, "ratio": ratio, "ratios": ratios, **plans})
    return {"machine": MACHINE, "rows": rows}


def methods_results() -> dict[str, Any]:
    """Three seeds at the wider gap, one at the other, of four methods; OKD takes 1.5 times forward KL's time, and GKD 2."""
    levels = {"cross-entropy": 4.6, "forward KL": 4.5, "TAID": 4.48, "OKD": 4.55, "GKD": 4.7}
    ratios = {"cross-entropy": 1.0, "forward KL": 1.0, "TAID": 1.1, "OKD": 1.5, "GKD": 2.0}

    def figures(loss: float, seed: int) -> dict[str, float]:
        loss += seed / 50
        return {
            "loss": loss,
            "accuracy": 1 / loss,
            "ece": loss / 100,
            "teacher_loss": 1.1 * loss,
            "rouge_l": 0.9 / loss,
            "distinct": 0.9,
        }

    def seeds(gap: str) -> range:
        return range(3 if gap == "8:1" else 1)

    gaps = ("8:1", "3:1")
    return {
        "machine": MACHINE,
        "asked": "a test",
        "plan": {
            "seeds": 5,
            "steps": 300,
            "rates": [0.001, 0.002, 0.004],
            "students": {key: {} for key in gaps},
            "methods": {key: {} for key in levels},
            "settings": {"teacher_steps": 3000, "student_steps": 1000, "batch": 4, "window": 128},
        },
        "corpus": {"train_tokens": 4_000_000, "vocab": 4096},
        "parameters": {"teacher": 1_000_000, "8:1": 125_000, "3:1": 333_333},
        "references": {"teacher": figures(4.0, 0), "text": {"teacher_loss": 4.2, "rouge_l": 1.0, "distinct": 0.9}},
        "before": {gap: {str(seed): figures(4.7, seed) for seed in seeds(gap)} for gap in gaps},
        "search": {gap: {name: {"0.001": 4.8, "0.002": 4.7, "0.004": 4.9} for name in levels} for gap in gaps},
        "times": {"8:1": {name: {"seconds": 0.06 * one, "ratios": [one] * 3} for name, one in ratios.items()}},
        "runs": {
            gap: {name: {str(seed): figures(one, seed) for seed in seeds(gap)} for name, one in levels.items()} for gap in gaps
        },
    }


def training_results() -> dict[str, Any]:
    """Two loops whose memory is flat, one that fails from 2,048 tokens on, and one that never ran."""
    rows: list[dict[str, Any]] = []
    for contender, copies in (("KDTrainer", 0), ("TRL GKD, patched", 0), ("TRL GKD", 8), ("TRL GKD, use_liger_kernel", 99)):
        for tokens in (256, 512, 1024, 2048, 4096):
            row = {"part": "tokens", "contender": contender, "dtype": "fp32", "tokens": tokens, "vocab": 151_936}
            scratch = 400 * MIB + copies * tokens * 151_936 * 4
            if scratch > 8 * GIB:
                row["failed"] = "RuntimeError: DefaultCPUAllocator: can't allocate memory"
            else:
                row |= {"seconds": tokens / (900 + copies), "peak_bytes": scratch + 150 * MIB, "returned_bytes": 150 * MIB}
            rows.append(row)
    return {"machine": MACHINE, "rows": rows}


MADE_UP = {
    "compare": compare_results,
    "growth": growth_results,
    "limits": limits_results,
    "methods": methods_results,
    "training": training_results,
}


@pytest.fixture(autouse=True)
def _close() -> Any:
    yield
    plt.close("all")


def points(axes: Axes, colour: str, marker: str) -> list[tuple[float, float]]:
    """Where the lines of that colour and marker go through."""
    return [
        (float(x), float(y))
        for line in axes.get_lines()
        if (line.get_color(), line.get_marker()) == (colour, marker)
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(plt.Text))


@pytest.mark.parametrize("name", plots.PICTURES)
def test_a_picture_says_where_and_when_it_was_measured(name: str) -> None:
    shown = texts(plots.PICTURES[name](MADE_UP[name]()))
    for fact in ("a processor", "2 threads", "torch 2.13.0", "2026-11-24"):
        assert fact in shown


@pytest.mark.parametrize("name", plots.PICTURES)
def test_nothing_lies_outside_of_the_picture_or_over_something_else(name: str) -> None:
    """No text leaves the figure, the legend covers no panel, and no title another."""
    with plt.rc_context(drawing.RC):
        figure = plots.PICTURES[name](MADE_UP[name]())
        figure.draw_without_rendering()
        needed, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(needed.x0, needed.y0) >= 0
        assert needed.x1 <= width
        assert needed.y1 <= height
        for legend in figure.legends:
            assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)
        titles = [axes.title for axes in figure.axes] + [axes._left_title for axes in figure.axes]
        boxes = [title.get_window_extent() for title in titles if title.get_text()]
        assert not any(one.overlaps(two) for at, one in enumerate(boxes) for two in boxes[:at])


def test_each_ratio_is_drawn_once_and_each_failure_is_a_word() -> None:
    results = compare_results()
    figure = plots.compare(results)
    drawn = [float(line.get_xdata()[0]) for axes in figure.axes for line in axes.get_lines() if line.get_marker() == "o"]
    assert sorted(drawn) == sorted(row["ratio"] for row in results["rows"] if "ratio" in row)
    shown = texts(figure)
    assert shown.count("failed") == 1
    assert shown.count("not offered") == 3  # the masked steps beside them have the same reason
    assert len(figure.axes) == len({(row["loss"], row["head"]) for row in results["rows"]}) + 1, "7 panels in rows of 4"


@pytest.mark.parametrize(("picture", "rows"), [("compare", compare_results), ("growth", growth_results)])
def test_who_is_skipped_everywhere_has_no_place(picture: str, rows: Any) -> None:
    results = rows()
    facts = {key: value for key, value in results["rows"][0].items() if key not in ("ratio", "ratios", "peak_bytes", "failed")}
    results["rows"].insert(0, facts | {"contender": "fla", "skipped": "its kernels are Triton's alone"})
    before, after = (plots.PICTURES[picture](shown) for shown in (rows(), results))
    assert texts(after) == texts(before)
    assert len(after.axes[0].get_lines()) == len(before.axes[0].get_lines())


def test_growth_has_each_figure_at_its_size_and_a_cross_for_each_failure() -> None:
    results = growth_results()
    figure = plots.growth(results)
    time, memory = figure.axes[0], figure.axes[2]
    assert points(time, drawing.BLUE, "o") == [(tokens, 1.04) for tokens in (256, 1024, 4096, 16_384)]
    assert points(memory, drawing.ORANGE, "D") == [
        (tokens, tokens * 32_000 * 4 * 4 + 40 * MIB) for tokens in (256, 1024, 4096, 16_384)
    ]
    assert [x for x, _ in points(time, drawing.VERMILION, "x")] == [16_384]
    assert [x for x, _ in points(figure.axes[1], drawing.VERMILION, "x")] == [262_144]
    labels = [label.get_text() for label in memory.get_xticklabels()]
    assert labels == ["256", "1,024", "4,096", "16,384"]


def test_who_meets_the_limit_is_a_cross_on_its_line() -> None:
    figure = plots.limits(limits_results())
    against_tokens, against_vocab, break_even = figure.axes
    assert points(against_tokens, drawing.VERMILION, "x") == [(2048, 8 * GIB)]
    assert points(against_tokens, drawing.ORANGE, "x") == [(4096, 8 * GIB)]
    assert points(against_vocab, drawing.VERMILION, "x") == [(65_536, 8 * GIB)]
    assert len(points(against_tokens, drawing.BLUE, "o")) == 6
    budgets = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    hollow = [
        line for line in break_even.get_lines() if line.get_markerfacecolor() == "white" and line.get_color() == drawing.BLACK
    ]
    assert [x / MIB for line in hollow for x in line.get_xdata()] == [budget for budget in budgets if 0.6 + 4.0 / budget > 1.2]


def test_whole_steps_have_each_figure_at_its_length_and_a_cross_for_each_failure() -> None:
    speed, memory = plots.training(training_results()).axes
    tokens = [256, 512, 1024, 2048, 4096]
    assert points(speed, drawing.BLUE, "o") == [(size, 900.0) for size in tokens]
    assert points(memory, drawing.SKY, "P") == [(size, 400 * MIB) for size in tokens]
    assert points(memory, drawing.ORANGE, "D") == [(size, 400 * MIB + 8 * size * 151_936 * 4) for size in tokens[:3]]
    assert [x for x, _ in points(speed, drawing.ORANGE, "x")] == tokens[3:]
    assert points(memory, drawing.GREY, "x") == [], "who never ran has no line to end"


def test_a_run_that_is_not_done_is_drawn_as_far_as_it_is() -> None:
    """Results are written after every process, so any of them may be all there is."""
    for name in ("growth", "limits"):
        results = MADE_UP[name]()
        ended = {"part": "break-even", "dtype": "fp32", "loss": "jsd", "contender": "tokens", "failed": "ended"}
        results["rows"] = [results["rows"][0], ended]
        plots.PICTURES[name](results).draw_without_rendering()
    nothing = {"machine": MACHINE, "rows": [row for row in growth_results()["rows"] if "failed" in row]}
    plots.growth(nothing).draw_without_rendering()
    alone = {"machine": MACHINE, "rows": [row for row in compare_results()["rows"] if "failed" in row]}
    plots.compare(alone).draw_without_rendering()
    failed = {"machine": MACHINE, "rows": [row for row in limits_results()["rows"] if "failed" in row]}
    plots.limits(failed).draw_without_rendering()
    never = {"machine": MACHINE, "rows": [row for row in training_results()["rows"] if "failed" in row]}
    plots.training(never).draw_without_rendering()
    plots.limits({"machine": MACHINE, "rows": []}).draw_without_rendering()


def test_the_pictures_of_the_files_that_exist_are_drawn_beside_them(tmp_path: Path) -> None:
    for name in ("growth", "methods"):
        (tmp_path / f"{name}.json").write_text(json.dumps(MADE_UP[name]()))
    assert [path.name for path in plots.draw(tmp_path)] == ["growth.png", "methods.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["growth.png", "methods.png"]
    pixels = matplotlib.image.imread(tmp_path / "growth.png")
    assert pixels.shape[1] > 800
    assert pixels[..., :3].std() > 0.05


def test_a_folder_without_results_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plots", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        plots.main()
    assert f"{tmp_path} holds none of compare.json" in capsys.readouterr().err
