"""A cache is the same bytes however it came about, and what would be another one is refused."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from kdkernels.errors import CommandError
from kdkernels.transformers.cache import TopKCache, write, write_cache
from kdkernels.transformers.cache.manifest import shard_name
from tests.support import ROOT
from tests.support.caches import EXAMPLES, OPTIONS, SHARDS, Examples, assert_right, content
from tests.support.tiny_models import VOCAB, build


def test_the_same_inputs_make_the_same_bytes(llama: Any, whole: Path, tmp_path: Path) -> None:
    write_cache(copy.deepcopy(llama), copy.deepcopy(EXAMPLES), tmp_path / "new", **OPTIONS)
    assert content(tmp_path / "new") == content(whole)
    names = {"kdkernels-cache.json", "manifest.json", "index.safetensors", *map(shard_name, range(SHARDS))}
    assert set(content(whole)) == names


class Killed(Exception):
    pass


def killed_at(call: int) -> Callable[[int, int], None]:
    """A progress callback that ends the run at its n-th call; the 0th is before any forward."""
    calls = iter(range(1000))

    def progress(done: int, total: int) -> None:
        if next(calls) == call:
            raise Killed

    return progress


@pytest.mark.parametrize("call", [0, 1, 2, 3, 5])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(llama: Any, whole: Path, tmp_path: Path, call: int) -> None:
    """Two forwards for each of two shards and one for the third; the call after a forward comes before its shard is written."""
    with pytest.raises(Killed):
        write_cache(llama, EXAMPLES, tmp_path, progress=killed_at(call), **OPTIONS)
    left = content(tmp_path)
    kept = max(0, call - 1) // 2
    assert sorted(name for name in left if name.startswith("shard")) == [shard_name(shard) for shard in range(kept)]
    assert all(left[name] == content(whole)[name] for name in left if name != "manifest.json")
    if call:
        with pytest.raises(
            CommandError, match=rf"is a cache that is not finished \({kept} of 3 shards\).*goes on where it stopped"
        ):
            TopKCache(tmp_path)
    seen: list[int] = []
    write_cache(llama, EXAMPLES, tmp_path, progress=lambda done, total: seen.append(done), **OPTIONS)
    assert seen[0] == 4 * kept, "whole shards are made again"
    assert seen[-1] == len(EXAMPLES)
    assert content(tmp_path) == content(whole)


KILLED = """
import os, signal, sys
import torch
from kdkernels.console import files
from kdkernels.transformers.cache import write_cache
from tests.support.caches import EXAMPLES, OPTIONS
from tests.support.tiny_models import build

calls = iter(range(100))
sync = files.os.fsync

def killed(descriptor):  # the temporary file is written, and has not taken its name
    if next(calls) == 3:  # marker, manifest, first shard, second shard
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)

