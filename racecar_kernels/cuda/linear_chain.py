"""A chain of narrow linear layers in one CUDA kernel per direction, and a small one behind it that finishes its sums.

The mathematics is that of `chain.py`. A block holds all weights in shared memory and takes tiles of rows through the
whole chain, forth and back (`csrc/cuda/linear_chain_*.cuh`). `store` keeps d_2 .. d_n and a_1 .. a_n, each as one
tensor (rows, features); `recompute` and `deferred` keep nothing but x, and run a tile again where its backward begins.
Not yet measured on a GPU: it runs where the backend `cuda` is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import extension
from ..gpu.device import listed
from ..layer import Chain, parse_chain
from ..linear_chain import ONE_CALL, Kept, MaybeTensors, fake_kept, numbered_latents, run_backward, why_never

__all__ = ["MEASURED", "backward", "fake_kept", "forward", "why_not"]

BACKEND = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cuda"]  # a test adds the CPU, with kernels of its own
MOST_LAYERS, MOST_WIDTH = 16, 512  # as csrc/cuda/linear_chain.h has them
MOST_ROWS = 2**27
# By architecture (major, minor) the widest chain that was measured to be faster than all others; empty until one was.
MEASURED: dict[tuple[int, int], int] = {}


def why_not(chain: Chain, x: Tensor, weights: Sequence[Tensor]) -> str | None:
    """None where these kernels run the chain, else a sentence. Reads shapes, types and the device alone."""
    if any(w.dim() != 2 for w in weights):  # asked first, since it costs nothing
        return "not all of its layers are linear"
    if x.device.type not in DEVICES:
        return f"the CUDA kernels run on NVIDIA GPUs, got tensors on {x.device}"
    reason = why_never(chain, (None, BACKEND)) or _why_not_tensors(x, weights)
    if reason is None and chain.backend is None:
        reason = _why_not_measured(x, weights)
    if reason is None and x.device.type == "cuda":
        reason = extension.why_not_on(x.device.index)
    return reason or _why_not_shared(str(chain), x, weights)


def _why_not_tensors(x: Tensor, weights: Sequence[Tensor]) -> str | None:
    every = (x, *weights)
    if any(t.device != x.device for t in every):
        return f"the tensors are on several devices: {listed(t.device for t in every)}"
    if x.dtype not in DTYPES or any(t.dtype != x.dtype for t in weights):
        return f"one type of {listed(DTYPES)} is needed, got {listed(t.dtype for t in every)}"
    if len(weights) > MOST_LAYERS:
        return f"1 to {MOST_LAYERS} layers are served, got {len(weights)}"
    rows, widths = prod(x.shape[:-1]), _widths(weights)
    if min(rows, *widths) < 1 or rows > MOST_ROWS or max(widths) > MOST_WIDTH:
        return f"1 to {MOST_ROWS} rows and 1 to {MOST_WIDTH} features are served, got {rows} and {listed(widths)}"
    return None


def _why_not_measured(x: Tensor, weights: Sequence[Tensor]) -> str | None:
    here = torch.cuda.get_device_capability(x.device)
    if max(_widths(weights)) > MEASURED.get(here, 0):
        of = f"sm_{here[0]}{here[1]}"
        return f"not measured to be the fastest on {of}, so not chosen; the backend {BACKEND!r} asks for it"
    return None


def _why_not_shared(text: str, x: Tensor, weights: Sequence[Tensor]) -> str | None:
    needed, there = _compiled(text).shared_bytes(_widths(weights)), _module().shared_limit(x.device.index or 0)
    if needed > there:
        return f"its weights and eight rows need {needed} bytes of shared memory, a block has {there} on this GPU"
    return None


def _widths(weights: Sequence[Tensor]) -> list[int]:
    """Features of d_1 .. d_{n+1}."""
    return [weights[0].shape[1], *(w.shape[0] for w in weights)]


def _module() -> Any:
    """With `LinearChain` and `shared_limit`, where `why_not` has nothing against the GPU."""
    return extension.load(extension.CUDA)


@lru_cache(maxsize=4096)
def _compiled(text: str) -> Any:
    """The chain as the kernels take it; asked for where `why_never` has nothing against it."""
    chain = parse_chain(text)
    return _module().LinearChain(numbered_latents(chain), [layer.compare for layer in chain.layers], chain.full)


def forward(
    text: str, x: Tensor, weights: list[Tensor], biases: MaybeTensors, memory: str
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """What the operator `tied_chain` gives."""
    extension.never_replayed(ONE_CALL)
    out, losses, d, a = _compiled(text).forward(x, weights, biases, memory == "store", memory != "deferred")
    return out, losses, [], d, a


def backward(
    text: str,
    grad_out: Tensor | None,
    grad_losses: Tensor | None,
    x: Tensor,
    weights: list[Tensor],
    biases: MaybeTensors,
    out: Tensor,
    kept: Kept,
    needs: Sequence[bool],
) -> list[Tensor]:
    """What the operator `tied_chain_backward` gives."""
    extension.never_replayed(ONE_CALL)
    return run_backward(_compiled(text), grad_out, grad_losses, x, weights, biases, out, kept, needs)
