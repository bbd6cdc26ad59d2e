"""Claims about the command line, none of which needs more than torch."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels.backends import native
from kdkernels.cli import main
from kdkernels.cli.configs import head_shape
from kdkernels.cli.models import HEADS, HeadShape
from kdkernels.console import files, info
from kdkernels.console.arguments import Parser, memory
from kdkernels.errors import CommandError, to_install
from kdkernels.planning import roofline
from kdkernels.transformers.distill.configuration import read_config
from kdkernels.transformers.distill.options import BY_NAME
from tests.support.commands import error_of


def plan(**options: str) -> list[str]:
    """Arguments of a plan; underscores of an option are dashes."""
    given = {"student": "Qwen2.5-0.5B", "teacher": "Qwen2.5-7B", **options}
    given["tokens"] = given.pop("tokens", "8192")
    return ["plan", *(part for name, value in given.items() for part in (f"--{name.replace('_', '-')}={value}",))]


def test_info_names_versions_backends_and_instruction_sets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for expected in (kd.__version__, torch.__version__, *kd.divergences(), *native.instruction_sets(), info.processor()):
        assert expected in shown
    assert f"backend, cpu     {kd.backend('cpu')}" in shown


def test_info_says_what_an_unbuilt_extension_means(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "instruction_sets", lambda: ())
    assert main(["info"]) == 0
    assert "the C++ extension is not built" in capsys.readouterr().out


def test_info_works_without_the_libraries_of_the_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "tokenizers", "safetensors", "triton"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["info"]) == 0
    assert capsys.readouterr().out.count("not installed") == 4


def test_help_lists_the_commands_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "demo " in shown
    assert "info " in shown
    assert "python -m kdkernels demo --minutes 1" in shown


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["demo", "--minutes", "0"], ("--minutes", "'0'", "at least 0.1")),
        (["demo", "--minutes", "nan"], ("--minutes", "'nan'", "at least 0.1")),
        (["demo", "--minutes", "soon"], ("--minutes", "'soon'", "at least 0.1")),
        (["demo", "--seed", "1.5"], ("--seed", "'1.5'", "an integer")),
        (["demo", "--seed", "-1"], ("--seed", "'-1'", "from 0")),
        (plan(student="Qwen9"), ("--student", "'Qwen9'", "151936x896", "Qwen2.5-0.5B", "Gemma-3-12B")),
        (plan(teacher="151936"), ("--teacher", "'151936'", "VxD")),
        (plan(teacher="0x896"), ("--teacher", "'0x896'", "VxD")),
        (plan(teacher="-1x896"), ("--teacher", "'-1x896'", "VxD")),
        (plan(tokens="0"), ("--tokens", "'0'", "from 1")),
        (plan(tokens="many"), ("--tokens", "'many'", "an integer")),
        (plan(dtype="float64"), ("--dtype", "'float64'", "bfloat16", "float16", "float32")),
        (plan(device="H300"), ("--device", "'H300'", "A100-80", "H100-PCIe", "cpu")),
        (plan(divergence="kl"), ("--divergence", "'kl'", "forward_kl", "total_variation")),
        (plan(memory_budget="0"), ("--memory-budget", "'0'", "bytes")),
        (plan(memory_budget="1.5"), ("--memory-budget", "'1.5'", "bytes", "1GB")),
        (plan(memory_budget="2 gigs"), ("--memory-budget", "'2 gigs'", "512MiB")),
        (plan()[:-2], ("--tokens", "required")),
        (["dmeo"], ("COMMAND", "'dmeo'", "demo")),
        ([], ("COMMAND",)),
    ],
)
def test_a_bad_argument_is_named_with_what_came_and_what_is_accepted(
    capsys: pytest.CaptureFixture[str], arguments: list[str], parts: tuple[str, ...]
) -> None:
    status, line = error_of(capsys, arguments)
    assert status == 2
    for part in parts:
        assert part in line


def figures(shown: str, name: str) -> list[str]:
    """The words of one row of a plan."""
    return next(line.split() for line in shown.splitlines() if line.startswith(f"{name} "))


def test_a_plan_compares_three_ways_and_calls_every_figure_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan()) == 0
    shown = capsys.readouterr().out
    (header,) = (line for line in shown.splitlines() if "predicted" in line)
    assert header.count(", predicted") == 4
    assert "GB" not in shown[: shown.index(header)], "no figure before the header"
    for name in ("eager", "tokens", "vocab"):
        assert figures(shown, name)[2] == "GB"
        assert figures(shown, name)[4] == "ms"
    planned = kd.plan(8192, 151_936, 896, 3584, torch.bfloat16, device="H100", strategy="tokens")
    assert float(figures(shown, "eager")[1]) == round(planned.eager_peak_bytes / 1e9, 2)
    assert float(figures(shown, "tokens")[1]) == round(planned.peak_bytes / 1e9, 2)
    assert float(figures(shown, "tokens")[6]) == round(planned.flops / 1e12, 3)


def test_a_plan_says_how_far_each_way_is_from_the_bare_products(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan(divergence="jsd", memory_budget="1000000000")) == 0
    shown = capsys.readouterr().out
    for name in ("eager", "tokens", "vocab"):
        strategy = "tokens" if name == "eager" else name
        planned = kd.plan(
            *(8192, 151_936, 896, 3584, torch.bfloat16),
            device="H100",
            strategy=strategy,
            divergence="jsd",
            memory_budget=10**9,
        )
        seconds = planned.eager_seconds if name == "eager" else planned.seconds
        assert seconds is not None
        assert planned.products_seconds is not None
        assert float(figures(shown, name)[5]) == round(seconds / planned.products_seconds, 2)
    assert "Over products: the time over that of the matrix products alone" in shown


@pytest.mark.parametrize("budget", ["1GB", "1MB"])
def test_a_plan_marks_the_way_that_auto_takes(capsys: pytest.CaptureFixture[str], budget: str) -> None:
    taken = kd.plan(*(8192, 151_936, 896, 3584, torch.bfloat16), device="H100", memory_budget=memory(budget)).strategy
    assert taken == {"1GB": "tokens", "1MB": "vocab"}[budget]
    assert main(plan(memory_budget=budget)) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("<- auto")] == [taken]
    assert main([*plan(memory_budget=budget), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auto"] == taken


def test_a_plan_says_which_estimates_a_gpus_times_rest_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(roofline.ROW_INSTRUCTIONS, "forward_kl", (11, 0, 22))
    monkeypatch.setitem(roofline.ROW_INSTRUCTIONS, "jsd", (44, 55, 66))
    row, kernels = "tokens: its row kernel is counted at", "vocab: its kernels are counted at 0.7 of the rate of library products"
    for options, counted in (
        ({}, "33 instructions a logit: statistics 11, gradient 22."),
        ({"divergence": "jsd"}, "165 instructions a logit: statistics 44, sums 55, gradient 66."),
    ):
        assert main(plan(**options)) == 0
        shown = capsys.readouterr().out
        assert f"{row} {counted}" in shown
        assert kernels in shown
    with monkeypatch.context() as inside:
        inside.setenv("KDKERNELS_LOGITS", "half")
        assert main(plan()) == 2
        assert "KDKERNELS_LOGITS is 'half'; accepted: float32, offsets" in capsys.readouterr().err
        inside.setenv("KDKERNELS_LOGITS", "offsets")
        for divergence in ("forward_kl", "jsd"):  # with sums and gradient in one sweep, and in two
            sums, gradient = roofline.OFFSETS_INSTRUCTIONS[divergence]
            listed = f"sums {sums}, gradient {gradient}" if sums else f"gradient {gradient}"
            assert main(plan(divergence=divergence)) == 0
            said = f"{row} {sums + gradient} instructions a logit: {listed}; logits are kept in 16 bits."
            assert said in capsys.readouterr().out
    assert main([*plan(divergence="jsd"), "--okd"]) == 0
    assert "gradient 66; the teacher's at 33 instructions a logit" in capsys.readouterr().out
    assert main(plan(tokens="64", student="512x64", teacher="512x64", device="cpu")) == 0
    assert "counted at" not in capsys.readouterr().out, "a processor's rates are measured with what runs there"


def test_a_plan_of_padded_vocabularies_takes_the_smaller(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for student in ("Qwen2.5-0.5B", "152064x896"):
        assert main(plan(student=student)) == 0
        shown[student] = capsys.readouterr().out
    assert "heads of 151,936 and 152,064 rows: planned for vocab_size=151936" in shown["Qwen2.5-0.5B"]
    assert "vocab_size" not in shown["152064x896"]
    assert "vocabulary 152,064" in shown["152064x896"]


def test_a_plan_takes_sizes_and_names_in_any_case(capsys: pytest.CaptureFixture[str]) -> None:
    for student, device in (("151936x896", "H100"), ("qwen2.5-0.5b", "h100")):
        assert main(plan(student=student, device=device)) == 0
    first, second = capsys.readouterr().out.split("forward_kl, loss")[1:]
    assert first == second


def test_a_plan_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan(tokens="16384", device="RTX4090")) == 0
    assert "eager: more than the 24.00 GB of RTX4090." in capsys.readouterr().out
    assert main(plan(tokens="256", device="RTX4090")) == 0
    assert "more than" not in capsys.readouterr().out


def test_a_plan_of_a_frozen_head_and_of_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for more in ([], ["--frozen-head"], ["--memory-budget=100000000"]):
        assert main([*plan(), *more]) == 0
        shown.append(capsys.readouterr().out)
    products = [float(figures(one, "tokens")[6]) for one in shown]
    assert products[0] == products[2] > products[1]
    assert float(figures(shown[2], "vocab")[1]) < float(figures(shown[0], "vocab")[1])
    assert "frozen head" in shown[1]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1000000000", 10**9),
        ("1_000_000", 10**6),
        ("1e9", 10**9),
        ("100B", 100),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        ("1GB", 10**9),
        ("1.5GiB", 3 * 2**29),
        ("2g", 2**31),
        ("2G", 2**31),
        ("64k", 65_536),
        ("64KB", 64_000),
        ("1TB", 10**12),
    ],
)
def test_an_amount_of_memory_is_read_with_its_unit(text: str, size: int) -> None:
    assert memory(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "0GB", "-1", "1.5", "0.3KiB", "GB", "1XB", "1 000", "nan", "inf", "1e99", "2PiB", "1,5GB"]
)
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (the words are those of the argument's type)
        memory(text)


def test_a_budget_with_a_unit_is_that_many_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for budget in ("500MB", "500000000"):
        assert main(plan(memory_budget=budget)) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_distill_takes_the_same_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    kind = BY_NAME["memory_budget"].kind
    assert kind.of_text()("512MiB") == 512 * 2**20
    for given, size in (("512MiB", 512 * 2**20), (10**9, 10**9), (1e9, 10**9), ("2g", 2**31)):
        assert kind.of_value(given) == size
    (tmp_path / "run.json").write_text('{"memory_budget": "1GB"}')
    assert read_config(tmp_path / "run.json") == {"memory_budget": 10**9}
    (tmp_path / "run.json").write_text('{"memory_budget": "1 gig"}')
    with pytest.raises(CommandError, match="memory_budget is '1 gig'; accepted: a number of bytes, such as"):
        read_config(tmp_path / "run.json")
    for bad in (True, 0, -1, 1.5, [1]):
        with pytest.raises(ValueError):  # noqa: PT011  (the words are those of the option)
            kind.of_value(bad)


def test_heads_are_of_the_table_or_of_sizes() -> None:
    assert head_shape("Llama-3.1-8B") == head_shape("128256x4096") == HeadShape(128_256, 4096)
    for shape in HEADS.values():
        assert 30_000 < shape.vocab < 300_000
        assert shape.dim % 64 == 0
    for bad in ("", "x", "12x", "12X8", "1.5x8", "8x-1", "8 x 8", "12x0", "9" * 30 + "x8"):
        with pytest.raises(ValueError, match="VxD such as 151936x896, or one of"):
            head_shape(bad)


def test_a_missing_library_is_one_line_that_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    status, line = error_of(capsys, ["demo", "--out", str(tmp_path / "new")])
    assert status == 2
    assert line == f"error: the demo needs tokenizers, not installed here: {to_install('demo')}"
    assert not (tmp_path / "new").exists()


def test_an_unrelated_folder_is_refused_and_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    status, line = error_of(capsys, ["demo", "--out", str(tmp_path)])
    assert status == 2
    assert line.startswith(f"error: --out {tmp_path} holds other files")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    status, line = error_of(capsys, ["demo", "--out", str(taken)])
    assert status == 2
    assert "is a file" in line
    assert taken.read_text() == "mine"


def test_an_interrupt_is_exit_130_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = False

    def interrupted(settings: object, folder: Path, **options: object) -> None:
        if begun:
            files.claim(folder, "demo")
        raise KeyboardInterrupt

    monkeypatch.setattr("kdkernels.demo.run.run", interrupted)
    for state, then in (
        (False, "nothing was written yet: the same command begins anew"),
        (True, "the same command with --resume continues from the last checkpoint"),
    ):
        begun = state
        assert error_of(capsys, ["demo", "--out", str(tmp_path / "new")]) == (130, f"interrupted; {then}")


def test_an_interrupt_before_a_command_begins_is_exit_130_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Parser, "parse_known_args", interrupted)
    assert error_of(capsys, ["info"]) == (130, "interrupted; nothing more was written")


@pytest.mark.parametrize(
    ("arguments", "command", "expected"),
    [
        (["distill", "--learning_rat=3"], "distill", "--learning_rat is not known; the nearest is --learning-rate"),
        (["distill", "--evalsteps", "3"], "distill", "--evalsteps is not known; the nearest is --eval-steps"),
        (["cache", "--topk", "3"], "cache", "--topk is not known; the nearest is --top-k"),
        (["plan", "--stdent", "32x8"], "plan", "--stdent is not known; the nearest is --student"),
        (["demo", "--minuts", "1"], "demo", "--minuts is not known; the nearest is --minutes"),
        (["demo", "-x"], "demo", "-x is not known; the nearest is -h"),
        (["demo", "extra"], "demo", "got 'extra', which belongs to no option"),
        (["demo", "--", "x"], "demo", "got 'x', which belongs to no option"),
    ],
)
def test_an_unknown_option_is_told_with_the_nearest_and_the_usage_of_its_command(
    capsys: pytest.CaptureFixture[str], arguments: list[str], command: str, expected: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: python -m kdkernels {command} ")
    assert said.splitlines()[-1] == f"python -m kdkernels {command}: error: {expected}"


@pytest.mark.parametrize("arguments", [["info"], ["distill", "--help"], plan()])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str]) -> None:
    """As in ``| head``: what it has not read is dropped."""
    command = [sys.executable, "-m", "kdkernels", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "")


def test_an_output_that_cannot_be_written_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full, which is always full, is Linux's")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "kdkernels", "info"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*No space left on device\n", done.stderr)


def test_processors_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    core = "processor\t: {}\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: Any CPU\n"
    monkeypatch.setattr(info.Path, "read_text", lambda _: f"{core.format(0)}\n{core.format(1)}")
    assert info.processor() == "Any CPU (family 26, model 2)"
    monkeypatch.setattr(info.Path, "read_text", lambda _: "processor\t: 0\nmodel name\t: Another\n")
    assert info.processor() == "Another"
    monkeypatch.setattr(info.Path, "read_text", lambda _: "processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert info.processor() == (platform.processor() or platform.machine())
