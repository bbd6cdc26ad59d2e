"""Conversations through a chat template: the text that a model reads, and which parts of it are its own to write.

Templates differ. Some mark what the assistant writes ({% generation %}); with the others it is found by writing the conversation
up to a turn and through it. Some leave the thinking out of all turns but the last, so that an earlier answer does not stand there
as it was given: such an answer is context, and only those are learned that a model would write at that place.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from kdkernels.errors import CommandError

ACCEPTED = '{"role": ..., "content": ...}, the content a string or a list of {"type": "text", "text": ...}'
CALLS = ("tool_calls", "function_call")  # without which a conversation makes no sense
TEXTS = ("content", "reasoning_content", "reasoning", "thinking")
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
# where a template has nothing to write of a message's own, and OpenAI's format has null
SILENT = ("assistant", "tool", "function")

Message = dict[str, Any]


class Unusable(Exception):
    """Why a conversation cannot be learned from, where others of the data may be."""


class Written(NamedTuple):
    """text: what the model reads. spans: first and last character (exclusive) of what is learned. answers: how many turns were to
    be learned. learned: how many are. notes: what the template leaves out of them."""

    text: str
    spans: list[tuple[int, int]]
    answers: int
    learned: int
    notes: list[str]


def turns(messages: Sequence[Any], where: str) -> list[Message]:
    """Copies of the messages, the text parts of a content joined, and without the keys whose value is null.

    Raises CommandError that names the message, and where its content is not text the kind of it.
    """
    found = []
    for number, message in enumerate(messages, 1):
        here = f"{where} {number}"
        if not isinstance(message, Mapping):
            raise CommandError(f"{here} is {what(message)}; accepted: {ACCEPTED}")
        if not isinstance(message.get("role"), str):
            shared = " (ShareGPT's names, from and value, are not read)" if "from" in message else ""
            held = ", ".join(f'"{name}"' for name in message) or "nothing"
            raise CommandError(f"{here} has no role, but {held}{shared}; accepted: {ACCEPTED}")
        here += f" ({message['role']})"
        kept = {name: value for name, value in message.items() if value is not None}
        content = kept.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            kept["content"] = "".join(_text_of(part, f"{here}: part {place}") for place, part in enumerate(content, 1))
        elif not isinstance(content, str) and not (content is None and message["role"] in SILENT):
            raise CommandError(f"{here} has the content {what(content)}; accepted: {ACCEPTED}")
        found.append(kept)
    return found


def tools_of(value: Any, where: str) -> list[Any] | None:
    """The tools of a record: a list of JSON schemas, or that as text. Raises CommandError for anything else."""
    if isinstance(value, str) and value.strip():
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not value:
        return None
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise CommandError(f"{where}: tools is {what(value)}; accepted: a list of JSON schemas, or the JSON text of one")
    return list(value)


def written(
    messages: Sequence[Message],
    learned: Collection[int],
    tokenizer: Any,
    template: str,
    *,
    tools: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Written:
    """A conversation as the template writes it, through the last of the turns that are learned.

    messages: of ``turns``. learned: places in it of those that the model is to write. template: Jinja. tools, options: what else
    the template is given.

    Raises Unusable where the template refuses it, leaves out its tool calls, or tells none of the learned turns from the rest.
    """
    write = _writer(tokenizer, template, tools, options)
    if not learned:
        return Written("", [], 0, 0, [])
    form = _accepted(messages[: max(learned) + 1], lambda part: write(part)[0])
    text, marks = write(form)
    marked = MARKED.search(template) is not None
    find = _between_marks if marked else _by_prefixes
    found = find(form, sorted(learned), text, marks, write)
    if not any(found.values()):
        raise Unusable(
            "the chat template marks nothing of its answers with {% generation %}"
            if marked
            else f"the chat template writes earlier turns anew when message {len(form)} is added, so the assistant's tokens cannot "
            "be told from the rest"
        )
    notes = []
    if tools is not None and _is(text, lambda part: write(part, given=None)[0], form):
        notes.append("with tools that the chat template does not write")
    own = {turn: _squeezed("".join(text[start:end] for start, end in spans)) for turn, spans in found.items() if spans}
    for name in TEXTS:
        values = ((turn, messages[turn].get(name)) for turn in own)
        # some open a turn with <think>, which an answer may repeat
        if any(isinstance(value, str) and _squeezed(value).removeprefix("<think>") not in own[turn] for turn, value in values):
            notes.append(f"with answers of which the chat template leaves out or changes some of the {name}")
    spans = [span for each in found.values() for span in each]
    return Written(text, spans, len(found), sum(map(bool, found.values())), notes)


def asked(
    messages: Sequence[Message], tokenizer: Any, template: str, *, tools: Sequence[Any] | None, options: Mapping[str, Any] | None
) -> str:
    """A conversation without answers as the template writes it, with what it opens the answer with. The rest as ``written``."""
    write = _writer(tokenizer, template, tools, options)
    return write(_accepted(messages, lambda part: write(part)[0]), prompt=True)[0]


Write = Callable[..., tuple[str, list[tuple[int, int]]]]


def _writer(tokenizer: Any, template: str, tools: Sequence[Any] | None, options: Mapping[str, Any] | None) -> Write:
    """What makes text of messages, and of the template's own marks the characters between them."""
    marked = MARKED.search(template) is not None

    def write(part: Sequence[Message], *, prompt: bool = False, given: Any = tools) -> tuple[str, list[tuple[int, int]]]:
        try:
            made: Any = render_jinja_template(  # texts and marks of several conversations, typed as one text
                conversations=[list(part)],
                tools=given,
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **{**tokenizer.special_tokens_map, **(options or {})},
            )
        except Exception as error:  # a template raises what it likes
            raise Unusable(f"the chat template refuses it: {' '.join(str(error).split())}") from error
        return made[0][0], [(start, end) for start, end in made[1][0]] if marked else []

    return write


