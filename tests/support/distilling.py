"""Short runs of ``python -m kdkernels distill``, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("rich")

import transformers

from kdkernels.transformers.distill.report import Watch
from tests.support.training import assert_same

TEXT = "The cat sat on the mat, and the rat sat on the cat. " * 12


def arguments(given: Path, out: Path, *more: str, **options: Any) -> list[str]:
    """Of a short run; ``options`` replace what stands here, and None leaves it out."""
    all_of_them: dict[str, Any] = {
        "teacher": given / "teacher",
        "student": given / "student",
        "data": given / "text.txt",
        "method": "forward_kl",
        "out": out,
        "max_length": 16,
        "batch_size": 4,
        "steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        **options,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in all_of_them.items() if value is not None]
    return ["distill", *flags, *more]


def cache_of(teacher: Path, data: Path, out: Path, *more: str) -> list[str]:
    """Of the command that makes a cache."""
    return ["cache", f"--teacher={teacher}", f"--data={data}", f"--out={out}", *more]


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


def assert_same_student(one: Path, other: Path) -> None:
    """Of two runs."""
    assert_same(weights(one / "student"), weights(other / "student"))


def learned(folder: Path, before: Path) -> bool:
    """Whether the weights in ``folder`` are finite and others than those in ``before``."""
    new, old = weights(folder), weights(before)
    assert all(tensor.isfinite().all() for tensor in new.values())
    return any(not torch.equal(new[name], old[name]) for name in old)


def swap_tokens(folder: Path) -> None:
    """Exchange the ids of two tokens of the tokenizer in a folder."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def interrupted_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    before = Watch.step

    def stop(self: Any, at: int) -> None:
        before(self, at)
        if at == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "step", stop)
