"""Claims about conversations: templates that forget, tool calls, parts, and two lists of messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import transformers

from kdkernels.errors import CommandError
from kdkernels.transformers.batches.layout import IGNORED
from kdkernels.transformers.data import Prepared, prepare
from tests.support.data import CHAT, TEMPLATE, learned, put, tokenizer

# As Qwen3 has them: thinking stays in answers to the last question alone, and calls are JSON in tags.
THINKING = """
{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- set thought = m.reasoning_content or '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] %}{% set content = content.split('</think>')[-1] %}
{%- endif %}
{{- '<|' + m.role + '|>' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>' + thought + '</think>' }}
{%- endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
"""
# As the first generation had them: a text for each turn, and calls unheard of.
STRICT = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
PRINTING = TEMPLATE  # what is not text is printed as it is
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "id": "1", "function": {"name": "weather", "arguments": arguments}}],
        **more,
    }


def asked(*turns: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "hi"}, *turns]


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def prepared(tmp_path: Path, template: str, *records: dict[str, Any]) -> tuple[Prepared, list[str]]:
    """With what is learned of each example."""
    made = tokenizer(template=template)
    found = prepare(put(tmp_path / "a.jsonl", *records), made, max_length=2000)
    return found, [learned(example, made) for example in found.examples]


def whole(found: Prepared) -> list[str]:
    return [tokenizer().decode(example["input_ids"]) for example in found.examples]


def refused(tmp_path: Path, record: dict[str, Any], template: str = TEMPLATE) -> str:
    with pytest.raises(CommandError) as raised:
        prepared(tmp_path, template, {"messages": asked(answer("a"))}, record)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- templates that forget ----


def test_thinking_is_learned_where_the_template_keeps_it_and_the_rest_is_counted(tmp_path: Path) -> None:
    twice = asked(answer("A", reasoning_content="r"), {"role": "user", "content": "so?"}, answer("B", reasoning_content="s"))
    inline = asked(answer("<think>r</think>A"), {"role": "user", "content": "so?"}, answer("<think>s</think>B"))
    found, texts = prepared(tmp_path, THINKING, {"messages": twice}, {"messages": twice[:2]}, {"messages": inline})
    assert texts == ["<think>s</think>B<|end|>", "<think>r</think>A<|end|>", "<think>s</think>B<|end|>"]
    assert whole(found)[0] == "<|user|>hi<|end|><|assistant|>A<|end|><|user|>so?<|end|><|assistant|><think>s</think>B<|end|>"
    assert (found.partial, found.unusable, found.dropped) == (2, 0, 0)
    (note,) = found.notes
    assert note.startswith(
        "conversations learned in part: 2, 2 of their 4 answers, since the chat template writes earlier turns anew"
    )
    assert note.endswith("a.jsonl, record 1")


def test_answers_between_calls_are_learned_where_they_stay_as_they_were(tmp_path: Path) -> None:
    """After the last question the thinking is kept, so the call is as it was when the model wrote it, unless it had none."""
    thought, bare = (call({"city": "Rome"}, **more) for more in ({"reasoning_content": "r"}, {}))
    made = '<call>{"name": "weather", "arguments": {"city": "Rome"}}</call><|end|>'
    for turn, texts in ((thought, f"<think>r</think>{made}<think></think>ok<|end|>"), (bare, "<think></think>ok<|end|>")):
        found, learned_texts = prepared(
            tmp_path, THINKING, {"messages": asked(turn, {"role": "tool", "content": "sun"}, answer("ok"))}
        )
        assert learned_texts == [texts]
        assert found.partial == (turn is bare)


def test_what_a_turn_is_opened_with_and_not_written_so_is_not_learned(tmp_path: Path) -> None:
    """R1's own template opens an answer with <think>, and then leaves out the thinking: that is said."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    )
    found, texts = prepared(tmp_path, template, {"messages": CHAT}, {"messages": asked(answer("<think>r</think>A"))})
    assert texts == ["\n hello<|end|>sat<|end|>", "A<|end|>"]
    assert prepared(tmp_path, template, {"messages": asked(answer("<b>A</b>"))})[1] == ["<b>A</b><|end|>"]
    assert [note.rpartition(",")[0] for note in found.notes] == [
        f"conversations with answers of which the chat template leaves out or changes some of the content: 1, the first: "
        f"{tmp_path / 'a.jsonl'}"
    ]
    assert found.notes[0].endswith("record 2")


def test_thinking_that_a_template_does_not_know_is_said_to_be_left_out(tmp_path: Path) -> None:
    found, texts = prepared(
        tmp_path, TEMPLATE, {"messages": asked(answer("A"))}, {"messages": asked(answer("A", reasoning_content="r"))}
    )
    assert texts == ["A<|end|>"] * 2
    (note,) = found.notes
    assert "leaves out or changes some of the reasoning_content: 1, the first: " in note
    assert note.endswith("record 2")


def test_what_the_template_marks_is_what_is_learned(tmp_path: Path) -> None:
    found, texts = prepared(tmp_path, MARKED, {"messages": CHAT}, {"prompt": CHAT[:4], "completion": CHAT[4:]})
    assert texts == ["\n hello<|end|>sat<|end|>", "sat<|end|>"]
    assert whole(found)[0] == whole(found)[1]
    # also where earlier turns are written anew
    late = MARKED.replace(
        "{{ m.content }}<|end|>{% endgeneration %}", "{% if loop.last %}hm: {% endif %}{{ m.content }}{% endgeneration %}"
    )
    found, texts = prepared(tmp_path, late, {"messages": CHAT}, {"prompt": CHAT[:4], "completion": CHAT[4:]})
    assert texts == ["\n hellohm: sat", "hm: sat"]
    assert (found.partial, found.notes) == (0, ())


def test_marks_of_every_template_of_trl_are_those_that_transformers_finds(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    made, checked = tokenizer(bos=True), 0
    records = put(tmp_path / "a.jsonl", {"messages": CHAT[1:5]})
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        made.chat_template = path.read_text()
        found = prepare(records, made, max_length=4000)
        assert found.unusable == 0, path.name
        assert len(found.examples) == 1
        assert made.decode([label for label in found.examples[0]["labels"] if label != IGNORED]).count("sat"), path.name
        if "{% generation %}" in made.chat_template or "{%- generation %}" in made.chat_template:
            try:
                asked_for = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
                expected = made.apply_chat_template(CHAT[1:5], **asked_for)
            except Exception:  # it takes only lists of parts
                continue
            if "hello" not in made.decode(expected["input_ids"]):
                continue
            checked += 1
            assert found.examples[0]["input_ids"] == expected["input_ids"], path.name
            mask = [label != IGNORED for label in found.examples[0]["labels"]]
            assert mask == [bool(one) for one in expected["assistant_masks"]], path.name
    assert checked > 5


# ---- tool calls ----


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_tool_calls_are_learned_whether_their_arguments_are_text_or_an_object(tmp_path: Path, arguments: Any) -> None:
    turns = asked(call(arguments), {"role": "tool", "content": "sun", "tool_call_id": "1"}, answer("ok"))
    made = '<call>{"name": "weather", "arguments": {"city": "Rome"}}</call><|end|>'
    for tools in (TOOLS, json.dumps(TOOLS)):
        found, texts = prepared(tmp_path, THINKING, {"messages": turns[:2], "tools": tools})
        assert texts == [f"<think></think>{made}"]
        assert whole(found)[0].startswith(f"<|system|>{json.dumps(TOOLS[0])}<|end|><|user|>hi")
        assert found.notes == ()
    # where a template writes them as they are, as text
    plain = TEMPLATE.replace(
        "{{ message.content }}", "{{ message.content }}{% for c in message.tool_calls %}{{ c.function.arguments }}{% endfor %}"
    )
    adding = plain.replace("{{ c.function.arguments }}", "{{ 'args ' + c.function.arguments }}")
    assert prepared(tmp_path, plain, {"messages": turns})[1] == ['{"city": "Rome"}<|end|>ok<|end|>']
    assert prepared(tmp_path, adding, {"messages": turns})[1] == ['args {"city": "Rome"}<|end|>ok<|end|>']


def test_a_template_that_tells_calls_by_a_null_content_gets_it(tmp_path: Path) -> None:
    """As DeepSeek's does; a null is never written as text."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.content is none %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ '' + m.content }}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = asked(call({"city": "Rome"}), {"role": "tool", "content": None}, answer("ok"))
    turns[2]["content"] = "sun"
    assert prepared(tmp_path, template, {"messages": turns})[1] == ["weather<|end|>ok<|end|>"]
    silent = asked(answer(None), {"role": "user", "content": "well?"}, answer("ok"))
    for each in (TEMPLATE, STRICT + "{% if add_generation_prompt %}<|assistant|>{% endif %}"):
        found, texts = prepared(tmp_path, each, {"messages": silent})
        assert texts == ["<|end|>ok<|end|>"]
        assert "None" not in whole(found)[0]


@pytest.mark.parametrize("template", [STRICT, PRINTING])
def test_calls_that_a_template_does_not_write_are_left_out_and_counted(tmp_path: Path, template: str) -> None:
    template += "" if template is PRINTING else "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    with_call = {"messages": asked(call({"city": "Rome"}), {"role": "tool", "content": "sun"}, answer("ok"))}
    plain = {"messages": asked(answer("A"))}
    found, texts = prepared(tmp_path, template, plain, with_call, plain, with_call)
    assert texts == ["A<|end|>"] * 2
    assert (found.unusable, found.dropped, found.partial) == (2, 0, 0)
    assert found.notes == (
        f"conversations left out: 2, the first: {tmp_path / 'a.jsonl'}, record 2: the chat template does not write tool_calls "
        "(message 2)",
    )
    with pytest.raises(
        CommandError, match=r"no example is left in 1 records .*; conversations left out: 1, the first: .*, record 1: "
    ):
        prepared(tmp_path, template, with_call)


def test_what_one_template_refuses_does_not_cost_the_other_records(tmp_path: Path) -> None:
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no system\nhere') }}{% endif %}" + TEMPLATE
    found, texts = prepared(tmp_path, picky, {"messages": asked(answer("A"))}, {"messages": CHAT})
    assert texts == ["A<|end|>"]
    assert found.notes[0].endswith("record 2: the chat template refuses it: no system here")


def test_tools_that_a_template_does_not_write_are_named(tmp_path: Path) -> None:
    found, _ = prepared(tmp_path, TEMPLATE, {"messages": asked(answer("A")), "tools": TOOLS})
    assert found.notes[0].startswith("conversations with tools that the chat template does not write: 1, the first: ")
    found, _ = prepared(tmp_path, TEMPLATE, {"messages": asked(answer("A")), "tools": []})
    assert found.notes == ()
    for wrong, said in ((3, "a number"), ("x", "a string"), (["x"], "a list")):
        record = {"messages": asked(answer("A")), "tools": wrong}
        assert f"record 2: tools is {said}; accepted: a list of JSON schemas" in refused(tmp_path, record)


def test_options_of_the_template_come_with_the_record(tmp_path: Path) -> None:
    template = "{% if language is defined %}{{ language }}{% endif %}" + TEMPLATE
    record = {"messages": asked(answer("A")), "chat_template_kwargs": {"language": "fr"}}
    found, _ = prepared(tmp_path, template, record)
    assert whole(found)[0].startswith("fr<|user|>")
    assert "chat_template_kwargs is a list; accepted: an object" in refused(tmp_path, {**record, "chat_template_kwargs": []})


def test_a_turn_of_weight_0_is_read_and_not_learned(tmp_path: Path) -> None:
    """As OpenAI's data marks them."""
    turns = asked(answer("A", weight=0), {"role": "user", "content": "so?"}, answer("B", weight=1))
    for template in (TEMPLATE, MARKED):
        found, texts = prepared(tmp_path, template, {"messages": turns})
        assert texts == ["B<|end|>"]
        assert whole(found) == ["<|user|>hi<|end|><|assistant|>A<|end|><|user|>so?<|end|><|assistant|>B<|end|>"]


def test_nulls_that_arrow_puts_in_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    """A column of objects has the keys of all of them."""
    datasets = pytest.importorskip("datasets")
    other = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {"x": {"type": "a"}}}}}
    records = [
        {"messages": asked(call({"city": "Rome"})), "tools": TOOLS},
        {
            "messages": asked(call({"zone": "CET"}), {"role": "tool", "content": "1"}, answer("ok", reasoning_content="r")),
            "tools": [other],
        },
    ]
    made = tokenizer(template=THINKING)
    expected = prepare(put(tmp_path / "a.jsonl", *records), made, max_length=999)
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    assert prepare(tmp_path / "saved", made, max_length=999).examples == expected.examples


# ---- prompt and completion as conversations, parts, other names ----


def test_of_a_prompt_and_a_completion_that_are_conversations_the_completions_answers_count(tmp_path: Path) -> None:
    found, texts = prepared(
        tmp_path,
        TEMPLATE,
        {"prompt": CHAT[:4], "completion": CHAT[4:5]},
        {"prompt": CHAT[:2], "completion": CHAT[2:]},
        {"prompt": [], "completion": CHAT[:3]},
    )
    assert texts == ["sat<|end|>", "\n hello<|end|>sat<|end|>", "\n hello<|end|>"]
    together, _ = prepared(tmp_path, TEMPLATE, {"messages": CHAT[:5]})
    assert found.examples[0]["input_ids"] == found.examples[1]["input_ids"] == together.examples[0]["input_ids"]
    calls = {"prompt": asked(), "completion": [call({"city": "Rome"})], "tools": TOOLS}
    assert prepared(tmp_path, THINKING, calls)[1][0].startswith('<think></think><call>{"name": "weather"')


def test_parts_of_text_are_read_as_the_text_that_they_are(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    found, texts = prepared(tmp_path, TEMPLATE, {"messages": [*parts, answer([{"type": "text", "text": "A"}])]})
    assert texts == ["A<|end|>"]
    assert whole(found) == ["<|user|>hi<|end|><|assistant|>A<|end|>"]
    # where the template knows only parts, as those of models for images do, text is given as a part
    only_parts = TEMPLATE.replace(
        "{{ message.content }}",
        "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
    )
    for messages in ([*parts, answer("A")], asked(answer("A"))):
        assert whole(prepared(tmp_path, only_parts, {"messages": messages})[0]) == whole(found)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"messages": asked(answer([{"type": "text", "text": "A"}, {"type": "image_url", "image_url": {"url": "x"}}]))},
            "line 2, message 2 (assistant): part 2 of its content is of type 'image_url'; accepted: text alone",
        ),
        ({"messages": [{"role": "user", "content": [{"image": "x"}]}]}, "message 1 (user): part 1 of its content is of type None"),
        ({"messages": [{"role": "user", "content": [3]}]}, "message 1 (user): part 1 of its content is a number"),
        (
            {"messages": [{"role": "user", "content": {"text": "x"}}]},
            "line 2, message 1 (user) has the content an object; accepted:",
        ),
        ({"messages": asked({"role": "user", "content": None})}, "line 2, message 2 (user) has the content null"),
        ({"messages": asked("x")}, 'line 2, message 2 is a string; accepted: {"role": ..., "content": ...}'),
        ({"messages": asked({"content": "x"})}, 'line 2, message 2 has no role, but "content"; accepted:'),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            'line 2, message 1 has no role, but "from", "value" (ShareGPT\'s names, from and value, are not read); acc',
        ),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
            'line 2: holds "conversations" (a list); accepted: "text" (a string), "messages" (a list of {"role", "content"})',
        ),
        ({"prompt": "x", "completion": [answer("A")]}, 'line 2: holds "prompt" (a string), "completion" (a list); accepted: '),
        ({"prompt": asked(), "completion": "A"}, 'line 2: holds "prompt" (a list), "completion" (a string); accepted: '),
        (
            {"prompt": asked(), "completion": [answer([3])]},
            "line 2, completion message 1 (assistant): part 1 of its content is a number",
        ),
        (
            {"prompt": [{"role": "user", "content": 3}], "completion": []},
            "line 2, prompt message 1 (user) has the content a number",
        ),
    ],
)
def test_what_is_no_conversation_is_named_with_its_turn_and_why(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    assert said in refused(tmp_path, record)


def test_a_processor_gives_its_tokenizer_and_its_template(tmp_path: Path) -> None:
    class Processor(transformers.ProcessorMixin):  # type: ignore[misc]
        def __init__(self, tokenizer: Any, chat_template: str | None) -> None:
            self.tokenizer, self.chat_template = tokenizer, chat_template

    source = put(tmp_path / "a.jsonl", {"messages": CHAT})
    expected = prepare(source, tokenizer(), max_length=999)
    assert prepare(source, Processor(tokenizer(), None), max_length=999) == expected
    assert prepare(source, Processor(tokenizer(template=None), TEMPLATE), max_length=999) == expected