def _between_marks(
    form: Sequence[Message], learned: Sequence[int], text: str, marks: list[tuple[int, int]], write: Write
) -> dict[int, list[tuple[int, int]]]:
    """The spans of each learned turn, by the template's own marks: those that it adds with the turn."""
    answers = [turn for turn, message in enumerate(form) if message["role"] == "assistant"]
    if answers == list(learned) and len(marks) == len(answers):
        return {turn: [span] for turn, span in zip(learned, marks, strict=True)}
    counts = [len(write(form[:turn])[1]) if turn else 0 for turn in learned], [len(write(form[: turn + 1])[1]) for turn in learned]
    return {turn: marks[first:last] for turn, first, last in zip(learned, *counts, strict=True)}


def _by_prefixes(
    form: Sequence[Message], learned: Sequence[int], text: str, marks: list[tuple[int, int]], write: Write
) -> dict[int, list[tuple[int, int]]]:
    """The span of each learned turn; none where what was written through that turn is not how the whole begins."""
    found: dict[int, list[tuple[int, int]]] = {}
    for turn in learned:
        through = write(form[: turn + 1])[0]
        start = _start(form[: turn + 1], through, write)
        found[turn] = [(start, len(through))] if start is not None and text.startswith(through) else []
    return found


def _start(form: Sequence[Message], through: str, write: Write) -> int | None:
    """Where the last turn's own text begins in ``through``: behind what opens it. None where earlier turns were rewritten."""
    before, content = form[:-1], _content(form[-1])
    if not before:
        return 0
    opened = write(before, prompt=True)[0]
    if through.startswith(opened):
        return len(opened)
    # Some open a turn with more than they keep of it, as with <think>.
    plain = write(before)[0]
    if not (through.startswith(plain) and opened.startswith(plain)):
        return None
    differs = next(place for place in range(len(opened)) if opened[place] != through[place : place + 1])
    begins = through.find(content, len(plain))
    return min(differs, begins) if content and begins >= 0 else differs


def _accepted(messages: Sequence[Message], write: Callable[[Sequence[Message]], str]) -> Sequence[Message]:
    """The messages in the first form that the template takes, and with which it writes the calls of tools."""
    reason: Unusable | None = None
    silent = True  # whether only forms without some content were refused, which says little
    for form in _forms(messages):
        try:
            text = write(form)
        except Unusable as error:
            if silent:
                reason, silent = error, any("content" not in message for message in form)
            continue
        reason = _left_out(form, text, write)
        if reason is None:
            return form
        silent = False
    assert reason is not None
    raise reason


def _left_out(form: Sequence[Message], text: str, write: Callable[[Sequence[Message]], str]) -> Unusable | None:
    """What is wrong with what the template made of a form of the messages, without complaint."""
    if any(isinstance(each, Mapping) and each and str(each) in text for each in _arguments(form)):
        return Unusable("the chat template writes the arguments of tool_calls in Python's form, not as JSON")
    for name in CALLS:
        places = [number for number, message in enumerate(form, 1) if name in message]
        if places and _is(text, write, _without(form, name)):
            return Unusable(f"the chat template does not write {name} (message {places[0]})")
    contents = [content for message in form if (content := _content(message))]
    if contents and not any(_squeezed(content) in _squeezed(text) for content in contents):
        return Unusable("the chat template writes none of its text")
    return None


def _content(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Templates want the arguments of calls as an object or as text, of a turn without text no content, an empty one, or null, and
    of the others, where the model takes images too, a list of parts."""
    calls = any(name in message for message in messages for name in CALLS)
    for change in (_as_object, _as_text) if calls else (None,):
        form = [dict(message) for message in messages]
        for message in form:
            if "tool_calls" in message and isinstance(message["tool_calls"], Sequence) and change is not None:
                message["tool_calls"] = [_with_arguments(call, change) for call in message["tool_calls"]]
        yield form
        if any("content" not in message for message in form):
            yield [{"content": "", **message} for message in form]
            yield [{"content": None, **message} for message in form]
        yield [{**message, "content": [{"type": "text", "text": message.get("content", "")}]} for message in form]


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _arguments(messages: Sequence[Message]) -> list[Any]:
    """Of all calls."""
    calls = [call for message in messages for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    return [each.get("arguments") for call in calls for each in (call, call.get("function")) if isinstance(each, Mapping)]


def _as_object(arguments: Any) -> Any:
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, Mapping) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _without(messages: Sequence[Message], name: str) -> list[Message]:
    return [{key: value for key, value in message.items() if key != name} for message in messages]


def _is(text: str, write: Callable[[Sequence[Message]], str], messages: Sequence[Message]) -> bool:
    try:
        return write(messages) == text
    except Unusable:
        return False


def _text_of(part: Any, here: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = f"of type {part.get('type')!r}" if isinstance(part, Mapping) and part.get("type") != "text" else what(part)
    raise CommandError(f"{here} of its content is {kind}; accepted: text alone, {{'type': 'text', 'text': ...}}")


def _squeezed(text: str) -> str:
    return "".join(text.split())


def without_nulls(value: Any) -> Any:
    """Without the keys that Arrow adds to all objects of a column where one has them."""
    if isinstance(value, Mapping):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def what(value: Any) -> str:
    """A value's kind in the words of JSON."""
    names = {str: "a string", list: "a list", dict: "an object", type(None): "null", bool: "a truth value"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")
