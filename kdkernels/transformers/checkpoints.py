"""The state of a training's parts in the Trainer's checkpoints: a file of all, and one for each rank where a part differs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdkernels.transformers.methods.base import Part

STATE = "distillation.pt"


def save(parts: Sequence[Part], folder: Path, args: Any) -> None:
    """args: a KDConfig. Every process calls this."""
    states = [part.state_dict() for part in parts]
    if args.should_save:
        shared = {part.key: state for part, state in zip(parts, states, strict=True) if part.key and not part.per_rank}
        torch.save({"method": args.method, **shared}, folder / STATE)
    for part, state in zip(parts, states, strict=True):
        if part.per_rank:
            folder.mkdir(parents=True, exist_ok=True)  # this rank may be here before the first one
            torch.save(state, _of_rank(part, folder, args))


def load(parts: Sequence[Part], folder: Path, args: Any) -> None:
    """Raises ValueError where the checkpoint is another run's, or lacks a part's state."""
    if not (folder / STATE).exists():
        raise ValueError(f"resume_from_checkpoint={folder} has no {STATE}: it was not made by KDTrainer, or save_only_model")
    shared = _read(folder / STATE)
    if shared["method"] != args.method:
        raise ValueError(f"{folder} was made with method {shared['method']!r}; this run has method={args.method!r}")
    for part in parts:
        if part.per_rank:
            own = _of_rank(part, folder, args)
            if not own.exists():
                raise ValueError(f"resume_from_checkpoint={folder} has no {own.name}: {part.absent}")
            part.load_state_dict(_read(own))
        elif part.key:
            part.load_state_dict(shared[part.key])


def load_best(parts: Sequence[Part], folder: Path) -> None:
    """The student has the weights of this checkpoint again; what has none of its own stays where training has it."""
    if (folder / STATE).exists():
        shared = _read(folder / STATE)
        for part in parts:
            if part.key and not part.per_rank:
                part.load_best(shared[part.key])


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _of_rank(part: Part, folder: Path, args: Any) -> Path:
    return folder / f"{part.key}_{args.process_index}.pt"
