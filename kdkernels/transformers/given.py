"""What ``KDTrainer`` is given, looked at before any work is done: models, tokenizers, a cache, and the first examples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kdkernels.errors import CommandError
from kdkernels.transformers.batches.inputs import Inputs, check_examples, looked_at
from kdkernels.transformers.batches.layout import IGNORED
from kdkernels.transformers.cache import TOKENIZER, TopKCache, is_cache
from kdkernels.transformers.config import KDConfig
from kdkernels.transformers.heads import lm_head, output_module, unwrapped
from kdkernels.transformers.load import is_causal, load_model
from kdkernels.transformers.methods import SETTINGS
from kdkernels.transformers.padding import common_rows, tokenizer_at, tokenizer_of
from kdkernels.transformers.vocabularies import token_ids

logger = logging.getLogger(__name__)


def check_options(args: Any, options: Mapping[str, Any]) -> None:
    """options: the Trainer's."""
    if not isinstance(args, KDConfig):
        raise TypeError(f"args is a KDConfig, got {type(args).__name__}")
    for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func", "model_init"):
        if options.get(name) is not None:
            raise ValueError(f"{name} is not accepted: the loss is the trainer's own, of the given model, and makes no logits")
    if args.n_gpu > 1:
        raise ValueError(f"one process sees {args.n_gpu} GPUs, which transformers would run as DataParallel: start one for each")


def check_student(model: Any) -> None:
    """It learns something, and what it learns from is this loss alone."""
    base = unwrapped(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model ({type(base).__name__}) has no parameter that requires a gradient: there is nothing to train")
    if getattr(getattr(base, "config", None), "output_router_logits", False):
        raise ValueError(
            "model.config.output_router_logits asks for a loss that balances experts, which this loss does not add; accepted: False"
        )


def check_tokenizers(processing_class: Any, teacher_processing_class: Any) -> None:
    """Before any model is loaded: both can be compared, and the student's can be saved with it."""
    for name, given in (("processing_class", processing_class), ("teacher_processing_class", teacher_processing_class)):
        if given is not None:
            token_ids(given, name)
    if processing_class is not None and not hasattr(processing_class, "save_pretrained"):
        raise TypeError(
            f"processing_class is saved with the student, and {type(processing_class).__name__} has no save_pretrained; accepted: "
            "a tokenizer of transformers, for example PreTrainedTokenizerFast(tokenizer_object=...)"
        )


def check_model(model: Any, role: str) -> None:
    """It has its weights, and predicts a token without having seen it."""
    base = unwrapped(model)
    output_module(base)
    config = getattr(base, "config", None)
    empty = [name for name, parameter in base.named_parameters() if parameter.is_meta]
    if empty and getattr(base, "hf_device_map", None) is None:  # accelerate keeps what it offloads elsewhere
        wrong = f"has weights on the meta device, {empty[0]} for one: load them first"
    elif getattr(config, "is_encoder_decoder", False):
        wrong = "is an encoder-decoder"
    elif config is None or getattr(config, "is_decoder", True) or is_causal(base):
        return
    else:
        wrong = "lets a token see the tokens after it"
    raise ValueError(f"{role} ({type(base).__name__}) {wrong}; accepted: a causal language model, such as LlamaForCausalLM")


def cache_of(teacher: Any) -> TopKCache | None:
    if isinstance(teacher, TopKCache):
        return teacher
    return TopKCache(teacher) if isinstance(teacher, (str, Path)) and is_cache(teacher) else None


def teacher_of(teacher: Any, student: Any) -> Any:
    """The teacher, loaded and checked."""
    found = _loaded(teacher)
    check_model(found, "teacher")
    if unwrapped(found) is unwrapped(student):
        raise ValueError("teacher and model are one and the same model; load it twice")
    return found


def _loaded(teacher: Any) -> Any:
    if isinstance(teacher, nn.Module):
        return teacher
    if not isinstance(teacher, (str, Path)):
        raise TypeError(
            "teacher is a causal language model, its folder or name, or a folder made by `python -m kdkernels cache`, got "
            f"{type(teacher).__name__}"
        )
    try:
        return load_model(teacher)
    except CommandError as error:
        raise ValueError(f"teacher {error}") from error


def learned_from(cache: TopKCache, args: KDConfig, dataset: Any) -> Any:
    """The data set that goes with a cache: the one given, or the cache's own examples."""
    for settings in SETTINGS:
        settings.check_cached(args, cache)
    if dataset is None and cache.columns:
        raise ValueError(
            f"train_dataset is None, and the cache holds its examples without {', '.join(cache.columns)}, with which "
            "the teacher read them; accepted: the data that it was made from"
        )
    return cache.examples() if dataset is None else dataset


def in_common(
    student: Any, teacher: Any, cache: TopKCache | None, ours: Any, theirs: Any, vocab_size: int | None
) -> tuple[int | None, int | None]:
    """How many rows of both heads are compared, and how many of them are tokens that both know; None for all.

    ours, theirs: the tokenizers of the student and the teacher, or None.
    """
    heads = [lm_head(student).weight.shape[0]]
    heads.append(lm_head(teacher).weight.shape[0] if cache is None else cache.vocab_size)
    if vocab_size is not None and not 1 <= vocab_size <= min(heads):
        raise ValueError(f"vocab_size={vocab_size}; accepted: 1 to {min(heads)}, the rows that both heads have")
    if theirs is None:
        theirs = tokenizer_of(teacher) if cache is None else tokenizer_at(cache.folder / TOKENIZER)
    found = common_rows(heads, (ours, theirs), ("processing_class", "teacher_processing_class"), vocab_size)
    if found.agreed is None and vocab_size is None:
        logger.warning(
            "The vocabularies of teacher and student were not compared: pass processing_class and teacher_processing_class."
        )
    for note in found.notes:
        logger.warning(note)
    cut = None if vocab_size is None and set(heads) == {found.rows} else found.rows
    return cut, min([size for size in (cut, found.agreed) if size is not None], default=None)


def look_at(collate: Callable[[list[Any]], Mapping[str, Any]], inputs: Inputs, **datasets: Any) -> None:
    """What can be known of the data before any work: that the models read it, and that there is something to learn."""
    parts = {name: part for name, dataset in datasets.items() for name, part in _parts(name, dataset)}
    for name, dataset in parts.items():
        if name == "train_dataset" and hasattr(dataset, "__len__") and len(dataset) == 0:
            raise ValueError("train_dataset has no examples; accepted: at least one")
        numbers = looked_at(dataset)
        learns = check_examples(name, dataset, numbers, collate, inputs)
        if learns or not 0 < len(numbers) == len(dataset):
            continue
        text = f"{name} has {len(dataset):,} examples and not one token to learn: no label but {IGNORED} behind a real token"
        if name == "train_dataset":
            raise ValueError(text)
        logger.warning("%s", text)


def _parts(name: str, dataset: Any) -> list[tuple[str, Any]]:
    """A data set, or the several that an evaluation may have, by their names."""
    if isinstance(dataset, Mapping):
        return [(f"{name}[{key!r}]", part) for key, part in dataset.items()]
    return [] if dataset is None else [(name, dataset)]
