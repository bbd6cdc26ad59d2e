"""What a causal model of transformers does between its last hidden states and its logits, read as an LMHead.

Three places hold it: the output head module (weight, bias, adapters of PEFT), the model (its logit scale), and its configuration
(scale, softcap). What a scale does is told by the table of families; one in a model that the table does not know is refused.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.backends.dtypes import DTYPES
from kdkernels.losses.head import LMHead
from kdkernels.transformers.families import DIVIDES, FAMILIES, MULTIPLIES, SOFTCAPS, families_of


def unwrapped(model: Any) -> Any:
    """The transformers model inside DistributedDataParallel, FSDP, PEFT, torch.compile and checkpoint wrappers."""
    while True:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a causal language model of transformers, got {type(model).__name__}")
        if isinstance(model, nn.DataParallel):
            raise TypeError("model is wrapped in DataParallel, whose replicas keep no hidden states; use DistributedDataParallel")
        if isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph:
            # It starts its first reduction from the output of the forward, through which this loss does not pass.
            raise ValueError(
                "model is wrapped in DistributedDataParallel with static_graph=True, under which gradients of this loss would stay "
                "on their ranks, not averaged; accepted: without it"
            )
        inner: Any = model._modules
        held = [name for name in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module") if name in inner]
        if held:
            model = inner[held[0]]
        elif hasattr(model, "get_base_model"):
            peft: Any = model
            model = peft.get_base_model()
        elif "module" in inner and not hasattr(model, "get_output_embeddings"):
            model = inner["module"]
        else:
            return model


def output_module(model: Any) -> nn.Module:
    """The module that hidden states enter to become logits, with the adapters around it. model: may be wrapped.

    Raises ValueError for a model that has none.
    """
    base = unwrapped(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"{type(base).__name__} has no output head (get_output_embeddings() gives none); accepted: causal language models of "
            "transformers, such as LlamaForCausalLM"
        )
    return head


@dataclass(frozen=True)
class LowRank:
    """An update of the head's weight by scale B A, as PEFT's LoRA has it: A (r, D), B (V, r)."""

    down: nn.Module
    up: nn.Module
    dropout: nn.Module
    scale: float

    def columns(self, hidden: Tensor) -> Tensor:
        """scale dropout(H) Aᵀ: (..., r), in the dtype of hidden (..., D), as PEFT computes it."""
        weight = _whole(self.down, "weight")
        assert weight is not None
        low = nn.functional.linear(self.dropout(hidden.to(weight.dtype)), weight)
        return (low * self.scale).to(hidden.dtype)


@dataclass(frozen=True)
class OutputHead:
    """An output head, read: a linear layer, and low-rank updates of it.

    The update is written as more columns: H Wᵀ + s (H Aᵀ) Bᵀ = [H, s H Aᵀ] [W, B]ᵀ. ``extend`` makes the left factor, ``weight``
    the right one.
    """

    linear: nn.Linear
    updates: tuple[LowRank, ...] = ()

    def weight(self) -> Tensor:
        """(V, D), the model's own Parameter; with updates a new (V, D + r) tensor."""
        parts = [_whole(module, "weight") for module in (self.linear, *(update.up for update in self.updates))]
        weight, *more = (part for part in parts if part is not None)
        return torch.cat([weight, *(part.to(weight.dtype) for part in more)], 1) if more else weight

    def bias(self) -> Tensor | None:
        """(V,), the model's own Parameter where no update has a bias too."""
        bias = _whole(self.linear, "bias")
        for update in self.updates:
            if (more := _whole(update.up, "bias")) is not None:
                more = (more * update.scale).to(self.linear.weight.dtype)
                bias = more if bias is None else bias + more
        return bias

    def extend(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> (..., D + r); the same tensor where there are no updates."""
        if not self.updates:
            return hidden
        return torch.cat([hidden, *(update.columns(hidden) for update in self.updates)], -1)


def _whole(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of ``module``, gathered where FSDP2 has sharded it. Raises ValueError where it is not here."""
    parameter: Any = getattr(module, name, None)
    if parameter is None:
        return None
    if parameter.device.type == "meta":
        raise ValueError(f"the output head's {name} is on the meta device (offloaded, or not loaded yet): bring it to its device")
    if parameter.dtype not in DTYPES:
        raise ValueError(f"the output head's {name} is quantised ({parameter.dtype}); accepted: {', '.join(map(str, DTYPES))}")
    if hasattr(parameter, "full_tensor"):
        return _gathered(parameter)
    if parameter.dim() != (2 if name == "weight" else 1):
        raise ValueError(
            f"the output head's {name} has shape {tuple(parameter.shape)}, a shard of FSDP: compute the loss inside "
            "FSDP.summon_full_params, use fully_shard (FSDP2), or leave the head out of the sharding"
        )
    return parameter  # type: ignore[no-any-return]


def _gathered(parameter: Any) -> Tensor:
    """A DTensor, whole. Its gradient is the mean over the mesh, as FSDP and DistributedDataParallel take it."""
    from torch.distributed.tensor import Partial  # absent from builds of torch without distributed

    mesh = parameter.device_mesh
    whole: Tensor = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


def read_head(model: Any, *, own_forward: bool = False) -> OutputHead:
    """The output head of a model that may be wrapped. own_forward: take a subclass of Linear that computes something else too.

    Raises ValueError where the head is not H Wᵀ + b with low-rank updates.
    """
    module: Any = output_module(model)
    updates: tuple[LowRank, ...] = ()
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):  # PEFT trains a copy of the head
        active = [] if module.disable_adapters else list(module.active_adapters)
        module = module.modules_to_save[active[0]] if active else module.original_module
    elif hasattr(module, "base_layer"):
        module, updates = module.get_base_layer(), _updates(module)
    name = type(module).__name__
    if not isinstance(module, nn.Linear):
        if name == nn.Linear.__name__:  # torch.ao's have that name too
            name = f"{type(module).__module__}.{name}"
        quantised = callable(getattr(module, "weight", None))  # a method that unpacks it
        hint = " (quantised: leave the head out of the quantisation)" if quantised else ""
        raise ValueError(f"the output head is a {name}{hint}; accepted: torch.nn.Linear, also with LoRA of PEFT")
    if type(module).forward is not nn.Linear.forward and not own_forward:
        raise ValueError(
            f"the output head is a {name}, which computes its output in its own way; if that is H Wᵀ + b all the same, make a "
            "kd.LMHead by hand and check it with verify_lm_head(model, head=...)"
        )
    return OutputHead(module, updates)


