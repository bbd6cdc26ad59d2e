"""Tokens and conversations that can be learned, those that cannot, and prompts alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("rich")

from kdkernels.cli import main
from tests.support.commands import refusal
from tests.support.data import CHAT, put, tokenizer
from tests.support.distilling import TEXT, arguments, cache_of, results_of, swap_tokens, weights
from tests.support.tiny_models import build


def test_models_of_other_tokens_are_refused(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(given / "teacher", tmp_path / "teacher")
    swap_tokens(tmp_path / "teacher")
    said = refusal(capsys, arguments(given, tmp_path / "run", teacher=tmp_path / "teacher"))
    assert "disagree on 2 of their tokens, the first: 'a' is" in said


def test_tokens_of_the_student_alone_are_cut_off_and_refused_in_the_data(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tokenizer()
    shared = len(made)
    made.add_special_tokens({"pad_token": "<pad>"})
    made.add_tokens("<new>")
    build("llama", vocab_size=len(made)).save_pretrained(tmp_path / "student")
    made.save_pretrained(tmp_path / "student")
    assert main(arguments(given, tmp_path / "run", student=tmp_path / "student")) == 0
    before, after = weights(tmp_path / "student")["lm_head.weight"], weights(tmp_path / "run" / "student")["lm_head.weight"]
    assert torch.equal(before[shared:], after[shared:])
    assert not torch.equal(before[:shared], after[:shared])
    (tmp_path / "new.txt").write_text(TEXT + "<new>")
    said = refusal(capsys, arguments(given, tmp_path / "other", student=tmp_path / "student", data=tmp_path / "new.txt"))
    assert f"--data has the token '<new>' ({shared + 1}) in 1 of " in said
    assert f"examples, which the teacher does not know: both know the first {shared}; accepted: examples without such tok" in said


def test_conversations_that_are_not_learned_whole_are_told_with_the_first_of_them(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By distill and by cache; what can be learned is."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    source = put(tmp_path / "a.jsonl", *[{"messages": CHAT}] * 4, {"messages": [*CHAT[:2], call]})
    for argv in (
        arguments(given, tmp_path / "run", data=source, eval_fraction=0.25, max_length=200),
        cache_of(given / "teacher", source, tmp_path / "cache", "--top-k=4"),
    ):
        assert main(argv) == 0
        said = capsys.readouterr().out
        assert f"conversations left out: 1, the first: {source}, record 5: the chat template does not write tool_calls (m" in said
    results = results_of(tmp_path / "run")
    assert (results["train_examples"], results["eval_examples"]) == (3, 1)
    bad = put(tmp_path / "b.jsonl", {"messages": [*CHAT[:2], call]})
    said = refusal(capsys, arguments(given, tmp_path / "other", data=bad))
    assert "--data: " in said
    assert f"conversations left out: 1, the first: {bad}, record 1: the chat template does not write tool_calls (message 3)" in said


def test_tokens_that_the_student_lacks_are_said_to_be_lacking_there(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The examples of a cache are the teacher's, with or without its tokenizer beside them."""
    made = tokenizer()
    shared = len(made)
    made.add_tokens([f"<new{number}>" for number in range(3)])
    build("llama", vocab_size=len(made)).save_pretrained(tmp_path / "teacher")
    made.save_pretrained(tmp_path / "teacher")
    source = put(tmp_path / "a.jsonl", {"text": "ab<new2>"}, *[{"text": "abc"}] * 3)
    assert main(cache_of(tmp_path / "teacher", source, tmp_path / "cache", "--top-k=8")) == 0
    argv = arguments(given, tmp_path / "run", teacher=tmp_path / "cache", data=None, eval_fraction=0)
    expected = f"error: the cache {tmp_path / 'cache'} has the token "
    said = refusal(capsys, argv)
    assert said.startswith(
        f"{expected}'<new2>' ({shared + 2}) in 1 of 4 examples, which the student does not know: both know the f"
    )
    shutil.rmtree(tmp_path / "cache" / "tokenizer")
    assert refusal(capsys, argv).startswith(
        f"{expected}without a name ({shared + 2}) in 1 of 4 examples, which no tokenizer here k"
    )


