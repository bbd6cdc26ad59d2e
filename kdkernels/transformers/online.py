"""OKD's teacher: a frozen causal model whose queries and values carry LoRA that trains along with the student (arXiv 2409.12512).

The paper gives the place (W_q and W_v of every attention layer), the rank (32) and that nothing else moves. The rest of training is
here too, because the teacher is not the student's affair: an optimizer of its own, gradients averaged over the processes, a norm
of its own to clip, a state to save. ``kd.linear_okd_loss`` makes the loss.

    teacher = OnlineTeacher(model)
    teacher.optimize_with(torch.optim.AdamW, {}, learning_rate=1e-4)
    loss = kd.linear_okd_loss(hidden_states(student, batch), lm_head(student),
                              hidden_states(teacher.model, batch), lm_head(teacher.model), labels)
    (loss.student + loss.teacher).backward()
    teacher.step(rate=1.0, max_grad_norm=1.0)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdkernels.errors import to_install
from kdkernels.scalars import count, number
from kdkernels.transformers.families import FUSED, KEYS, QUERIES, VALUES
from kdkernels.transformers.finite import NotFinite
from kdkernels.transformers.heads import unwrapped
from kdkernels.transformers.modes import evaluate


def query_value_modules(model: nn.Module) -> list[str]:
    """Names of the linear modules that make queries and values, in every attention layer of a causal language model.

    Found by their names in a module that holds both, whatever that is called, so that layers of other kinds (a value in a
    feed-forward, a mixer of Mamba) are not taken for attention. Linear attention with projections of its own counts, and so
    do towers for images or sound, whose LoRA stays as it is where none come in. Per layer:

    - separate projections: those of queries and values (q_proj, v_proj); only queries where values come from another layer;
    - low-rank ones (MLA): what leads out of the latent (q_b_proj or q_proj, and kv_b_proj, which makes keys too);
    - a fused one (c_attn, qkv_proj, query_key_value, Wqkv): that one. LoRA on it adapts the keys as well, which the paper does not.

    Raises ValueError where no layer has such modules; it names what was looked for.
    """
    from transformers.pytorch_utils import Conv1D

    found: list[str] = []
    attention: str | None = None
    for name, module in model.named_modules():  # a module before what it holds
        if attention is not None and name.startswith(attention):
            continue  # a part of an attention layer, such as the indexer of a sparse one, is not another
        linear = {key.lower(): key for key, child in module.named_children() if isinstance(child, (nn.Linear, Conv1D))}
        chosen = [linear[key] for key in _of_attention(linear)]
        if chosen:
            attention = f"{name}."
            found += [attention + key for key in chosen]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no projections of queries and values that are known here: looked for linear modules "
            f"called {', '.join(QUERIES)} beside {', '.join(VALUES)}, or {', '.join(FUSED)}. Name the modules to adapt in "
            "okd_target_modules (target_modules of OnlineTeacher)"
        )
    return found


def _of_attention(linear: Mapping[str, str]) -> list[str]:
    """Which of a module's linear children make queries and values; none where it is no attention."""
    fused = [name for name in FUSED if name in linear]
    if fused:
        return fused
    queries = [name for name in QUERIES if name in linear]
    values = [name for name in VALUES if name in linear] or [name for name in KEYS if name in linear]
    return queries + values if queries else []


