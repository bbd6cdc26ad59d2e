"""The head that a model's config.json describes: in a folder, in the hub's cache on this machine, or on the hub.

Nothing is loaded, and transformers is only asked for the defaults of what a config.json leaves out.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from kdkernels.cli.models import HEADS, LARGEST, SIZES, HeadShape, of_table, plain

# Seconds that an answer of the hub is waited for.
PATIENCE = 3.0
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*|[A-Za-z][\w.-]*", re.ASCII)
# A multimodal model keeps its language model's configuration in one of these.
PARTS = ("text_config", "llm_config", "language_config")
# What models call the width that their head multiplies, if several are there the first (OPT projects its states before the head).
WIDTHS = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model")

ACCEPTED = "a folder with a config.json, a name of the hub, sizes VxD such as 151936x896"


def hub_name(text: str) -> bool:
    """Whether this can be a name of the hub, NAME or OWNER/NAME."""
    return bool(HUB_NAME.fullmatch(text)) and not text.endswith((".json", ".safetensors", ".gguf"))


def not_a_model(text: str) -> str:
    """Why text that is neither a folder nor sizes nor a name of the hub names no model."""
    if text and Path(text).expanduser().exists():
        return "a file, not a folder"
    return "there is no such folder" if "/" in text or os.sep in text or text.startswith((".", "~")) else "neither sizes nor a name"


def of_folder(folder: Path, name: str, tokenizer: str = "") -> HeadShape:
    """The head of a model that save_pretrained wrote, or of the base of a PEFT adapter. Raises ValueError where there is none."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            return _of_adapter(folder, name)
        if (folder / "kdkernels-cache.json").is_file():
            raise ValueError(f"the folder {name!r} is a cache of log-probabilities; a step with one is not planned here")
        inside = next((part for part in ("student", "model") if (folder / part / "config.json").is_file()), None)
        meant = f"; {Path(name) / inside} does" if inside else ""
        raise ValueError(f"the folder {name!r} holds no config.json{meant}")
    head = _described(_parsed(folder / "config.json"), name)
    return HeadShape(head.vocab, head.dim, name, tokenizer, folder)


def _of_adapter(folder: Path, name: str) -> HeadShape:
    base = _parsed(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"the folder {name!r} holds an adapter that names no base_model_name_or_path")
    if Path(base).expanduser().resolve() == folder.resolve():
        raise ValueError(f"the folder {name!r} holds an adapter that names itself as its base")
    found = head_shape(base)
    return HeadShape(found.vocab, found.dim, name, found.tokenizer, found.folder)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no names with values")
    return config


def _described(config: dict[str, Any], name: str) -> HeadShape:
    if config.get("is_encoder_decoder") is True:
        raise ValueError(f"{name!r} is an encoder-decoder; accepted: causal language models")
    vocab, dim = _sizes(config)
    if vocab is None or dim is None:
        with contextlib.suppress(Exception):  # of many classes, by model: then what is missing is said below
            from transformers import AutoConfig

            given = {key: value for key, value in config.items() if key != "model_type"}
            vocab, dim = _sizes(AutoConfig.for_model(config["model_type"], **given).get_text_config().to_dict())
    for what, size in (("vocab_size", vocab), ("hidden_size", dim)):
        if size is None:
            raise ValueError(f"the config.json of {name!r} names no {what}, and transformers has no default for it here")
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST:
            raise ValueError(f"the config.json of {name!r} has {what} {size!r}; accepted: an integer from 1 to {LARGEST}")
    assert vocab is not None
    assert dim is not None
    return HeadShape(vocab, dim, name)


def _sizes(config: dict[str, Any]) -> tuple[int | None, int | None]:
    part: dict[str, Any] = next((config[name] for name in PARTS if isinstance(config.get(name), dict)), config)
    dim = next((part[name] for name in WIDTHS if part.get(name) is not None), None)
    return part.get("vocab_size"), dim


