"""Hidden states as they enter a model's output head, from the model's own forward, without logits.

While the forward runs, the head keeps its input and multiplies an empty slice of it: its output has no tokens, so there are no
logits, and whatever the model does to them costs nothing. The head's own forward still runs, with all that is around it (hooks of
FSDP, adapters, devices of accelerate), and the empty output hangs on the head's parameters in autograd's graph, where
DistributedDataParallel looks for unused ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdkernels.transformers.batches.layout import positions_of
from kdkernels.transformers.batches.reading import numbers_positions, takes
from kdkernels.transformers.heads import output_module, read_head, unwrapped

# With these a model would compute a loss of its own from the logits that it does not get.
LABELS = ("labels", "shift_labels", "num_items_in_batch")


class _Keeper:
    """Stands in for a head's forward: keeps the input, and runs the forward on none of its tokens."""

    def __init__(self) -> None:
        self.forward: Any = None
        self.kept: list[Tensor] = []

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.kept.append(hidden)
        nothing = hidden[..., :0, :]
        device = hidden.device.type
        if not torch.is_autocast_enabled(device):
            return self.forward(nothing, *args, **kwargs)
        # autocast would copy the whole weight to its dtype, for no tokens
        weight = self.forward.__self__.weight if hasattr(self.forward, "__self__") else None
        with torch.autocast(device, enabled=False) if weight is not None else nullcontext():
            return self.forward(nothing if weight is None else nothing.to(weight.dtype), *args, **kwargs)


# One for each head, for as long as the head lives: graphs that torch.compile made with it are found again in the next step.
_keepers: WeakKeyDictionary[nn.Module, _Keeper] = WeakKeyDictionary()


@contextmanager
def keeping(head: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, ``head`` keeps its inputs in the list and lets its output have no tokens. Afterwards it is as it was before."""
    keeper = _keepers.setdefault(head, _Keeper())
    before = keeper.forward, keeper.kept
    # An attribute of the instance, not a hook: graphs of torch.compile check that it is there, and do not check for hooks.
    attribute = vars(head).get("forward")
    if attribute is not keeper:  # else one is at work already, further out
        keeper.forward = head.forward
    kept: list[Tensor] = []
    keeper.kept = kept
    vars(head)["forward"] = keeper
    try:
        yield kept
    finally:
        if attribute is None:
            del vars(head)["forward"]
        else:
            vars(head)["forward"] = attribute
        keeper.forward, keeper.kept = before


def model_inputs(model: Any, batch: Any) -> dict[str, Any]:
    """The batch as the model's keyword arguments: without labels, and without a cache unless the batch asks for one.

    Where the batch has an attention_mask (B, S) and no position_ids, positions are counted over the real tokens, so that padding on
    the left does not move them; position_ids of None leave them to the model.
    """
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch is a mapping of the model's arguments or a tensor of token ids, got {type(batch).__name__}")
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and ids.numel() == 0:
        raise ValueError(f"batch has no tokens: its input_ids have shape {tuple(ids.shape)}")
    decoded = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_hidden_states")
    if getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False) and not inputs.keys() & set(decoded):
        # Some would make them of input_ids, and so predict tokens that their encoder has seen.
        raise ValueError(
            f"{type(unwrapped(model)).__name__} is an encoder-decoder, and batch has no decoder_input_ids; it has "
            f"{', '.join(inputs)}. accepted: a batch with them, or a causal language model, such as LlamaForCausalLM"
        )
    if "use_cache" in takes(model):
        inputs.setdefault("use_cache", False)  # else keys and values of a whole batch are kept for nobody
    if "position_ids" not in inputs and _misplaced(model, inputs):
        inputs["position_ids"] = positions_of(inputs["attention_mask"])
    elif inputs.get("position_ids", 0) is None:
        del inputs["position_ids"]
    return inputs


def _misplaced(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether the model would number padding too."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids", inputs.get("inputs_embeds"))
    if mask is None or ids is None or mask.dim() != 2 or mask.shape != ids.shape[:2] or inputs.get("past_key_values") is not None:
        return False
    adapters = getattr(getattr(model, "module", model), "peft_config", {}).values()  # virtual tokens take the first positions
    return numbers_positions(model) and not any(adapter.is_prompt_learning for adapter in adapters)


def hidden_states(model: Any, batch: Any) -> Tensor:
    """The model's hidden states exactly as they enter its output head, for ``lm_head`` of the same model.

    model: a causal language model of transformers. Its own forward runs, with all that wraps it (DistributedDataParallel, FSDP,
        PEFT, gradient checkpointing, torch.compile), under whatever autocast and grad mode it is called in.
    batch: the model's keyword arguments ({"input_ids": (B, S), "attention_mask": ..., ...}), or the token ids alone. Labels in it
        are not given to the model; ``logits_to_keep`` chooses positions, as it does for logits. Without "position_ids" they are
        counted over the real tokens of an attention_mask (B, S), for models that would else number padding on the left too; None
        leaves them to the model. Which positions count is up to the labels that go with the loss: -100 wherever the token or the
        one after it is padding.

    Returns (..., D), usually (B, S, D), with the model's graph; not shifted. Where the head carries a LoRA of PEFT, (..., D + r):
    the r columns s dropout(H) Aᵀ stand behind the hidden states, to meet B in the weight that ``lm_head`` returns.

    Raises ValueError where ``lm_head`` does, and RuntimeError where the forward does not call the head exactly once (a forward
    that was replaced by one that makes a loss from the head's weight). What the forward raises passes through; the model is left
    as it was in any case. One model is not to be run by two threads at a time.
    """
    head, inputs = read_head(model), model_inputs(model, batch)
    module = output_module(model)
    with keeping(module) as kept:
        model(**inputs)
    if len(kept) != 1:
        raise RuntimeError(
            f"the forward of {type(unwrapped(model)).__name__} called its output head ({type(module).__name__}) {len(kept)} times, "
            "where once was expected: hidden states cannot be told"
        )
    return head.extend(kept[0])
