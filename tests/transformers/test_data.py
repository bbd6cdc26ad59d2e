"""Claims about reading data, with tokenizers whose every character or word is one token."""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.data import CHAT, learned, put, tokenizer

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
from huggingface_hub import constants
from tokenizers import processors

from kdkernels.errors import CommandError
from kdkernels.transformers.batches.layout import IGNORED
from kdkernels.transformers.data import Collator, examples, prepare, read


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length", [2, 3, 7, 16, 1000])
def test_every_token_of_a_text_but_its_first_is_predicted_once_and_in_order(tmp_path: Path, length: int, bos: bool) -> None:
    text = "The cat sat.\n\n  On the mät 猫, twice.\r\nEnd"
    (tmp_path / "a.txt").write_bytes(text.encode())
    made = tokenizer(bos=bos, merges=8)
    found = examples(tmp_path / "a.txt", made, max_length=length)
    assert all(2 <= len(one["input_ids"]) <= length for one in found)
    assert all(one["labels"] == one["input_ids"] for one in found)
    predicted = [token for one in found for token in one["labels"][1:]]
    whole = [*([made.bos_token_id] if bos else []), *made(text, add_special_tokens=False)["input_ids"], made.eos_token_id]
    assert [found[0]["input_ids"][0], *predicted] == whole
    assert made.decode(whole, skip_special_tokens=True).encode() == text.encode()


def test_a_text_file_of_any_name_is_one_record_with_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "notes").write_bytes("\ufeffone\r\n\r\ntwo\n".encode())
    assert list(read(tmp_path / "notes")) == [{"text": "one\r\n\r\ntwo\n"}]


def test_each_text_of_a_jsonl_file_gets_its_own_eos_and_windows(tmp_path: Path) -> None:
    made = tokenizer()
    found = examples(put(tmp_path / "a.jsonl", {"text": "abcd"}, {"text": ""}, {"text": "xy", "id": 3}), made, max_length=4)
    assert [made.decode(one["input_ids"]) for one in found] == ["abcd", "d</s>", "xy</s>"]


def test_without_an_eos_none_is_put_there(tmp_path: Path) -> None:
    (found,) = examples(put(tmp_path / "a.jsonl", {"text": "abcd"}), tokenizer(eos=False), max_length=9)
    assert len(found["input_ids"]) == 4


def test_lines_are_ended_by_newlines_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b\u0085c"}\r\n\n  \n{"text": "d"}', encoding="utf-8", newline="")
    assert [record["text"] for record in read(tmp_path / "a.jsonl")] == ["a\u2028b\u0085c", "d"]


def test_a_json_file_is_a_list_of_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": "two"}]')
    assert [record["text"] for record in read(tmp_path / "a.json")] == ["one", "two"]


@pytest.mark.parametrize("merges", [0, 20])
def test_of_a_conversation_the_assistants_tokens_count_with_what_ends_a_turn(tmp_path: Path, merges: int) -> None:
    made = tokenizer(merges=merges)
    (found,) = examples(put(tmp_path / "a.jsonl", {"messages": CHAT}), made, max_length=1000)
    assert learned(found, made) == "\n hello<|end|>sat<|end|>"
    shown = "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>\n hello<|end|><|user|>the cat?<|end|><|assistant|>sat<|end|>"
    assert made.decode(found["input_ids"]) == shown


def test_a_template_without_special_tokens_is_told_apart_by_characters(tmp_path: Path) -> None:
    """Where the turns' boundaries fall inside what could be one token."""
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    made = tokenizer(template=plain, merges=40)
    turns = [{"role": "user", "content": "the mat"}, {"role": "assistant", "content": "the cat"}]
    (found,) = examples(put(tmp_path / "a.jsonl", {"messages": turns}), made, max_length=1000)
    assert learned(found, made) == " the cat\n"


def test_of_a_completion_the_tokens_and_the_eos_count(tmp_path: Path) -> None:
    for bos in (False, True):
        made = tokenizer(bos=bos)
        (found,) = examples(put(tmp_path / "a.jsonl", {"prompt": "Q: é? A:", "completion": " ü"}), made, max_length=99)
        assert learned(found, made) == " ü</s>"
        assert made.decode(found["input_ids"], skip_special_tokens=True) == "Q: é? A: ü"
        assert (found["input_ids"][0] == made.bos_token_id) is bos


