"""The backend for NVIDIA and AMD GPUs, in Triton.

- device.py: what is done to a tile of logits [rows, columns] in registers; every kernel is made of it.
- rows.py: the row operation over logits in memory (strategy ``tokens``).
- vocabulary.py: kernels that multiply hidden states and heads themselves and keep no logits (strategy ``vocab``).
- arch.py: what a device is; blocks.py: block sizes for each architecture; autotune.py: the search around the table.
- launch.py: how a kernel is started.

Nothing here is imported before a GPU tensor arrives, or a test asks for it under TRITON_INTERPRET=1.
"""

from kdkernels.backends.triton.rows import row_loss

__all__ = ["row_loss"]
