"""The text: Python sources of the running interpreter, which every machine has, as tokens of a BPE vocabulary learned on them."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from kdkernels.console import files
from kdkernels.demo.settings import Settings, fingerprint
from kdkernels.errors import CommandError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER = "tokenizer.json"
# Not part of the standard library, or not everywhere installed with it, or tables rather than code.
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
HELD_OUT_OF_256 = 13  # about 5 % of the files


@dataclass(frozen=True)
class Corpus:
    """Token streams, files joined by the end-of-text token.

    train, heldout: (tokens,) int32, of different files. key: changes with the sources, the vocabulary and the libraries.
    facts: counts for the report.
    """

    train: Tensor
    heldout: Tensor
    key: str
    facts: dict[str, Any]

    def batch(self, settings: Settings, stream: str, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels (batch, window) of a training step; a function of its arguments, so resuming needs no generator."""
        name = f"{settings.seed} {stream} {step}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))
        starts = torch.randint(self.train.numel() - settings.window, (settings.batch,), generator=generator)
        return _windows(self.train, starts, settings.window)

    def held_out(self, windows: int, window: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels (windows, window), evenly spread over the held-out files and without overlap."""
        room = (self.heldout.numel() - 1) // window
        places = torch.arange(min(windows, room)) * room // min(windows, room)
        return _windows(self.heldout, places * window, window)

    def frequency_loss(self) -> float:
        """Held-out loss, in nats, of always predicting each token's frequency in the training files: what no learning gives."""
        vocab = int(max(self.train.max(), self.heldout.max())) + 1
        counts = self.train.bincount(minlength=vocab).double() + 1.0
        return float(-(counts / counts.sum()).log()[self.heldout.long()].mean())


def _windows(stream: Tensor, starts: Tensor, window: int) -> tuple[Tensor, Tensor]:
    chosen = stream[starts[:, None] + torch.arange(window + 1)].long()
    return chosen[:, :-1], chosen[:, 1:]


def held_out(name: str) -> bool:
    """Whether a file is held out: by its path alone, so that other files coming or going change nothing."""
    return hashlib.sha256(name.encode()).digest()[0] < HELD_OUT_OF_256


def sources(limit: int | None = None) -> list[tuple[str, str]]:
    """Relative path and text of every source file, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts):
            try:
                text = path.read_bytes().decode("utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text:
                found.append((relative.as_posix(), text))
        if len(found) == limit:
            break
    return found


def prepare(settings: Settings, folder: Path, say: Callable[[str], None]) -> Corpus:
    """The corpus, from the folder's cache where the sources and settings are still the same, else made and cached."""
    found = sources(settings.files)
    contents = hashlib.sha256()
    for name, text in found:
        contents.update(f"{name}\0{text}\0".encode())
    key = fingerprint(contents=contents.hexdigest(), vocab=settings.vocab, tokenizers=tokenizers.__version__, python=sys.version)
    cache = folder / "corpus.safetensors"
    if cache.exists():
        streams, about = files.load(cache)
        if about.get("key") == key:
            say("corpus and vocabulary: from the cache")
            return Corpus(streams["train"], streams["heldout"], key, about["facts"])
    kept = [text for name, text in found if not held_out(name)]
    tested = [text for name, text in found if held_out(name)]
    if not kept or not tested:
        raise CommandError(
            f"too few Python sources under {sysconfig.get_paths()['stdlib']}: {len(found)} files; the demo reads them"
        )
    say(f"learning a vocabulary of {settings.vocab:,} tokens on {len(kept):,} Python files")
    tokenizer = learn(kept, settings.vocab)
    say("encoding the files")
    train, heldout = encode(tokenizer, kept), encode(tokenizer, tested)
    if min(train.numel(), heldout.numel()) <= settings.window + 1:
        raise CommandError(f"the Python sources hold only {train.numel()} + {heldout.numel()} tokens; the demo needs more")
    facts = {
        "train_files": len(kept),
        "heldout_files": len(tested),
        "train_tokens": train.numel(),
        "heldout_tokens": heldout.numel(),
        "vocab": tokenizer.get_vocab_size(),
        "python": sys.version.split()[0],
    }
    files.write(folder / TOKENIZER, tokenizer.to_str().encode())
    files.save(cache, {"train": train, "heldout": heldout}, {"key": key, "facts": facts})
    return Corpus(train, heldout, key, facts)


def learn(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE vocabulary: every text can be encoded, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(texts):
        ids += encoding.ids
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int32)
