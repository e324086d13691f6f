"""Asserts that the modules compiled in this tree load, and prints how they were built. Usage: compiled.py 0|1

1: the one with CUDA kernels too, which has to load where no GPU is.
"""

import os
import sys

import torch

from racecar_kernels import cuda_toolkit, extension

running = torch.__version__.split("+")[0]
for name in (extension.CPP, extension.CUDA)[: 1 + int(sys.argv[1])]:
    module = extension.load(name)
    assert module is not None, extension.why_not(name)
    facts = module.build_facts()
    assert facts["torch"] == running, facts
    print(f"{name}: {facts}")
    if name == extension.CUDA:
        nvcc = cuda_toolkit.find()
        codes = cuda_toolkit.codes(nvcc, os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
        assert facts["cuda"] == nvcc.version and facts["codes"] == codes, (facts, nvcc, codes)
        print(f"{name} on this machine: {extension.why_not(name) or 'in use'}")
