"""Triton kernels: the GPU's side of the pointwise family (`pointwise.py`), one file per family of kernels."""
