"""The matrix products between hidden states, head and logits: x = H Wᵀ, dH = dx W, dW = dxᵀ H.

They are library calls, in the dtypes that dtypes.py says. What is decided here is that nothing is copied whole to get there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdkernels.backends.dtypes import keeps_sums

# On a CPU a head is read in blocks of about this size where that pays: a block then stays in the cache between being widened, or
# packed by the matrix library, and being multiplied. On a GPU a block holds a widened head, and where products cannot be added up
# as they are made (ROCm) one on its way into a float32 sum.
BLOCK_BYTES = {"cpu": 8 * 2**20}
OTHER_BLOCK_BYTES = 128 * 2**20


def multiply(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left right, in ``dtype``: that of the operands, or float32 for 16-bit ones, not rounded in between where ``keeps_sums``."""
    if dtype == left.dtype:
        return torch.mm(left, right, out=out) if out is not None else torch.mm(left, right)
    if keeps_sums(left.device):
        if out is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.mm(left, right, out_dtype=dtype, out=out)
    product = torch.mm(left, right)
    return product.to(dtype) if out is None else out.copy_(product)


def add_multiplied(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out += left right inside the product, out being of the operands' dtype or, where ``keeps_sums``, in float32: what was there
    is read and written once, and no product lies beside it."""
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, out=out)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)


def block_rows(width: int, device: torch.device) -> int:
    """Head rows per block, so that a float32 block has about BLOCK_BYTES."""
    return max(256, BLOCK_BYTES.get(device.type, OTHER_BLOCK_BYTES) // (4 * width))


def block_size(vocabulary: int, width: int, device: torch.device) -> int:
    """Elements of a block."""
    return min(vocabulary, block_rows(width, device)) * width


def cut_for_logits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether x = H Wᵀ is made block by block of the head even where nothing is widened.

    With few tokens float32 is a seventh to a quarter faster that way on a CPU than by one product of the full width, and bfloat16
    a tenth to a quarter slower.
    """
    return device.type == "cpu" and dtype.itemsize > 2


class HeadProducts:
    """The products of one head [V, D] with blocks of tokens.

    weight: [V, D] in the parameter's dtype. dtype: what the products run in. buffer: float32 scratch of block_size(V, D)
    elements for a head that has to be widened.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, buffer: Tensor) -> None:
        self.buffer = buffer
        # To a 16-bit dtype the head is rounded once as a whole: block-wise sums would round between blocks.
        self.weight = weight.to(dtype) if dtype != torch.float32 else weight
        self.dtype = dtype

    def _blocks(self, cut: bool) -> Iterator[tuple[slice, Tensor]]:
        """The head in blocks of rows if ``cut`` or if it has to be widened, else whole."""
        vocabulary, width = self.weight.shape
        widen = self.weight.dtype != self.dtype
        rows = min(vocabulary, block_rows(width, self.weight.device)) if cut or widen else vocabulary
        buffer = self.buffer[: rows * width].view(rows, width) if widen else self.buffer
        for begin in range(0, vocabulary, rows):
            here = slice(begin, min(begin + rows, vocabulary))
            yield here, buffer[: here.stop - begin].copy_(self.weight[here]) if widen else self.weight[here]

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out [C, V] = hidden [C, D] Wᵀ."""
        for here, weight in self._blocks(cut=cut_for_logits(self.dtype, hidden.device)):
            multiply(hidden, weight.t(), out.dtype, out[:, here])

    def hidden_grad(self, dx: Tensor, out: Tensor) -> None:
        """out [C, D] = dx [C, V] W."""
        self.add_hidden_grad(dx, out, first=True)

    def add_hidden_grad(self, dx: Tensor, out: Tensor, first: bool) -> None:
        """out [C, D] (+)= dx [C, V] W; ``first`` overwrites."""
        # a widened block of the head lies in the buffer already
        taken = self.weight.dtype != self.dtype and out.dtype != dx.dtype
        buffer = torch.empty_like(self.buffer) if taken else self.buffer
        for here, weight in self._blocks(cut=False):
            add_product(dx[:, here], weight, out, first and here.start == 0, buffer)


def add_product(left: Tensor, right: Tensor, out: Tensor, first: bool, buffer: Tensor) -> None:
    """out [M, D] (+)= left [M, K] right [K, D]; ``first`` overwrites. Each product is rounded once where the dtypes differ.

    buffer: float32 scratch of at least D elements, in which such a product is made where it cannot be added as it is multiplied, as
    many rows at a time as it takes.
    """
    if out.dtype == left.dtype or (left.dtype.itemsize == 2 and out.dtype == torch.float32 and keeps_sums(out.device)):
        if first:
            multiply(left, right, out.dtype, out)
        else:
            add_multiplied(left, right, out)
        return
    count, width = out.shape
    rows = min(count, block_rows(width, out.device), buffer.numel() // width)
    parts = buffer.view(left.dtype)[: rows * width].view(rows, width)
    for begin in range(0, count, rows):
        here = out[begin : begin + rows]
        part = multiply(left[begin : begin + rows], right, left.dtype, parts[: len(here)])
        here.copy_(part) if first else here.add_(part)


def add_head_grad(dx: Tensor, hidden: Tensor, out: Tensor, first: bool, buffer: Tensor) -> None:
    """out [V, D] (+)= dxᵀ [V, C] hidden [C, D], as ``add_product`` does it."""
    add_product(dx.t(), hidden, out, first, buffer)