def test_a_token_that_reaches_into_the_completion_counts(tmp_path: Path) -> None:
    made = tokenizer(merges=40)
    (found,) = examples(put(tmp_path / "a.jsonl", {"prompt": "on th", "completion": "e cat"}), made, max_length=99)
    assert learned(found, made) == " the cat</s>"


def test_a_tokenizer_that_ends_texts_itself_gets_no_second_eos(tmp_path: Path) -> None:
    made = tokenizer()
    ended = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", made.eos_token_id)])
    made.backend_tokenizer.post_processor = ended
    source = put(tmp_path / "a.jsonl", {"text": "ab"}, {"prompt": "a", "completion": "b"})
    text, pair = examples(source, made, max_length=99)
    assert text["labels"] == text["input_ids"] == pair["input_ids"]
    assert made.decode(text["input_ids"]) == "ab</s>"
    assert learned(pair, made) == "b</s>"


def test_what_is_too_long_is_cut_and_counted_and_what_teaches_nothing_is_dropped(tmp_path: Path) -> None:
    source = put(
        tmp_path / "a.jsonl",
        {"prompt": "a" * 20, "completion": "b"},  # nothing of the completion is left
        {"prompt": "a" * 8, "completion": "b" * 8},
        {"messages": CHAT[:2]},  # no answer
        {"text": ""},
        {"prompt": "", "completion": "c"},
    )
    made = tokenizer()
    found = prepare(source, made, max_length=10)
    assert [learned(one, made) for one in found.examples] == ["bb", "c</s>"]
    assert (found.cut, found.filled, found.dropped) == (1, 1, 2)
    assert found.left_out(10) == (
        "1 example cut at 10 tokens (--max-length); 1 example left out, whose prompt fills the 10 tokens of --max-length; "
        "2 examples left out without a token to learn"
    )
    for one in found.examples:
        assert len(one["input_ids"]) == len(one["labels"]) <= 10


@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_may_stand_alone_where_the_student_writes(tmp_path: Path, bos: bool) -> None:
    """Its tokens are those of a prompt with a completion, and its only label, of a token behind it, says where it ends."""
    pair, alone = {"prompt": "the cat", "completion": "c"}, {"prompt": "the cat"}
    asked = {"messages": CHAT[:1]}
    source = put(tmp_path / "a.jsonl", pair, alone, asked, {"prompt": ""}, {"prompt": "a" * 40})
    made = tokenizer(bos=bos)
    found = prepare(source, made, max_length=32, prompts=True)
    (full,), (prompt, question) = found.examples, found.prompts
    length = len(full["input_ids"]) - 2
    assert prompt["input_ids"] == [*full["input_ids"][:length], made.eos_token_id]
    assert prompt["labels"] == [IGNORED] * length + [made.eos_token_id]
    assert made.decode(question["input_ids"][:-1]) == "<|system|>be brief<|end|><|assistant|>"
    assert question["labels"][:-1] == [IGNORED] * (len(question["labels"]) - 1)
    assert (found.cut, found.filled, found.dropped) == (0, 1, 1)
    assert len(prepare(source, made, max_length=32, prompts=True, limit=2).prompts) == 1
    with pytest.raises(
        CommandError, match=r"line 2: holds \"prompt\" \(a string\); accepted: .*a \"prompt\" alone only to learn from"
    ):
        prepare(source, made, max_length=32)


def test_a_prompt_is_not_ended_by_a_tokenizer_that_ends_texts_itself(tmp_path: Path) -> None:
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", made.eos_token_id)]
    )
    (prompt,) = prepare(put(tmp_path / "a.jsonl", {"prompt": "ab"}), made, max_length=8, prompts=True).prompts
    assert prompt["input_ids"] == [*made("ab")["input_ids"][:2], made.eos_token_id]
    assert len(prompt["input_ids"]) == 3


