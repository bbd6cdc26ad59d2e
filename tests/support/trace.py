"""What eager PyTorch does, operation by operation, as passes of the roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels.planning.roofline import Pass

aten = torch.ops.aten
# Sweeps of PyTorch's softmax kernels over each of their tensors where the row does not stay in the cache: maximum, sum, result; in
# the backward the sum needs the (scaled) gradient, the result needs it again with the output.
SWEEPS = {
    aten._log_softmax.default: (3,),
    aten._softmax.default: (3,),
    aten._log_softmax_backward_data.default: (2, 1),
    aten._softmax_backward_data.default: (2, 1),
}
FREE = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)


def _bytes(tensor: Tensor) -> int:
    """Bytes of the elements there are: an expanded dimension is one element."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


class Trace(TorchDispatchMode):
    """Counts what the operations inside move and hold. passes: one per kernel. peak: bytes alive at once.

    cached_row: rows of at most so many bytes are read once by a softmax, longer ones once for each of its sweeps.
    """

    def __init__(self, cached_row: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cached_row = cached_row
        self.passes: list[Pass] = []
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def restart(self) -> None:
        """Forgets the passes so far and the peak, not what is alive."""
        self.passes = []
        self._note(())

    def _note(self, outputs: Sequence[Tensor]) -> None:
        self.live = {at: entry for at, entry in self.live.items() if not entry[0].expired()}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            self.live[reference.cdata] = (reference, storage.nbytes())
        now = sum(size for _, size in self.live.values())
        self.peak = max(self.peak, now) if self.passes else now

    def _read(self, func: Any, inputs: list[Tensor]) -> int:
        """Bytes read; a tensor that comes twice is read once."""
        sweeps = SWEEPS.get(func, ())
        total, seen = 0, set()
        for at, tensor in enumerate(inputs):
            key = (StorageWeakRef(tensor.untyped_storage()).cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
            if key in seen:
                continue
            seen.add(key)
            resident = tensor.dim() == 0 or tensor.shape[-1] * tensor.element_size() <= self.cached_row
            total += _bytes(tensor) * (1 if resident or at >= len(sweeps) else sweeps[at])
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._softmax_backward_data.default:
            with self:
                scaled = args[0] * args[1]
            args = (scaled, *args[1:])
        out = func(*args, **kwargs)
        outputs = _tensors(out)
        alias = any(ret.alias_info is not None and not ret.alias_info.is_write for ret in func._schema.returns)
        if alias or func.overloadpacket in FREE:
            self._note(outputs)
            return out
        inputs = _tensors(args) + _tensors(list(kwargs.values()))
        if func in (aten.mm.default, aten.mm.out):
            left, right = inputs[:2]
            (rows, inner), columns = left.shape, right.shape[1]
            moved = sum(map(_bytes, (left, right, *outputs)))
            self.passes.append(Pass(2.0 * rows * inner * columns, moved, left.dtype, shape=(rows, columns, inner)))
        elif func is aten.nll_loss_forward.default:
            self.passes.append(Pass(0.0, 0.0))  # one logit per row
        elif func is aten.nll_loss_backward.default:
            self.passes.append(Pass(0.0, _bytes(outputs[0])))  # zeros, and one entry per row
        else:
            self.passes.append(Pass(0.0, self._read(func, inputs) + sum(map(_bytes, outputs))))
        self._note(outputs)
        return out
