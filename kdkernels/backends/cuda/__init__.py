"""The row operation with one read of the logits, in CUDA C++ for NVIDIA GPUs of compute capability 9.0 and later (rows.cu).

Compiled at first use by NVRTC, which comes with PyTorch's CUDA wheels, and kept on disk (compile.py): what a kernel has to do is
known only then, and an installation needs no CUDA compiler. Where it cannot run, the Triton kernel does the same.
"""

from kdkernels.backends.cuda.rows import row_loss, why_not

__all__ = ["row_loss", "why_not"]
