"""Launchers of the CUDA kernels in csrc/cuda. Nothing here imports Triton; not yet measured on a GPU."""
