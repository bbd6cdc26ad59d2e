"""What tests of transformers' models share. It is imported where it is used: transformers may not be installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def llama() -> Any:
    from tests.support.tiny_models import build

    return build("llama")


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a student and a teacher of Llama, GPT-2 and Gemma 2, each with the same tokenizer, and a text."""
    from tests.support.data import tokenizer
    from tests.support.distilling import TEXT
    from tests.support.tiny_models import build

    folder = tmp_path_factory.mktemp("given")
    made = tokenizer()
    wider = {"hidden_size": 24, "intermediate_size": 40}
    for family, more in (("llama", wider), ("gpt2", {"n_embd": 24}), ("gemma2", wider)):
        for role in ("student", "teacher"):
            name = folder / (role if family == "llama" else f"{family}_{role}")
            sizes = more if role == "teacher" else {}
            build(family, vocab_size=len(made), seed=len(role), **sizes).save_pretrained(name)
            made.save_pretrained(name)
    (folder / "text.txt").write_text(TEXT)
    return folder
