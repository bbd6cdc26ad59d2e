"""``python -m kdkernels cache``."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from kdkernels.cli import main
from kdkernels.console import files
from kdkernels.errors import to_install
from kdkernels.transformers.cache import TopKCache, write_cache
from kdkernels.transformers.cache.most_likely import MostLikely
from tests.support.caches import assert_right, content
from tests.support.commands import error_of
from tests.support.tiny_models import build

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "slept"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and its tokenizer ("teacher") and data for it ("data.jsonl")."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("saved")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["<unk>", "<eos>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder / "teacher")
    build("llama", max_position_embeddings=32).save_pretrained(folder / "teacher")
    texts = [" ".join(WORDS[(start + step) % 8] for step in range(start + 2)) for start in range(10)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def command(saved: Path, out: Path, **options: Any) -> list[str]:
    given = {"teacher": saved / "teacher", "data": saved / "data.jsonl", "out": out, "top-k": 5, "max-length": 32, **options}
    return ["cache", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]


def test_the_command_makes_a_cache_and_says_what_is_in_it(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(command(saved, out, temperature=2, vocab_size=10)) == 0
    shown = capsys.readouterr().out.splitlines()
    cache = TopKCache(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    tail = f"of the probability, {cache.tail_mass:.4f} is outside the top 5 on average"
    assert shown == [f"10 examples, 75 tokens, {size:,} bytes in {out}/; {tail}"]
    assert (len(cache), cache.tokens, cache.temperature, cache.vocab_size) == (10, 75, 2.0, 10)
    assert_right(cache, build("llama", max_position_embeddings=32), list(cache.examples()), 10, 2.0)
    assert not any(str(part) in (out / "manifest.json").read_text() for part in (saved, tmp_path)), "a path of this machine"

    before = content(out)
    monkeypatch.chdir(saved)
    given = {"teacher": "./teacher", "data": "data.jsonl", "temperature": 2, "vocab_size": 10}
    assert main(command(saved, out, **given)) == 0, "the same by another path"
    assert capsys.readouterr().out.splitlines() == ["10 of 10 examples were there from an earlier run", *shown]
    assert content(out) == before


def test_the_command_goes_on_after_an_interrupt(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = MostLikely.__call__, iter(range(100))

    def interrupted(self: MostLikely, *arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(MostLikely, "__call__", interrupted)
    monkeypatch.setattr(write_cache, "__kwdefaults__", {**write_cache.__kwdefaults__, "shard_examples": 4})
    out, whole = tmp_path / "out", tmp_path / "whole"
    status, line = error_of(capsys, command(saved, out, batch_size=4))
    assert (status, line) == (130, "interrupted; the same command again goes on after the last whole shard")
    assert main(command(saved, out, batch_size=4)) == 0
    assert "8 of 10 examples were there" in capsys.readouterr().out
    assert main(command(saved, whole, batch_size=4)) == 0
    assert content(out) == content(whole)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"top-k": 0}, ("--top-k", "'0'", "at least 1")),
        ({"temperature": "-1"}, ("--temperature", "'-1'", "a positive number")),
        ({"max-length": 1}, ("--max-length", "'1'", "at least 2")),
        ({"limit": "few"}, ("--limit", "'few'", "an integer")),
        ({"batch-size": 1.5}, ("--batch-size", "'1.5'", "an integer")),
        ({"dtype": "int8"}, ("--dtype", "'int8'", "bfloat16")),
        ({"teacher": "./nothing"}, ("error: './nothing' cannot be loaded", "no such folder")),
        ({"data": "./nothing.jsonl"}, ("error: './nothing.jsonl'", "no such file")),
        ({"split": "test"}, ("error: ", "no split 'test'")),
        ({"vocab-size": 62}, ("error: vocab_size", "from 1 to 61", "62")),
        ({"top-k": 62}, ("error: top_k", "from 1 to 61", "62")),
    ],
)
def test_a_bad_argument_is_one_line(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    status, line = error_of(capsys, command(saved, tmp_path / "out", **options))
    assert status == 2
    for part in parts:
        assert part in line
    assert not list((tmp_path / "out").glob("shard*"))


def test_a_window_longer_than_the_teacher_takes_is_one_line(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text(" ".join(WORDS * 9))
    status, line = error_of(capsys, command(saved, tmp_path / "out", data=tmp_path / "long.txt", **{"max-length": 40}))
    assert status == 2
    assert line == "error: the longest example has 40 tokens, and the teacher takes 32; accepted: --max-length up to 32"
    assert main(command(saved, tmp_path / "out", data=tmp_path / "long.txt")) == 0


def test_other_settings_in_the_folder_are_one_line(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    assert main(command(saved, tmp_path / "out")) == 0
    status, line = error_of(capsys, command(saved, tmp_path / "out", **{"top-k": 6, "limit": 9}))
    assert status == 2
    assert line.startswith(f"error: {tmp_path / 'out'} holds another cache: top_k is 5 there and 6 here")
    assert "limit is None there and 9 here" in line
    status, line = error_of(capsys, command(saved, saved))
    assert status == 2
    assert line.startswith(f"error: --out {saved} holds other files")


@pytest.mark.parametrize("what", ["a shard", "the tokenizer"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """tokenizers raises no OSError, but a class of its own with the system's words."""
    from transformers import PreTrainedTokenizerFast

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_space_in_rust(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        if what == "a shard":
            patched.setattr(files, "save", no_space)
        else:
            patched.setattr(PreTrainedTokenizerFast, "save_pretrained", no_space_in_rust)
        status, line = error_of(capsys, command(saved, out))
        assert status == 2
    assert line == (
        f"error: --out {out} cannot be written: No space left on device; with room the same command again goes on after the last "
        "whole shard"
    )
    assert main(command(saved, out)) == 0
    assert (out / "tokenizer" / "tokenizer.json").exists()


def test_a_missing_library_is_one_line(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    status, line = error_of(capsys, command(saved, tmp_path / "out"))
    assert status == 2
    assert line == (f"error: the cache needs rich, not installed here: {to_install('transformers')}")