def _updates(layer: Any) -> tuple[LowRank, ...]:
    """The active low-rank updates of a PEFT layer."""
    lora = sys.modules.get("peft.tuners.lora.layer")  # whoever has such a layer has imported it
    name = f"{type(layer).__module__}.{type(layer).__name__}"
    if layer.disable_adapters or layer.merged:
        return ()
    if lora is None or type(layer) is not lora.Linear:
        raise ValueError(
            f"the output head carries an adapter of type {name}; accepted: LoRA (peft.LoraConfig), or none, or merge it"
        )
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    for adapter in active:
        if (variant := layer.lora_variant.get(adapter)) is not None:
            raise ValueError(
                f"the output head's adapter {adapter!r} is {getattr(variant, '__name__', type(variant).__name__)}, which is not an "
                "update by B A alone; accepted: plain LoRA (with rsLoRA, dropout, bias), or none, or merge it"
            )
    return tuple(
        LowRank(layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter], float(layer.scaling[adapter]))
        for adapter in active
    )


def _number(base: Any, text: Any, name: str) -> float | None:
    """An attribute of the model, of the model below its head, or of its configuration, the first that is there; None if unset."""
    for holder in (base, getattr(base, "base_model", None), text):
        value = getattr(holder, name, None)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(
                    f"{name} of {type(base).__name__} is a number in the models known here, got {type(value).__name__}"
                )
            return float(value)
    return None


def _scale(base: Any, text: Any, kinds: tuple[str, ...]) -> float:
    scale = 1.0
    own = [family.scale for family in families_of(*kinds) if family.scale is not None]
    known = [(family.type, *family.scale) for family in FAMILIES if family.scale is not None]
    for name in dict.fromkeys(attribute for _, attribute, _ in known):
        value = _number(base, text, name)
        if value is None or value == 1.0:
            continue
        does = {effect for attribute, effect in own if attribute == name}
        if not does:
            others = "; ".join(f"{effect} in {kind}" for kind, attribute, effect in known if attribute == name)
            raise ValueError(
                f"{type(base).__name__} ({kinds[0]}) has {name} = {value:g}, and what that does is not known ({others}): make "
                "kd.LMHead(weight, bias, logit_scale=...) by hand and check it with verify_lm_head(model, head=...)"
            )
        scale = scale * value if MULTIPLIES in does else scale / value if DIVIDES in does else scale
    return scale


def after_head(model: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap): what the model, which may be wrapped, does to its head's output. Raises ValueError as lm_head."""
    base = unwrapped(model)
    config = getattr(base, "config", None)
    if config is None:
        return 1.0, None
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kinds = tuple(str(getattr(part, "model_type", "")) for part in (config, text))
    softcaps = [cap for name in SOFTCAPS if (cap := _number(base, text, name)) is not None]
    return _scale(base, text, kinds), softcaps[0] if softcaps else None


def lm_head(model: Any) -> LMHead:
    """The output head of a causal language model, to go with ``hidden_states`` of the same model.

    model: a causal language model of transformers, also inside DistributedDataParallel, FSDP, PEFT or torch.compile.

    Weight (V, D) and bias (V,) are the very Parameters of the model, tied to the embeddings or not, so that gradients go to them.
    Padded rows are kept; ``vocab_size=`` of the loss cuts them.

    With a LoRA of PEFT on the head, whose r columns ``hidden_states`` adds to its result, the weight is [W, B] (V, D + r): a copy
    of the head, made anew by each call, whose gradient is as large, of which a frozen W throws all but B's r columns away. Call it
    in each step, as B moves. A merged or disabled adapter costs nothing.

    Weights that fully_shard (FSDP2) has sharded are gathered, for each call and by all ranks; gradients go back to the shards.

    Raises ValueError where the head is none that can be written so: adapters other than LoRA, DoRA, quantised weights, shards of
    FSDP1 outside summon_full_params, a head that is not a torch.nn.Linear, or a logit scale in a model type whose use of it is not
    known. What a model of another source does besides is found by ``verify_lm_head``.
    """
    head = read_head(model)
    scale, softcap = after_head(model)
    return LMHead(head.weight(), head.bias(), logit_scale=scale, softcap=softcap)