def cached(name: str) -> Path | None:
    """The folder in the hub's cache that holds the config.json of a model, the one that "main" was when it was downloaded."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub").expanduser()
    model = cache / f"models--{name.replace('/', '--')}"
    try:
        main = (model / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = model / "snapshots" / main
    return folder if main and (folder / "config.json").is_file() else None


def of_hub(name: str) -> HeadShape:
    """The head of a model of the hub, whose config.json is fetched. Raises ValueError where it is not had within PATIENCE."""
    if any(
        os.environ.get(switch, "").upper() in {"1", "ON", "YES", "TRUE"} for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        raise ValueError("its config.json is not in the hub's cache here, and the hub is not asked (HF_HUB_OFFLINE)")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    answer: list[bytes | Exception] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{endpoint.rstrip('/')}/{name}/resolve/main/config.json", timeout=PATIENCE) as response:
                answer.append(response.read(2**24))
        except urllib.error.HTTPError as error:
            error.close()
            answer.append(error)
        except Exception as error:  # of many classes, all of them said below
            answer.append(error)

    # Looking up an address has no time limit of its own, so it is a thread that is waited for.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    got = answer[0] if answer else TimeoutError()
    if isinstance(got, urllib.error.HTTPError):
        raise ValueError(f"the hub gives no config.json of it (status {got.code}: no such model, or one that takes a login)")
    if isinstance(got, Exception):
        raise ValueError("neither a folder nor in the hub's cache here, and the hub cannot be reached")
    try:
        config = json.loads(got)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError("what the hub gives as its config.json is none")
    return _described(config, name)


class _Vocabulary:
    """The part of a tokenizer that ``shared_vocabulary`` reads."""

    def __init__(self, ids: dict[str, int]) -> None:
        self.ids = ids

    def get_vocab(self) -> dict[str, int]:
        return self.ids


def vocabulary(folder: Path | None) -> _Vocabulary | None:
    """The tokens of a folder's tokenizer.json and their ids; None where there is none that can be read."""
    try:
        content = json.loads(((folder or Path("/nonexistent")) / "tokenizer.json").read_text(encoding="utf-8"))
        tokens = content["model"]["vocab"]
        ids = dict(tokens) if isinstance(tokens, dict) else {token: at for at, (token, _) in enumerate(tokens)}
        return _Vocabulary(ids | {token["content"]: token["id"] for token in content.get("added_tokens", ())})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def head_shape(text: str) -> HeadShape:
    """The head of a folder with config.json, of sizes VxD such as 151936x896, or of a model by name: of the table, in any case, or
    of the hub. ValueError says what is wrong and what is accepted.

    A name of the hub means what its config.json says, where that is in the hub's cache here; else the table's model of that owner,
    however it was trained on (Qwen/Qwen2.5-7B-Instruct has the head of Qwen2.5-7B); else the hub is asked.
    """
    if text and Path(text).expanduser().is_dir():
        return of_folder(Path(text).expanduser(), text)
    if found := SIZES.fullmatch(text):
        vocab, dim = int(found[1]), int(found[2])
        if 1 <= vocab <= LARGEST and 1 <= dim <= LARGEST:
            return HeadShape(vocab, dim, text)
    if not hub_name(text):
        raise ValueError(_unknown(text, not_a_model(text)))
    known = of_table(text)
    folder = cached(text)
    if folder is not None:
        return of_folder(folder, text, known.tokenizer if known else "")
    if known is not None:
        return HeadShape(known.vocab, known.dim, text, known.tokenizer)
    try:
        return of_hub(text)
    except ValueError as error:
        raise ValueError(_unknown(text, str(error))) from error


def _unknown(text: str, reason: str) -> str:
    known = {name.lower(): name for name in HEADS}
    near = difflib.get_close_matches(plain(text.rpartition("/")[2]), known, n=1)
    meant = f"; if its head is that of {known[near[0]]}, give that name" if near else ""
    # whoever wrote a path or an owner looks for no name of the table
    names = "a name that plan --help lists" if "/" in text else f"one of {', '.join(HEADS)}"
    return f"got {text!r}: {reason}{meant}; accepted: {ACCEPTED}, or {names}"


def check_tokenizers(student: HeadShape, teacher: HeadShape, vocab_size: int | None = None) -> bool:
    """Whether both heads' rows were found to be the same tokens; False where that is not known of one of them.

    vocab_size: look at the first so many rows, where both tokenizers are here, as ``distill`` does.

    Raises ValueError where they are not the same: distillation compares two distributions over one vocabulary, token by token.
    """
    if student.tokenizer and teacher.tokenizer:
        if student.tokenizer != teacher.tokenizer:
            raise ValueError(f"the tokenizers differ, {student.tokenizer}'s and {teacher.tokenizer}'s")
        return True
    vocabularies = [vocabulary(head.folder) for head in (student, teacher)]
    if vocabularies[0] is None or vocabularies[1] is None:
        return False
    from kdkernels.transformers.vocabularies import shared_vocabulary

    shared_vocabulary(*vocabularies, vocab_size=vocab_size)
    return True
