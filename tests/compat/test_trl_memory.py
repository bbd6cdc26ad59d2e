"""Inside TRL's trainers the loss takes less memory than theirs, and logits are never whole."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("peft")

import kdkernels as kd
from tests.support.cases import InsideOperators
from tests.support.memory import peak_above
from tests.support.tiny_models import VOCAB
from tests.support.trl import TRAINERS, batch, both_trainers, child_environment, data, loss_and_gradients, models, trainer_of


def peaks(kind: str, folder: Path, vocab: int = 30_000, sequences: int = 4, length: int = 64) -> list[int]:
    """Bytes above the start of one loss with its gradients: with the patch, then without."""
    os.environ["CI"] = "1"
    pair = models(dtype=torch.float32, vocab_size=vocab)
    trainer = trainer_of(kind, folder, pair, train_dataset=data(kind, 1, vocab), args={"beta": 0.5})
    ids = torch.randint(5, vocab, (sequences, length))
    ones = torch.ones_like(ids)
    if kind == "gkd":
        large = {"input_ids": ids, "attention_mask": ones, "labels": ids}
    else:
        large = {"prompt_ids": ids[:, :4], "prompt_mask": ones[:, :4], "completion_ids": ids, "completion_mask": ones}
    found = []
    for block in (TRAINERS[kind][1](), nullcontext()):
        with block:
            loss_and_gradients(trainer, batch(kind))  # what is loaded, or allocated for good, by the first
            kd.free_scratch()
            ctypes.CDLL(None).malloc_trim(0)  # else what was freed so far would be used without a rise
            found.append(peak_above(lambda: loss_and_gradients(trainer, large)))
    return found


class Wide(InsideOperators):
    """The most rows that anything as wide as the vocabulary has had; a head's weight seen from the side is not meant."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def after(self, name: str, made: Any) -> None:
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, Tensor) and one.dim() > 1 and one.shape[-1] == VOCAB and name not in ("aten::t", "aten::transpose"):
                self.rows = max(self.rows, one.numel() // VOCAB)


class TestMemory:
    @both_trainers
    def test_logits_are_never_whole(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the scratch allows a few rows, of the batch's tokens no more have logits at one time."""
        monkeypatch.setattr("kdkernels.losses.operators.default_budget", lambda _: 1)
        trainer, inputs = trainer_of(kind, tmp_path), batch(kind)
        tokens = int((inputs["labels"] != -100).sum() if kind == "gkd" else inputs["completion_mask"].sum())
        with Wide() as theirs:
            loss_and_gradients(trainer, inputs)
        with TRAINERS[kind][1]():
            trainer.compute_loss(trainer.model, inputs)  # the heads are verified by now, with a few logits
            with Wide() as ours:
                loss_and_gradients(trainer, inputs)
        assert 0 < ours.rows < tokens <= theirs.rows

    def test_less_memory_at_a_vocabulary_that_is_large_beside_the_model(self, tmp_path: Path) -> None:
        program = "import json, sys; from pathlib import Path; from tests.compat.test_trl_memory import TRAINERS, peaks\n"
        program += "print(json.dumps([peaks(kind, Path(sys.argv[1])) for kind in TRAINERS]))"
        child = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
        done = subprocess.run(child, capture_output=True, text=True, check=True, env=child_environment())
        for ours, theirs in json.loads(done.stdout.splitlines()[-1]):
            assert 0 < ours < 0.5 * theirs, (ours / 2**20, theirs / 2**20)
