"""Models and tokenizers from folders or from the hub, with what goes wrong told in one line.

transformers fills in what a folder lacks: weights that are missing are drawn at random, a tokenizer without files knows only its
special tokens, and an encoder is loaded as if it were causal. None of that can be meant for distillation, so it is refused here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkernels.errors import CommandError
from kdkernels.transformers.modes import evaluating, restored

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
    name = _existing(name_or_path, "config.json", "adapter_config.json")
    model, report = _from(name, AutoModelForCausalLM.from_pretrained, dtype=dtype, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise _refused(name, f"{len(missing)} of the weights of {type(model).__name__} are missing, {missing[0]} for one")
    if not _causal(model):
        raise _refused(name, f"{type(model).__name__} lets a token see the tokens after it: not a causal language model")
    return model


def load_tokenizer(name_or_path: str | Path) -> Any:
    """The tokenizer of a folder or of a name of the hub, one of the ``tokenizers`` library (a "fast" one).

    Raises CommandError where there is none, or where it knows no token but the special ones.
    """
    name = _existing(name_or_path)
    tokenizer = _from(name, AutoTokenizer.from_pretrained)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise _refused(name, "it has no tokenizer: no files of one, and so no tokens but the special ones")
    if not tokenizer.is_fast:
        raise _refused(
            name, f"{type(tokenizer).__name__} is not a tokenizer of the tokenizers library, which tells where tokens stand"
        )
    return tokenizer


def _existing(name_or_path: str | Path, *files: str) -> str:
    """The argument as text. What can only be a path must exist, and a folder must hold one of the files, where any are named."""
    name, path = os.fspath(name_or_path), Path(name_or_path).expanduser()
    if name and path.is_dir():
        if files and not any((path / file).is_file() for file in files):
            raise _refused(str(path), f"the folder holds no {files[0]}")
        return str(path)
    if name and path.exists():
        raise _refused(str(path), "a file; accepted: a folder that save_pretrained wrote, or a name of the hub")
    # a name of the hub is NAME or OWNER/NAME
    if isinstance(name_or_path, Path) or not name or name.count("/") > 1 or name[0] in "./~" or any(map(str.isspace, name)):
        raise _refused(name, "there is no such folder")
    return name


def _from(name: str, load: Callable[..., Any], **options: Any) -> Any:
    try:
        return load(name, trust_remote_code=False, **options)
    except Exception as error:  # of a dozen classes, by file format and library: whatever it is, it is about this model
        raise _refused(name, _reason(error)) from error


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


def _causal(model: Any) -> bool:
    """Whether a token's logits are free of what follows it.

    Only classes that also exist as encoders say is_decoder; GPT-NeoX says False and is causal all the same, so those are tried out.
    """
    if getattr(model.config, "is_decoder", True):
        return True
    with torch.no_grad(), restored(model), evaluating(model):
        first, second = model(input_ids=torch.tensor([[0, 1], [0, 2]], device=model.device)).logits[:, 0].double()
    rounding = torch.finfo(model.dtype).eps ** 0.5
    return bool((first - second).abs().max() <= rounding * first.abs().max())


def _refused(name: str, reason: str) -> CommandError:
    return CommandError(f"{name!r} cannot be loaded: {reason}")