files.os.fsync = killed
write_cache(build("llama"), EXAMPLES, sys.argv[1], **OPTIONS)
"""


def test_a_kill_in_the_middle_of_a_write_leaves_whole_files_only(llama: Any, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = {path.name for path in folder.iterdir()}
    assert names == {"kdkernels-cache.json", "manifest.json", "shard-00000.safetensors", "shard-00001.safetensors.tmp"}
    write_cache(llama, EXAMPLES, folder, **OPTIONS)
    assert content(folder) == content(whole)


def test_a_finished_cache_is_not_made_again(llama: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(folder)
    monkeypatch.setattr(write, "MostLikely", None)
    write_cache(llama, EXAMPLES, folder, **OPTIONS)
    assert content(folder) == before


def other_weight(model: Any) -> Any:
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    return model


def other_configuration(model: Any) -> Any:
    model.config.rms_norm_eps = 1e-3  # as a model of other code reads it; the weights are the same
    return model


def other_label(examples: Examples) -> Examples:
    counted = next(i for i, label in enumerate(examples[3]["labels"]) if label != -100)
    examples[3]["labels"][counted] = -100
    return examples


@pytest.mark.parametrize(
    ("options", "model", "examples", "parts"),
    [
        ({"top_k": 6}, None, None, ("top_k is 7 there and 6 here",)),
        ({"temperature": 2}, None, None, ("temperature is 1.0 there and 2.0 here",)),
        ({"vocab_size": 60}, None, None, ("vocab_size is 61 there and 60 here",)),
        ({"shard_examples": 5}, None, None, ("shard_examples is 4 there and 5 here",)),
        ({"about": {"tokenizer": "t2"}}, None, None, ("tokenizer is t1 there and t2 here", "max_length is 16 there and None here")),
        ({}, other_weight, None, ("teacher_digest is",)),
        ({}, other_configuration, None, ("teacher_digest is",)),
        ({}, None, other_label, ("data_digest is",)),
        ({}, None, lambda examples: examples[1:], ("examples is 11 there and 10 here", "data_digest is")),
        ({}, None, lambda examples: examples[::-1], ("data_digest is",)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_another_cache_in_the_folder_is_refused_with_what_differs(
    llama: Any, folder: Path, options: Any, model: Any, examples: Any, parts: tuple[str, ...]
) -> None:
    before = content(folder)
    teacher = model(copy.deepcopy(llama)) if model else llama
    data = examples(copy.deepcopy(EXAMPLES)) if examples else EXAMPLES
    with pytest.raises(CommandError) as caught:
        write_cache(teacher, data, folder, **{**OPTIONS, **options})
    message = str(caught.value)
    assert message.startswith(f"{folder} holds another cache: ")
    for part in parts:
        assert part in message
    assert message.count(" there and ") == len(parts) + ("tokens is" in message)
    assert message.endswith("accepted: the same, or another folder")
    assert content(folder) == before


def test_what_changes_no_result_is_no_other_cache(llama: Any, folder: Path) -> None:
    before = content(folder)
    twin = copy.deepcopy(llama).train()
    twin.config._name_or_path = twin.config.transformers_version = "elsewhere"
    tensors = [{name: torch.tensor(values) for name, values in example.items()} for example in EXAMPLES]
    write_cache(twin, tensors, folder, **{**OPTIONS, "batch_size": 1, "memory_budget": 1})
    assert content(folder) == before


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # peft 0.21 with transformers 5.23
def test_a_teacher_with_another_adapter_is_another_teacher(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(alpha: int) -> Any:
        settings = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return peft.get_peft_model(build("llama"), settings).eval()

    cache = write_cache(adapted(2), EXAMPLES, tmp_path, **OPTIONS)
    assert_right(cache, adapted(2), EXAMPLES)
    before = content(tmp_path)
    write_cache(adapted(2), EXAMPLES, tmp_path, **OPTIONS)
    assert content(tmp_path) == before
    with pytest.raises(CommandError, match="teacher_digest is"):
        write_cache(adapted(4), EXAMPLES, tmp_path, **OPTIONS)


def test_a_folder_of_other_files_is_left_alone(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CommandError, match=r"^folder .* holds other files"):
        write_cache(llama, EXAMPLES, tmp_path, **OPTIONS)
    assert content(tmp_path) == {"thesis.txt": b"mine"}


@pytest.mark.parametrize(
    ("error", "given", "message"),
    [
        (ValueError, {"top_k": 0}, "top_k is an integer from 1 to 61, got 0"),
        (ValueError, {"top_k": 62}, "top_k is an integer from 1 to 61, got 62"),
        (ValueError, {"top_k": 51, "vocab_size": 50}, "top_k is an integer from 1 to 50, got 51"),
        (TypeError, {"top_k": 2.0}, "top_k is an integer from 1 to 61, got float"),
        (ValueError, {"vocab_size": 62}, "vocab_size is an integer from 1 to 61, got 62"),
        (ValueError, {"temperature": 0.0}, "temperature is a positive number from 1e-9 to 1e5, got 0.0"),
        (ValueError, {"temperature": math.nan}, "temperature is a positive number from 1e-9 to 1e5, got nan"),
        (ValueError, {"batch_size": 0}, "batch_size is an integer of at least 1, got 0"),
        (TypeError, {"shard_examples": True}, "shard_examples is an integer of at least 1, got bool"),
        (ValueError, {"memory_budget": 0}, "memory_budget is an integer of at least 1, got 0"),
        (TypeError, {"about": {"model": object()}}, "about is a mapping that can be written as JSON"),
        (TypeError, {"about": {"loss": math.nan}}, "about is a mapping that can be written as JSON"),
        (ValueError, {"examples": []}, "examples is empty"),
        (TypeError, {"examples": [[1, 2]]}, r"examples\[0\] is .* got list"),
        (TypeError, {"examples": [EXAMPLES[0], {"ids": [1]}]}, r"examples\[1\] is .* got dict without input_ids"),
        (ValueError, {"examples": [{"input_ids": []}]}, r"examples\[0\] has no tokens"),
        (ValueError, {"examples": [{"input_ids": [3, VOCAB]}]}, r"examples\[0\] holds the token 61; accepted: 0 to 60"),
        (ValueError, {"examples": [{"input_ids": [3, -1]}]}, r"examples\[0\] holds the token -1; accepted: 0 to 60"),
        (TypeError, {"examples": [{"input_ids": [3.0]}]}, r"examples\[0\] input_ids is a sequence of integers, got shape"),
        (TypeError, {"examples": [{"input_ids": ["a"]}]}, r"examples\[0\] input_ids is a sequence of integers, got list"),
        (TypeError, {"examples": [{"input_ids": [[3]]}]}, r"examples\[0\] input_ids is a sequence of integers, got shape \(1, 1\)"),
        (ValueError, {"examples": [{"input_ids": [3, 4], "labels": [3]}]}, r"examples\[0\] has 2 tokens and 1 labels"),
        (ValueError, {"examples": [{"input_ids": [3, 4], "labels": [4, -100]}]}, r"the label 4 at token 3; accepted: the token"),
        (
            ValueError,
            {"examples": [{"input_ids": [3, 4], "attention_mask": [0, 0]}]},
            r"attention_mask has 2 entries, 0 of them not 0",
        ),
        (TypeError, {"model": 3}, "model is a causal language model"),
    ],
)
def test_bad_input_is_named_before_any_work(
    llama: Any, tmp_path: Path, error: type[Exception], given: dict[str, Any], message: str
) -> None:
    arguments = {"model": llama, "examples": EXAMPLES, **OPTIONS, **given}
    with pytest.raises(error, match=message):
        write_cache(folder=tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_teacher_that_is_not_here_is_refused(llama: Any, tmp_path: Path) -> None:
    twin = copy.deepcopy(llama)
    twin.model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"the teacher's model\.layers\.1\..* is not here"):
        write_cache(twin, EXAMPLES, tmp_path / "new", **OPTIONS)