class OnlineTeacher:
    """A teacher that adapts to its student by LoRA, and the training of that LoRA.

    model: a causal language model of transformers, on its device, neither wrapped nor with adapters. Its parameters are frozen
        and its dropout is off for as long as it teaches; ``unload`` gives it back.
    rank: of the LoRA, at least 1. alpha: above 0; the LoRA's output is multiplied by alpha / rank. None: 2 rank, a factor of 2. The
        paper gives rank 32 and does not state the factor; 2 is this library's choice.
    dropout: in [0, 1), before the LoRA, while it trains.
    target_modules: the modules to adapt, as peft takes them (names or their endings, or one regular expression); None:
        ``query_value_modules(model)``.
    seed: of the LoRA's first factor. The second starts at 0, so the teacher starts as it was. The same seed gives the same LoRA in
        every process; the global generators of random numbers are left as they are.

    The LoRA is in float32 where the model is in 16 bits. It starts in training mode; see ``train``.

    Raises TypeError or ValueError for arguments that are none of this, ImportError without peft.
    """

    model: Any
    """The PeftModel: for ``hidden_states`` and ``lm_head``."""

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 32,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, low in (("rank", rank, 1), ("seed", seed, 0)):
            count(name, value, low)
        if alpha is not None:
            number("alpha", alpha, "a number above 0, or None", 0.0, above=True)
        if number("dropout", dropout, "a number in [0, 1)", 0.0) >= 1.0:
            raise ValueError(f"dropout is a number in [0, 1), got {dropout}")
        try:
            from peft import LoraConfig, get_peft_model
            from peft.tuners.lora import LoraLayer
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError as error:
            raise ImportError(f"OnlineTeacher needs peft, not installed here: {to_install('transformers')}") from error
        base = unwrapped(model)
        if hasattr(model, "get_base_model") or any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            raise ValueError(
                "model carries adapters of peft already; accepted: a model without (those of an earlier KDTrainer go by "
                "trainer.online.unload(), others into the weights by merge_and_unload())"
            )
        if base is not model:
            raise ValueError(
                f"model is wrapped in {type(model).__name__}; accepted: the transformers model itself "
                "(shard(mesh) of the teacher shards it)"
            )
        targets = query_value_modules(model) if target_modules is None else _checked_targets(target_modules)
        factor: Any = 2 * rank if alpha is None else alpha  # peft says it is an int, and takes a float
        config = LoraConfig(r=rank, lora_alpha=factor, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
        self._required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._training = {name: module.training for name, module in model.named_modules()}
        # peft makes the factors on the CPU; only that generator is used, and only it has to be put back
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
            torch.default_generator.manual_seed(seed)
            # GPT-2's Conv1D holds its weight transposed; peft sees that itself, sets the option, and warns that it did
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
            # peft 0.21 asks transformers 5.23 by a name that is to go
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            self.model = get_peft_model(model, config)
        self._layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        self._checkpointed: list[nn.Module] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._learning_rate = 0.0
        self.train()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The LoRA's parameters by their names in ``model``."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def parameters(self) -> list[nn.Parameter]:
        """The LoRA's parameters: all that trains."""
        return list(self.named_parameters().values())

    def train(self, mode: bool = True) -> None:
        """Turn the LoRA's dropout on or off. The model's own stays off: it is a fixed function, however its LoRA trains."""
        evaluate(self.model)
        for layer in self._layers:
            layer.lora_dropout.train(mode)

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of each layer for the backward, which computes the rest again.

        transformers has this too, but does it only for a model in training mode, where its dropout would be on. The model must
        then run without a cache, as ``hidden_states`` runs it. Raises ValueError for a model without layers that are made for it.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        inside: set[nn.Module] = set()
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer) and module not in inside:
                inside.update(module.modules())
                if "forward" not in vars(module):
                    # Around the forward, not the call: hooks of FSDP stay outside and do not run twice.
                    vars(module)["forward"] = partial(checkpoint, module.forward, use_reentrant=False)
                    self._checkpointed.append(module)
        if not inside:
            raise ValueError(f"{type(unwrapped(self.model)).__name__} has no layers that transformers can checkpoint")

    def shard(self, mesh: Any) -> None:
        """Shard the teacher over the processes of a DeviceMesh by fully_shard (FSDP2): each decoder layer, and the rest together.

        Decoder layers are those that the model names in ``_no_split_modules``. Call it before ``optimize_with``, which raises
        RuntimeError here if it was first: its optimizer would hold parameters that are no longer the model's.
        """
        if self._optimizer is not None:
            raise RuntimeError("shard(mesh) comes before optimize_with: sharding replaces the parameters that the optimizer holds")
        shard(self.model, mesh)

    def optimize_with(self, cls: Any, options: Mapping[str, Any], learning_rate: float) -> None:
        """Make the optimizer of the LoRA.

        cls, options: the class of an optimizer and its keyword arguments, such as those of the student. All parameters are one
            group, without weight decay (the paper uses none) and with its own learning rate, whatever the options say of the two.
        learning_rate: at least 0; ``step`` multiplies it by its rate.
        """
        self._learning_rate = number("learning_rate", learning_rate, "a number of at least 0", 0.0)
        group = {"params": self.parameters(), "lr": self._learning_rate, "weight_decay": 0.0}
        self._optimizer = cls([group], **options)

    def step(self, rate: float, max_grad_norm: float | None, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """One step of the optimizer on the gradients that are there, which are gone afterwards.

        rate: the learning rate of this step is learning_rate × rate; at least 0. What a schedule gives, which the student follows
            too.
        max_grad_norm: gradients are scaled down to this norm, above 0, all of them together; None does not.
        scaler: the GradScaler that the loss was scaled by. Its ``update`` is not called: the student's step follows and does.

        Where torch.distributed has several processes, gradients are their mean, as DistributedDataParallel takes it: by one
        all-reduce here, or by FSDP itself after ``shard``. A parameter that took no part in the loss has gradient 0.

        Returns the norm of the gradients before clipping: 0-dim, inf or NaN if a scaled loss overflowed, in which case the scaler
        leaves the step out. Raises RuntimeError before ``optimize_with``, and where no parameter has a gradient; NotFinite, a
        ValueError, where the norm is NaN or infinite without a scaler. No parameter has moved then.
        """
        rate = number("rate", rate, "a number of at least 0", 0.0)
        if max_grad_norm is not None:
            number("max_grad_norm", max_grad_norm, "a number above 0, or None", 0.0, above=True)
        if (optimizer := self._optimizer) is None:
            raise RuntimeError("the teacher has no optimizer: call optimize_with first")
        parameters = self.parameters()
        gradients = _gradients(parameters)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            _average([gradient for gradient in gradients if not _is_sharded(gradient)])
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm: Any = nn.utils.get_total_norm(gradients)
        if scaler is None and not math.isfinite(size := float(norm.full_tensor() if _is_sharded(norm) else norm)):
            raise NotFinite(f"the norm of the teacher's gradients is {size}")
        if max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = self._learning_rate * rate
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return norm.full_tensor() if _is_sharded(norm) else norm  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        """{"lora": {name: tensor}, "optimizer": its state_dict, or None before optimize_with}, to be saved by torch.save.

        Tensors are copies on the CPU, and whole; where they are sharded, every process has to call this. torch.load reads them with
        weights_only=True.
        """
        lora = {name: _plain(parameter) for name, parameter in self.named_parameters().items()}
        return {"lora": lora, "optimizer": None if self._optimizer is None else _plain(self._optimizer.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave, sharded again where the teacher is; then every process has to call this.

        The learning rate stays that of ``optimize_with``, which comes first if the state has an optimizer's. Raises ValueError
        for the state of another LoRA, RuntimeError where one of the two has an optimizer and the other does not.
        """
        named = self.named_parameters()
        lora, saved = state["lora"], state["optimizer"]
        shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (named, lora)]
        if shapes[0] != shapes[1]:
            name = next(name for name in (*named, *lora) if shapes[0].get(name) != shapes[1].get(name))
            here, there = (shape.get(name, "absent") for shape in shapes)
            raise ValueError(f"state is that of another LoRA: {name} is {there} in it, {here} in this teacher")
        if (saved is None) != (self._optimizer is None):
            which = (
                "the state has no optimizer, but this teacher has"
                if saved is None
                else "this teacher has no optimizer, but the state has"
            )
            raise RuntimeError(f"{which}: call optimize_with before both of state_dict and load_state_dict, or before neither")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(_sharded_as(parameter, lora[name]))
        if self._optimizer is not None:
            parameters = list(named.values())
            moments = {
                index: {key: _sharded_as(parameters[index], value) for key, value in of_one.items()}
                for index, of_one in saved["state"].items()
            }
            self._optimizer.load_state_dict({**saved, "state": moments})

    def save(self, folder: str | Path) -> None:
        """Write the adapter into a folder, for peft's PeftModel.from_pretrained; by the first process, where there are several.

        Where the teacher is sharded, every process has to call this.
        """
        whole = {name: _plain(parameter) for name, parameter in self.named_parameters().items()}
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            # Embeddings are the base's, and never train here; whether to save them peft would ask the hub.
            self.model.save_pretrained(str(folder), state_dict=whole, save_embedding_layers=False)

    def unload(self) -> Any:
        """Take the LoRA off and return the model as it was: modules, values, what requires gradients, modes; this is then spent.

        After ``shard`` it is still sharded.
        """
        for module in self._checkpointed:
            del vars(module)["forward"]
        model = self.model.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        for name, module in model.named_modules():
            module.training = self._training[name]
        return model


def shard(model: nn.Module, mesh: Any) -> None:
    """fully_shard (FSDP2) over a DeviceMesh: each decoder layer that the model names in ``_no_split_modules``, and the rest."""
    from torch.distributed.fsdp import fully_shard  # absent from builds of torch without distributed

    layers = set(getattr(unwrapped(model), "_no_split_modules", None) or ())
    for module in reversed(list(model.modules())):  # from the inside out, as fully_shard wants it
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _checked_targets(targets: Any) -> Any:
    accepted = "names of modules, one regular expression, or None"
    if isinstance(targets, str):
        return targets
    if not isinstance(targets, Sequence) or not all(isinstance(name, str) for name in targets):
        raise TypeError(f"target_modules is {accepted}, got {targets!r}")
    if not targets:
        raise ValueError(f"target_modules is {accepted}, got none at all")
    return list(targets)


def _is_sharded(tensor: Any) -> bool:
    """A DTensor of FSDP2."""
    return hasattr(tensor, "full_tensor")


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Of each parameter; 0 where it took no part."""
    if all(parameter.grad is None for parameter in parameters):
        raise RuntimeError("no parameter of the teacher has a gradient: step comes after backward of the teacher's loss")
    found = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    return found


def _average(gradients: list[Tensor]) -> None:
    """Replace gradients by their means over the processes, in one message."""
    if not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for gradient, mean in zip(gradients, together.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _plain(value: Any) -> Any:
    """A copy with tensors whole and on the CPU."""
    if isinstance(value, Tensor):
        whole: Any = value.detach()
        return (whole.full_tensor() if _is_sharded(whole) else whole).to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _sharded_as(parameter: Any, value: Any) -> Any:
    """A copy of a tensor, distributed like the parameter where that is and has its shape. Anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if not _is_sharded(parameter) or value.shape != parameter.shape:
        return value.clone()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