def rename_token(folder: Path, before: str, after: str) -> None:
    """Another name for a special token at its id."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace(json.dumps(before)[1:-1], after))


@pytest.mark.parametrize("cached", [False, True])
def test_renamed_tokens_are_refused_naming_the_option_with_which_they_are_trained(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cached: bool
) -> None:
    shutil.copytree(given / "teacher", tmp_path / "teacher")
    rename_token(tmp_path / "teacher", "<|user|>", "<|User|>")
    size, renamed = len(tokenizer()), tokenizer().convert_tokens_to_ids("<|user|>")
    teacher = tmp_path / "teacher"
    if cached:
        assert main(cache_of(teacher, given / "text.txt", tmp_path / "cache", "--max-length=16", "--top-k=8")) == 0
        teacher = tmp_path / "cache"
    both = {"teacher": teacher, "data": None if cached else given / "text.txt"}
    said = refusal(capsys, arguments(given, tmp_path / "run", **both))
    assert f"--vocab-size): {size} takes the tokens at one id for one another and {renamed} leaves them out" in said
    assert main(arguments(given, tmp_path / "run", vocab_size=size, **both)) == 0
    results = results_of(tmp_path / "run")
    assert results["settings"]["vocab_size"] == size
    if not cached:  # to the same numbers as between tokenizers of the same names
        assert main(arguments(given, tmp_path / "same", data=given / "text.txt")) == 0
        other = results_of(tmp_path / "same")
        assert results["before"] == other["before"]
        assert results["after"] == other["after"]


def test_a_token_to_learn_that_vocab_size_cuts_off_is_refused_and_one_to_read_is_not(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tokenizer()
    size, user = len(made), made.convert_tokens_to_ids("<|user|>")
    pairs = [{"prompt": "<|user|>hi", "completion": "a" * 5}] * 4
    made.eos_token = "e"  # one of the first
    for role in ("student", "teacher"):
        shutil.copytree(given / role, tmp_path / role)
        made.save_pretrained(tmp_path / role)
    both = {"student": tmp_path / "student", "teacher": tmp_path / "teacher", "vocab_size": user, "eval_fraction": 0.25}
    source = put(tmp_path / "a.jsonl", *pairs)
    assert main(arguments(given, tmp_path / "run", data=source, **both)) == 0
    source = put(tmp_path / "b.jsonl", *pairs, {"prompt": "hi", "completion": "<|user|>"})
    said = refusal(capsys, arguments(given, tmp_path / "other", data=source, **both))
    assert (
        f"--data has the token '<|user|>' ({user}) in 1 of 2 examples, which vocab_size cuts off: both know the first {user}"
        in said
    )
    assert f"accepted: 1 to {size}" in refusal(
        capsys, arguments(given, tmp_path / "third", data=source, **{**both, "vocab_size": size + 1})
    )


def test_prompts_alone_are_enough_where_the_student_writes_every_batch(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on is what it wrote, of --max-new-tokens each as no end is likely; a prompt's tokens do not count."""
    source = put(tmp_path / "prompts.jsonl", *({"prompt": TEXT[i : i + 6]} for i in range(12)))
    options = {"data": source, "on_policy_fraction": 1, "max_new_tokens": 5, "steps": 3}
    assert main(arguments(given, tmp_path / "run", **options)) == 0
    results = results_of(tmp_path / "run")
    assert (results["train_examples"], results["eval_examples"]) == (12, 0)
    assert 0.8 * 3 * 4 * 5 < results["tokens"] <= 3 * 4 * 5
    assert results["before"] == results["after"] == {}
    assert "prompts alone have no tokens to judge the student by: nothing is held out" in capsys.readouterr().out

    held = put(tmp_path / "pairs.jsonl", *[{"prompt": "on the", "completion": "mat"}] * 2)
    assert main(arguments(given, tmp_path / "judged", **options, eval_data=held, eval_steps=2)) == 0
    assert results_of(tmp_path / "judged")["eval_examples"] == 2
    mixed = put(tmp_path / "mixed.jsonl", *[{"prompt": "on the"}] * 8, *[{"prompt": "on the", "completion": "mat"}] * 8)
    assert main(arguments(given, tmp_path / "mixed", **{**options, "data": mixed}, eval_fraction=0.25)) == 0
    results = results_of(tmp_path / "mixed")
    assert (results["train_examples"], results["eval_examples"]) == (14, 2)
    assert results["before"]["loss"] > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 'a "prompt" alone only to learn from, where the student writes every batch (--on-policy-fraction 1)'),
        ({"on_policy_fraction": 0.9}, 'holds "prompt" (a string); accepted: '),
        ({"on_policy_fraction": 1, "eval_steps": 1}, "--eval-steps needs held-out data, and prompts alone are none"),
        ({"on_policy_fraction": 1, "max_length": 5}, "whose prompt fills the 5 tokens of --max-length"),
        (
            {"on_policy_fraction": 1, "max_new_tokens": 4000},
            "the longest prompt has 6 tokens, with --max-new-tokens 4,000 more than the 2,048 that the student",
        ),
    ],
)
def test_prompts_alone_that_teach_nothing_are_refused(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], expected: str
) -> None:
    source = put(tmp_path / "prompts.jsonl", *({"prompt": TEXT[i : i + 6]} for i in range(8)))
    assert expected in refusal(capsys, arguments(given, tmp_path / "run", data=source, **options))


def test_prompts_that_fill_an_example_are_counted_apart_from_empty_records(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = {"prompt": "on the", "completion": "mat"}
    source = put(
        tmp_path / "a.jsonl",
        *[pair] * 8,
        *[{"prompt": "a" * 20, "completion": "b"}] * 2,
        {"text": ""},
        {**pair, "prompt": "a" * 14},
    )
    assert main(arguments(given, tmp_path / "run", data=source, steps=1)) == 0
    expected = (
        f"{source}: 1 example cut at 16 tokens (--max-length); 2 examples left out, whose prompt fills the 16 tokens of "
        "--max-length; 1 example left out without a token to learn"
    )
    assert expected in capsys.readouterr().out
