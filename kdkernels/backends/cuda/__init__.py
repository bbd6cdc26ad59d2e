"""Kernels in CUDA C++ for NVIDIA GPUs, beside Triton's, which do the same where these cannot run. Both are opt-in.

- rows.cu: the row operation with one read of the logits, from compute capability 9.0 on (KDKERNELS_ROWS=cluster).
- product.cu: products whose logits are stored as 16-bit offsets, on 9.0 alone (KDKERNELS_LOGITS=offsets-cuda). It writes what
  offsets_product_kernel of backends/triton/offsets.py writes for a head without bias and softcap: the student's logits, and at
  t = 1 the teacher's. hopper.cuh has the instructions that it is made of.

Compiled at first use by NVRTC, which comes with PyTorch's CUDA wheels, and kept on disk (compile.py): what a kernel has to do is
known only then, and an installation needs no CUDA compiler.
"""

from kdkernels.backends.cuda.rows import row_loss, why_not

__all__ = ["row_loss", "why_not"]
