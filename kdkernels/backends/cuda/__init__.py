"""Kernels in CUDA C++ for NVIDIA GPUs with thread-block clusters (compute capability 9.0 and later).

- compile.py: NVRTC compiles a kernel when it is first wanted, the driver starts it.

Nothing here is imported before a GPU tensor arrives, or a test asks for it.
"""
