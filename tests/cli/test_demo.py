"""Claims about the demo, on a corpus of some files and models of some thousand parameters."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from rich.console import Console
from transformers import AutoModelForCausalLM

from kdkernels.cli import main
from kdkernels.console import files
from kdkernels.demo import corpus as corpora
from kdkernels.demo import loss_step, plot, report, samples, train
from kdkernels.demo.models import build
from tests.support.demo import TINY, learned

pytestmark = pytest.mark.usefixtures("quick")


def test_a_run_leaves_results_plot_and_checkpoints_and_names_the_folder(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, screen = finished
    assert {path.name for path in folder.iterdir()} == {
        "kdkernels-demo.json",
        "corpus.safetensors",
        "tokenizer.json",
        "teacher.safetensors",
        "student.safetensors",
        "students.safetensors",
        "teacher",
        "student",
        "text.txt",
        "results.json",
        "demo.png",
    }
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert learned(json.loads((folder / "results.json").read_text())) == learned(results)
    assert f"{folder}/" in screen


def test_the_last_line_is_a_command_that_works(finished: tuple[Path, dict[str, Any], str], folder: Path) -> None:
    python, option, package, *command = shlex.split(finished[2].splitlines()[-1].replace(str(finished[0]), str(folder)))
    assert (python, option, package) == (sys.executable, "-m", "kdkernels")
    assert main([*command, "--logging-steps", "1"]) == 0
    assert (folder / "reverse_kl" / "student" / "config.json").exists()


def test_all_students_start_where_one_stopped_do_the_same_steps_and_learn(finished: tuple[Path, dict[str, Any], str]) -> None:
    students = finished[1]["students"]
    assert list(students["curves"]) == ["cross-entropy", "forward KL", "TAID", "OKD"]
    before = finished[1]["student"]["curves"]["student"][-1]
    assert {tuple(curve[0][1:]) for curve in students["curves"].values()} == {tuple(before[1:])}
    for curve in students["curves"].values():
        assert [step for step, _, _ in curve] == [0, 6, 12, 18, 24]
        assert curve[-1][1] < curve[0][1]
    taid = students["taid_t"]["TAID"]
    assert taid[0] == pytest.approx(0.4)
    assert taid[-1] == pytest.approx(1.0)


def test_the_four_students_are_one_and_see_the_same_batches(
    finished: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = corpora.prepare(TINY, finished[0], lambda text: None)
    student = train.student_phase(TINY, corpus)
    phase = train.further_phase(TINY, corpus, train.teacher_phase(TINY, corpus), student)
    for learner in phase.learners:
        ours, theirs = learner.model.state_dict(), student.learners[0].model.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    seen: dict[Any, list[Any]] = {}
    states = train.hidden_states

    def watched(model: Any, inputs: Any) -> Any:
        seen.setdefault(model, []).append(inputs)
        return states(model, inputs)

    monkeypatch.setattr(train, "hidden_states", watched)
    phase.steps = 2
    batches = [corpus.batch(TINY, "students", step) for step in range(2)]
    for batch in batches:
        train.take_step(phase, batch)
    assert {learner.model for learner in phase.learners} < seen.keys()
    for inputs in seen.values():
        assert len(inputs) == 2
        assert all(torch.equal(one, batch) for one, (batch, _) in zip(inputs, batches, strict=True))


def test_only_the_lora_of_okds_teacher_learns_and_the_judge_stays(finished: tuple[Path, dict[str, Any], str]) -> None:
    teacher, students = (files.load(finished[0] / name)[0] for name in ("teacher.safetensors", "students.safetensors"))
    assert any(value.any() for name, value in students.items() if name.startswith("OKD/lora/") and "lora_B" in name)
    assert not any(name.startswith("OKD/lora/") and "lora" not in name.removeprefix("OKD/lora/") for name in students)
    saved = AutoModelForCausalLM.from_pretrained(finished[0] / "teacher").state_dict()
    for name, value in teacher.items():
        if name.startswith("teacher/model/"):
            assert torch.equal(saved[name.removeprefix("teacher/model/")], value)


def test_what_was_written_is_judged_and_counted_as_written(finished: tuple[Path, dict[str, Any], str]) -> None:
    model = build(TINY.teacher, 300, TINY.window, 0)
    generator = torch.Generator().manual_seed(0)
    prompts, written = (torch.randint(300, (3, length), generator=generator) for length in (5, 4))
    logits = model(input_ids=torch.cat([prompts, written], dim=1)).logits[:, 4:-1].double()
    expected = -logits.log_softmax(-1).gather(-1, written[..., None]).mean((1, 2))
    assert samples.judge(model, prompts, written).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    text = torch.tensor([[1, 2, 1, 2, 1], [1, 2, 3, 3, 3]])
    assert [samples.distinct(text, n) for n in (1, 2, 3)] == [3 / 10, 4 / 8, 5 / 6]
    found = finished[1]["samples"]
    assert (found["prompts"], found["prompt_tokens"], found["written_tokens"]) == (6, 6, 8)
    assert list(found["models"]) == [samples.HELD_OUT, *finished[1]["heldout"]["models"]]


def test_all_models_continue_the_same_prompts_and_the_same_seed_writes_the_same() -> None:
    model = build(TINY.student, 300, TINY.window, 0)
    prompts = torch.arange(12).view(2, 6)
    first = samples.write(model, prompts, TINY)
    assert first.shape == (2, TINY.written_tokens)
    assert torch.equal(first, samples.write(model, prompts, TINY))
    assert not torch.equal(first, samples.write(model, prompts, dataclasses.replace(TINY, seed=1)))


def test_verdicts_follow_from_the_figures(finished: tuple[Path, dict[str, Any], str]) -> None:
    results = json.loads(json.dumps(finished[1]))
    for name, gain in {"forward KL": 0.5, "TAID": -0.5, "OKD": 0.1}.items():
        results["heldout"]["models"][name] |= {"gain": gain, "gain_error": 0.06}
        results["samples"]["models"][name] |= {"lower": -gain, "lower_error": 0.02}
    _, losses, quality, *_ = report.conclusions(results)
    assert "forward KL better (+0.500 ± 0.060); OKD no clear difference (+0.100 ± 0.060); TAID worse (-0.500 ± 0.060)" in losses
    assert "TAID better (+0.500 ± 0.020); OKD worse (-0.100 ± 0.020); forward KL worse (-0.500 ± 0.020)" in quality


def test_every_text_and_figure_is_on_a_screen_of_80_columns(finished: tuple[Path, dict[str, Any], str]) -> None:
    results = finished[1]
    screen = io.StringIO()
    console = Console(file=screen, width=80)
    report.print_losses(console, results)
    report.print_samples(console, results)
    shown = screen.getvalue()
    for name, row in results["samples"]["models"].items():
        assert re.search(rf"{name} *│ *{row['teacher_loss']:.3f} ± {row['error']:.3f} ", shown)
        assert " │ ".join(f"{share:.3f}" for share in row["distinct"]) in shown
    assert "…" not in shown


def test_the_bar_takes_the_columns_that_the_terminal_has() -> None:
    for columns in (60, 80, 130):
        screen = io.StringIO()
        console = Console(file=screen, width=columns, force_terminal=True, color_system=None)
        with report.progress_bar(console, "teacher") as watch:
            watch(train.Phase("teacher", [], None, 10, 1.0, "", 1.0, steps=10, step=10), "")
        lines = [line for line in re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", screen.getvalue()) if "10/10" in line]
        assert {len(line) for line in lines} == {columns}
        assert max(len(line) - len(line.lstrip("━╸╺")) for line in lines) > columns - 35


def test_the_legends_cover_no_curve(finished: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot as plt

    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    plot.draw(finished[0] / "again.png", finished[1])
    (finished[0] / "again.png").unlink()
    monkeypatch.undo()
    legends = [axes for axes in drawn[0].findobj(plt.Axes) if axes.get_legend()]
    assert len(legends) == 2
    for axes in legends:
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    plt.close(drawn[0])


def test_the_loss_step_agrees_with_eager_pytorch(finished: tuple[Path, dict[str, Any], str]) -> None:
    step = finished[1]["loss_step"]
    assert set(step["methods"]) == {"kdkernels", "eager PyTorch"}
    assert step["loss_difference"] < 1e-6
    assert step["gradient_difference"] < 1e-5


def test_the_screen_says_what_the_figures_do_not_show(finished: tuple[Path, dict[str, Any], str]) -> None:
    assert "does not reproduce published results" in finished[2]
    assert "not measured" in finished[2]


def test_held_out_files_are_not_trained_on() -> None:
    names = [name for name, _ in corpora.sources()]
    share = sum(map(corpora.held_out, names)) / len(names)
    assert 0.02 < share < 0.1
    assert not any("site-packages" in name or name.startswith("test/") for name in names)


def test_text_survives_the_vocabulary() -> None:
    texts = [text for _, text in corpora.sources(limit=3)]
    tokenizer = corpora.learn(texts, 300)
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_memory_of_a_loss_step_is_measured_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager PyTorch holds several [tokens, vocabulary] tensors at its peak; kdkernels stays within its budget and gradients."""
    monkeypatch.undo()
    tokens, vocab, budget = 1024, 4096, 2**22
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "student_hidden": torch.randn(tokens, 16, generator=generator),
        "student_head": torch.randn(vocab, 16, generator=generator),
        "teacher_hidden": torch.randn(tokens, 32, generator=generator),
        "teacher_head": torch.randn(vocab, 32, generator=generator),
    }
    measured, difference = loss_step.compare(inputs, 0.5, budget, 1, tmp_path / "inputs.safetensors")
    assert difference < 1e-4
    assert not list(tmp_path.iterdir())
    ours, eager = measured["kdkernels"].peak_bytes, measured["eager PyTorch"].peak_bytes
    if not Path("/proc/self/clear_refs").exists():  # only Linux tells
        assert (ours, eager) == (None, None)
        return
    assert ours is not None
    assert eager is not None
    logits = tokens * vocab * 4
    assert eager > 4 * logits
    assert ours < eager / 3
