"""A model that is only asked something: in evaluation mode, and afterwards what it was before.

Quantised layers and their like keep weights in a form of their own, and some change that form for good once they run in evaluation
mode without gradients: bitsandbytes on a CPU repacks 4-bit weights for inference, and no gradient passes through them any more. In
training mode they keep the form that they train in, and dropout, which hangs on that mode too, is a module of its own. So such
layers are in training mode wherever a model is in evaluation mode here: what is asked of it is also the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kdkernels.backends.dtypes import DTYPES

INDICES = (torch.bool, torch.int64)  # of masks and positions, not of weights


def _of_its_own_form(module: nn.Module) -> bool:
    """Whether a module is a layer whose weights are not, or not only, those of torch.nn."""
    if module._modules:
        return False
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return True
    parameters: list[Any] = [parameter for parameter in module._parameters.values() if parameter is not None]
    buffers: list[Any] = [buffer for buffer in module._buffers.values() if buffer is not None]
    return any(type(parameter) is not nn.Parameter or parameter.dtype not in DTYPES for parameter in parameters) or any(
        buffer.dtype not in (*DTYPES, *INDICES) for buffer in buffers
    )


def evaluate(model: nn.Module) -> None:
    """Evaluation mode, save for layers whose weights have a form of their own, which keep that in training mode."""
    model.eval()
    for module in model.modules():
        if _of_its_own_form(module):
            module.training = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode as ``evaluate`` has it; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        evaluate(model)
        yield
    finally:
        for module, was in modes:
            module.training = was


def _is_sharded(model: nn.Module) -> bool:
    """FSDP exchanges a module's parameters by itself, before and after each forward."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters()) or any(
        "_fsdp_wrapped_module" in module._modules for module in model.modules()
    )


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Afterwards attributes, parameters and buffers are those of before, and the contents of buffers that hold no weights.

    No copy is made of weights: they get their tensors back, but what was written into those is not undone.
    """
    # RoPE that grows with the sequence keeps its length in an attribute beside the buffer: both go back together. A module with
    # others in it may be a wrapper, whose attributes are its own affair.
    owners = [module for module in model.modules() if module._buffers or not module._modules]
    dicts: list[Any] = [vars(module) for module in owners] + [module._buffers for module in owners]
    tensors: list[tuple[Any, Tensor]] = []
    if not _is_sharded(model):
        parameters: list[Any] = list(model.parameters())
        dicts += [module._parameters for module in owners] + [vars(parameter) for parameter in parameters]
        tensors = [(parameter, parameter.data) for parameter in parameters if not is_traceable_wrapper_subclass(parameter)]
        dicts += [vars(each) for module in owners if _of_its_own_form(module) for each in _beside_the_weights(module)]
    held = [(mapping, dict(mapping)) for mapping in dicts]
    plain = (module for module in owners if not _of_its_own_form(module))
    contents = [(buffer, buffer.detach().clone()) for module in plain for buffer in module.buffers(recurse=False)]
    try:
        yield
    finally:
        for mapping, items in held:
            mapping.clear()
            mapping.update(items)
        for parameter, data in tensors:
            if (parameter.data_ptr(), parameter.shape, parameter.dtype) != (data.data_ptr(), data.shape, data.dtype):
                parameter.data = data
        with torch.no_grad():
            for buffer, content in contents:
                buffer.copy_(content)


def _beside_the_weights(module: nn.Module) -> list[Any]:
    """Objects that hold what belongs to a layer's weights, such as the scales of quantised ones."""
    found = [*vars(module).values(), *(value for parameter in module.parameters() for value in vars(parameter).values())]
    return [each for each in found if hasattr(each, "__dict__") and not (callable(each) or isinstance(each, (nn.Module, Tensor)))]
