"""What a demo run leaves for ``python -m kdkernels distill``: teacher, student and a text, as that command takes them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kdkernels.console import files
from kdkernels.demo.corpus import END_OF_TEXT, Corpus
from kdkernels.demo.models import Model
from kdkernels.demo.settings import Settings

TEXT = "text.txt"
METHOD = "reverse_kl"  # one that the demo does not show


def leave(folder: Path, models: Mapping[str, Model], tokenizer: Tokenizer, settings: Settings, corpus: Corpus) -> str:
    """Save the models in folders of their names, beside a text of the training files; returns the command that takes them."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(folder / name)
    tokens = settings.next_steps * 2 * settings.batch * settings.window
    files.write(folder / TEXT, tokenizer.decode(corpus.train[:tokens].tolist()).encode())
    command = [sys.executable, "-m", "kdkernels", "distill"]
    for name in models:
        command += [f"--{name}", str(folder / name)]
    command += ["--data", str(folder / TEXT), "--max-length", str(settings.window), "--method", METHOD]
    command += ["--steps", str(settings.next_steps), "--learning-rate", f"{settings.further_rate:g}"]
    return shlex.join([*command, "--out", str(folder / METHOD)])
