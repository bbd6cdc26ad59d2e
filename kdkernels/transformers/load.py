"""Models and tokenizers from folders or from the hub, with what goes wrong told in one line.

transformers fills in what a folder lacks: weights that are missing are drawn at random, a tokenizer without files knows only its
special tokens, and an encoder is loaded as if it were causal. None of that can be meant for distillation, so it is refused here.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkernels.errors import CommandError
from kdkernels.transformers import hub
from kdkernels.transformers.modes import evaluating, restored

MODEL = ("config.json", "adapter_config.json")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_model(name_or_path: str | Path, *, dtype: str = "auto") -> Any:
    """A causal language model, in eval mode, on the CPU.

    name_or_path: a folder that ``save_pretrained`` wrote (of a model, or of a PEFT adapter, which is loaded with its base), or a
        name of the hub. Code that comes with a model is not run.
    dtype: of the weights: "float32", "bfloat16", "float16", "float64", or "auto", as they were saved.

    Raises CommandError where there is no such model, where weights are missing or damaged, and where the model is not a causal
    language model; ValueError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}; got {dtype!r}")
    name = _existing(name_or_path, of_model=True)
    model, report = _from(name, AutoModelForCausalLM.from_pretrained, dtype=dtype, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise _refused(name, f"{len(missing)} of the weights of {type(model).__name__} are missing, {missing[0]} for one")
    if not is_causal(model):
        raise _refused(name, f"{type(model).__name__} lets a token see the tokens after it: not a causal language model")
    return model


def load_tokenizer(name_or_path: str | Path) -> Any:
    """The tokenizer of a folder or of a name of the hub, one of the ``tokenizers`` library (a "fast" one).

    Raises CommandError where there is none, or where it knows no token but the special ones.
    """
    name = _existing(name_or_path, of_model=False)
    tokenizer = _from(name, AutoTokenizer.from_pretrained)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise _refused(name, "it has no tokenizer: no files of one, and so no tokens but the special ones")
    if not tokenizer.is_fast:
        raise _refused(
            name, f"{type(tokenizer).__name__} is not a tokenizer of the tokenizers library, which tells where tokens stand"
        )
    return tokenizer


def _existing(name_or_path: str | Path, *, of_model: bool) -> str:
    """The argument as text. What can only be a path must exist, and a model's folder must hold its configuration."""
    name, path = os.fspath(name_or_path), Path(name_or_path).expanduser()
    if name and path.is_dir():
        # a tokenizer's files have many names: its folder is refused only where it is known to be of something else
        enough = MODEL if of_model else (*MODEL, "tokenizer.json", "tokenizer_config.json")
        if not _holds(path, enough) and ((meant := _meant(path)) or of_model):
            raise _refused(str(path), f"the folder holds no {MODEL[0]}{meant}")
        return str(path)
    if name and path.exists():
        meant = f"; the folder {path.parent} is meant?" if _holds(path.parent, MODEL) else ""
        raise _refused(str(path), f"a file; accepted: a folder that save_pretrained wrote, or a name of the hub{meant}")
    if isinstance(name_or_path, Path) or not hub.NAME.fullmatch(name):
        raise _refused(name, f"there is no such folder{_nearest(path)}")
    return name


def _holds(folder: Path, files: tuple[str, ...]) -> bool:
    return any((folder / file).is_file() for file in files)


def _meant(folder: Path) -> str:
    """What a folder without a model is, and where the model may be that was meant."""
    if (folder / "kdkernels-cache.json").is_file():
        return ": it is a cache of a teacher's log-probabilities, which distill takes as its --teacher"
    if (folder / "kdkernels-distill.json").is_file():
        if _holds(folder / "student", MODEL):
            return f": it is a run of distill, whose student is {folder / 'student'}"
        return f": it is a run of distill that has no student yet (--resume --out {folder} finishes it)"
    # beside it, as where models of several sizes lie, or in the hub's cache
    inside = sorted({path.parent for file in MODEL for depth in ("*", "snapshots/*") for path in folder.glob(f"{depth}/{file}")})
    return f"; {'one' if len(inside) == 1 else 'some'} inside do: {', '.join(map(str, inside[:3]))}" if inside else ""


def _nearest(path: Path) -> str:
    """The folder beside a missing one whose name is most like its own."""
    try:
        beside = [each.name for each in path.parent.iterdir() if each.is_dir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, beside, n=1)
    return f"; the nearest is {path.parent / found[0]}" if found else ""


def _from(name: str, load: Callable[..., Any], **options: Any) -> Any:
    path = Path(name)
    # A folder is complete, unless it is an adapter, whose base may have a name of the hub.
    remote = not path.is_dir() or _holds(path, ("adapter_config.json",))
    try:
        with hub.asked() if remote else contextlib.nullcontext():
            return load(name, trust_remote_code=False, **options)
    except Exception as error:  # of a dozen classes, by file format and library: whatever it is, it is about this model
        raise _refused(name, f"{_reason(error)}{'' if path.is_dir() else _nearest(path)}") from error


def _reason(error: Exception) -> str:
    """What to tell of an error of transformers: its first sentence, unless that is about something else than the cause."""
    causes = {type(cause).__name__ for cause in (error, error.__cause__, error.__context__)}
    if causes & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout"}:
        return "neither a folder nor in the hub's cache here, and the hub cannot be reached"
    if causes & {"RepositoryNotFoundError", "HFValidationError"}:
        return "neither a folder here nor a name that the hub knows"
    text = " ".join(str(error).split())
    if "Unrecognized configuration class" in text:
        return f"{text.split('.configuration_')[0].rsplit('.', 1)[-1]} models are not causal language models"
    if "ignore_mismatched_sizes" in text:
        return "its weights have other sizes than its config.json says"
    if "backend tokenizer" in text:
        return "it has no tokenizer that can be read"
    if type(error).__name__ == "SafetensorError":
        return f"its weights are damaged ({text})"
    return f"{text.split('. ')[0].removesuffix('.')} ({type(error).__name__})"


def is_causal(model: Any) -> bool:
    """Whether a token's logits are free of what follows it.

    Only classes that also exist as encoders say is_decoder; GPT-NeoX says False and is causal all the same, so those are tried out.
    """
    if getattr(model.config, "is_decoder", True):
        return True
    with torch.no_grad(), restored(model), evaluating(model):
        first, second = model(input_ids=torch.tensor([[0, 1], [0, 2]], device=model.device)).logits[:, 0].double()
    rounding = torch.finfo(model.dtype).eps ** 0.5
    # written so that NaN, which no model can be told by, passes: it is found in the weights
    return not bool((first - second).abs().max() > rounding * first.abs().max())


def _refused(name: str, reason: str) -> CommandError:
    return CommandError(f"{name!r} cannot be loaded: {reason}")