@pytest.mark.parametrize("name", ["chatz", "owner/chatz"])
def test_without_a_hub_a_mistyped_name_is_refused_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    begun = time.monotonic()
    with pytest.raises(CommandError, match=f"'{name}' is no file or folder here, and datasets cannot load it"):
        read(name)
    assert time.monotonic() - begun < 5
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_limit_counts_examples(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 10)
    whole, some = (examples(tmp_path / "a.txt", tokenizer(), max_length=8, limit=limit) for limit in (None, 3))
    assert len(whole) > 3
    assert some == whole[:3]


def test_records_with_several_kinds_are_conversations_first_and_pairs_second(tmp_path: Path) -> None:
    made = tokenizer()
    pair = {"prompt": "ab", "completion": "cd", "text": "xx"}
    source = put(tmp_path / "a.jsonl", {**pair, "messages": CHAT}, pair, {"prompt": "ab", "text": "xx"})
    assert [learned(one, made) for one in examples(source, made, max_length=500)] == [
        "\n hello<|end|>sat<|end|>",
        "cd</s>",
        "xx</s>",
    ]


def test_a_saved_dataset_reads_as_the_same_records_in_a_file(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = [{"messages": CHAT, "text": None}, {"messages": None, "text": "ab"}]
    made = tokenizer()
    expected = examples(put(tmp_path / "a.jsonl", *records), made, max_length=500)
    saved = datasets.Dataset.from_list(records)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(str(tmp_path / "more"))
    assert examples(tmp_path / "one", made, max_length=500) == expected
    assert examples(str(tmp_path / "more"), made, max_length=500) == expected
    assert examples(tmp_path / "more", made, max_length=500, split="test") == expected[1:]
    with pytest.raises(CommandError, match=r"no split 'dev'; it has train, test"):
        read(tmp_path / "more", split="dev")
    with pytest.raises(CommandError, match=r"no split 'test'; it has train$"):
        read(tmp_path / "one", split="test")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(CommandError, match="one cannot be read by datasets"):
        read(tmp_path / "one")


def test_a_name_of_the_hub_is_loaded_with_its_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, configuration: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((name, configuration, split))
        if name == "gone":
            raise ConnectionError("Couldn't reach\nthe Hub")
        return [{"text": "abc"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(examples("owner/data.v2:small", tokenizer(), max_length=9, split="test[:5%]")) == 1
    read("plain")
    assert asked == [("owner/data.v2", "small", "test[:5%]"), ("plain", None, "train")]
    with pytest.raises(CommandError, match="'gone' is no file or folder here, and datasets cannot load it: Couldn't reach the Hub"):
        read("gone")


def test_without_the_datasets_library_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    for source in ("owner/name", str(tmp_path)):
        with pytest.raises(CommandError, match="needs the datasets library, not installed here: pip install datasets"):
            read(source)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', 'a.jsonl, line 2: holds "txt" (a string); accepted: "text"'),
        ("a.jsonl", b'{"text": 3}', 'line 1: holds "text" (a number)'),
        ("a.jsonl", b'["a"]', "line 1: holds a list"),
        ("a.jsonl", b"{}", "line 1: holds nothing"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "line 1, message 1 (user) has the content null; accepted: {"),
        ("a.jsonl", b'{"messages": "hi"}', 'line 1: holds "messages" (a string)'),
        ("a.jsonl", b'{"prompt": "a"}', 'line 1: holds "prompt" (a string)'),
        ("a.jsonl", b'{"prompt": "a", "completion": ["b"]}', 'line 1: holds "prompt" (a string), "completion" (a list)'),
        ("a.json", b'{"text": "a"}', "a.json holds an object; accepted in a .json file: a list"),
        ("a.json", b'[{"text": "a"}, null]', "a.json, record 2: holds null"),
        ("a.bin", b"abc\xff\xfe", "a.bin is not text in UTF-8 (byte 3)"),
        ("a.txt", b"", "no example is left in 1 records"),
        ("a.jsonl", b"\n", "no example is left in 0 records"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CommandError) as raised:
        examples(tmp_path / name, tokenizer(), max_length=8)
    assert expected in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone/gone.txt", "/gone/data", "./gone", "~/gone", "a/b/c", ""])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CommandError, match=r"there is no such file|save_to_disk did not write"):
        read(name)


def test_splits_of_files_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(CommandError, match="no split 'test'"):
        read(tmp_path / "a.txt", split="test")
    with pytest.raises(CommandError, match="save_to_disk did not write"):
        read(tmp_path)


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    source = put(tmp_path / "a.jsonl", {"text": "a b"}, {"messages": CHAT})
    with pytest.raises(CommandError, match="record 2: messages need a chat template, and this tokenizer has none"):
        examples(source, tokenizer(template=None), max_length=99)


def test_of_a_template_that_changes_earlier_turns_the_last_answer_is_learned_and_the_others_counted(tmp_path: Path) -> None:
    """As templates do that leave out the thinking of all turns but the last. Where no answer can be told, nothing is left."""
    forgetful = (
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.last %}hm: {% endif %}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    source = put(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(
        CommandError,
        match=r"no example is left in 1 .*; conversations left out: 1, the first: .*record 1: .* writes earlier turns anew",
    ):
        examples(source, tokenizer(template=forgetful), max_length=99)
    late = forgetful.replace("loop.last", "loop.last and m.role == 'assistant'")
    made = tokenizer(template=late)
    for messages, partial in ((CHAT, 1), (CHAT[:3], 0)):
        found = prepare(put(tmp_path / "b.jsonl", {"messages": messages}), made, max_length=999)
        assert learned(found.examples[0], made) == ("hm: sat<|end|>" if partial else "hm: \n hello<|end|>")
        assert (found.partial, found.unusable, found.dropped, len(found.notes)) == (partial, 0, 0, partial)
        assert "hm: \n hello" not in made.decode(found.examples[0]["input_ids"]) or not partial


def test_what_a_template_refuses_is_told_with_the_record(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system\nhere') }}{% endif %}x"
    source = put(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(CommandError, match="record 1: the chat template refuses it: no system here"):
        examples(source, tokenizer(template=strict), max_length=99)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    for more, expected in (
        ({"max_length": 1}, "max_length is at least 2"),
        ({"max_length": 8, "limit": 0}, "limit is at least 1"),
    ):
        with pytest.raises(ValueError, match=expected):
            examples(tmp_path / "a.txt", tokenizer(), **more)
    with pytest.raises(ValueError, match=r"tokenizer is one of the tokenizers library \(is_fast\), got object"):
        examples(tmp_path / "a.txt", object(), max_length=8)


@pytest.mark.parametrize("pad", [None, 9])
def test_a_batch_is_padded_on_the_right_and_padding_is_masked(pad: int | None) -> None:
    batch = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [4]},
        {"input_ids": [5, 6], "attention_mask": [0, 1]},
    ]
    collate = pickle.loads(pickle.dumps(Collator(pad)))  # as a DataLoader's workers get it
    found = collate(batch)
    fill = pad or 0
    expected = {
        "input_ids": [[1, 2, 3], [4, fill, fill], [5, 6, fill]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [0, 1, 0]],
        "labels": [[-100, 2, 3], [4, -100, -100], [-100, 6, -100]],
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.int64
        assert found[name].tolist() == values


def test_a_batch_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        Collator(0)([])
    with pytest.raises(ValueError, match=r"one length: input_ids \(2,\), attention_mask \(2,\), labels \(1,\)"):
        Collator(0)([{"input_ids": [1, 2], "labels": [1]}])


def test_the_ending_of_a_file_counts_in_any_case_and_tables_are_no_text(tmp_path: Path) -> None:
    line = json.dumps({"text": "a b"})
    (tmp_path / "data.JSONL").write_text(f"{line}\n{line}\n")
    assert read(tmp_path / "data.JSONL") == [{"text": "a b"}] * 2
    (tmp_path / "data.csv").write_text("text\na b\n")
    with pytest.raises(CommandError, match=r"data.csv is a table; accepted: text, .jsonl, .json"):
        read(tmp_path / "data.csv")


def test_labels_and_masks_that_are_none_are_as_if_they_were_not_there() -> None:
    given = [{"input_ids": [1, 2, 3], "labels": None, "attention_mask": None}, {"input_ids": [4], "labels": [4]}]
    made = Collator(0)(given)
    assert made["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    with pytest.raises(ValueError, match="an example has no input_ids; it has text"):
        Collator(0)([{"text": "a"}])
