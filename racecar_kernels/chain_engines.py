"""The table of what runs certain chains as a whole, with fewer calls and passes than layer by layer (`chain.py`).

An engine is a module. To add one is a line in `TABLE`; the first that has nothing against a chain runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from . import linear_chain
from .cuda import linear_chain as cuda_linear_chain
from .gpu import linear_chain as triton_linear_chain
from .layer import Chain, parse_chain
from .linear_chain import Kept, MaybeTensors


class Engine(Protocol):
    """What the operators `tied_chain` and `tied_chain_backward` ask of a module; `kept` is what its forward kept."""

    def why_not(self, chain: Chain, x: Tensor, weights: Sequence[Tensor]) -> str | None:
        """None where it runs this chain, else a sentence. Reads shapes, types and devices, as a trace can."""

    def forward(
        self, text: str, x: Tensor, weights: list[Tensor], biases: MaybeTensors, memory: str
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Output, losses, no statistics, and what is kept of forward and reverse; `text` is str(chain)."""

    def backward(
        self,
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
        """The gradients that `needs` has, in the order of x, weights and biases; then the losses if they are new."""

    def fake_kept(self, chain: Chain, x: Tensor, weights: Sequence[Tensor], memory: str) -> Kept:
        """Tensors like those that `forward` keeps."""


TABLE: tuple[Engine, ...] = (linear_chain, cuda_linear_chain, triton_linear_chain)


def serving(chain: Chain, x: Tensor, weights: Sequence[Tensor]) -> Engine | None:
    """The engine that runs this chain; None: it runs layer by layer."""
    return next((engine for engine in TABLE if engine.why_not(chain, x, weights) is None), None)


def decided(text: str, x: Tensor) -> str:
    """The chain with its precision, as it is now: a backward then takes the same engine as its forward did."""
    if x.dtype != torch.float32:
        return text
    return _with_precision(text, "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee")


@lru_cache(maxsize=4096)
def _with_precision(text: str, precision: str) -> str:
    chain = parse_chain(text)
    if chain.precision is not None or any(layer.tied.dims for layer in chain.layers):  # no engine takes convolutions
        return text
    return str(replace(chain, precision=precision))
