"""The CUDA kernels for chains of linear layers on the CPU: what `LinearChain` of the CUDA module is, by ctypes.

It does what csrc/cuda/linear_chain_binding.cpp does, and cuts a launch as that does: only the launch is another one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from math import prod
from typing import Any

import torch
from cuda_host import NUMBERS, compiled
from torch import Tensor

MOST_LAYERS = 16
MaybeTensor = Tensor | None


class Activation(Structure):
    _fields_ = [("p", c_float * 3), ("act", c_int32)]


class Layer(Structure):
    _fields_ = [
        ("weight", c_void_p), ("bias", c_void_p), ("grad_weight", c_void_p), ("grad_bias", c_void_p),
        ("weight_stride", c_int64 * 2), ("bias_stride", c_int64), ("grad_weight_stride", c_int64 * 2),
        ("grad_bias_stride", c_int64), ("latent", Activation), ("compare", c_int32), ("reversed", c_int32),
        ("arranged", c_int32 * 6),
    ]  # fmt: skip


class Params(Structure):
    """csrc/cuda/linear_chain.h says what each field is."""

    _fields_ = [
        ("layers", Layer * MOST_LAYERS), ("input", Activation), ("x", c_void_p), ("out", c_void_p), ("d", c_void_p),
        ("a", c_void_p), ("losses", c_void_p), ("grad_out", c_void_p), ("grad_losses", c_void_p),
        ("grad_x", c_void_p), ("partials", c_void_p * 3), ("rows", c_int64),
        ("count", c_int32), ("full", c_int32), ("wants_losses", c_int32), ("keeps", c_int32),
        ("width", c_int32 * (MOST_LAYERS + 1)), ("slot", c_int32 * (MOST_LAYERS + 2)),
        ("kept_d", c_int32), ("kept_a", c_int32), ("weights", c_int32), ("biases", c_int32), ("weight_room", c_int32),
        ("tile", c_int32), ("tile_shift", c_int32), ("splits", c_int32), ("blocks", c_int32), ("tiles_each", c_int32),
    ]  # fmt: skip


def library() -> ctypes.CDLL:
    found = compiled("linear_chain")
    for name in ("size_of_parameters", "shared_bytes", "room_for_partials", "run_chain"):
        getattr(found, name).restype = c_int64
    return found


class Host:
    """In place of the module: a GPU of few multiprocessors, so that small batches make several tiles for a block."""

    limit, multiprocessors = 99 * 1024, 2
    one_block = False  # as where there is no memory for more

    def __init__(self) -> None:
        self.cuts: list[tuple[int, int, int]] = []  # rows of a tile, blocks, tiles of each

    def shared_limit(self, device: int) -> int:
        return self.limit

    def LinearChain(self, *recipe: Any) -> LinearChain:  # noqa: N802  (the module's own name for it)
        return LinearChain(self, *recipe)


class LinearChain:
    def __init__(self, host: Host, latents: list[Any], compare: list[bool], full: bool):
        self.host, self.latents, self.compare, self.full = host, latents, compare, full

    def shared_bytes(self, widths: list[int]) -> int:
        return library().shared_bytes(byref(self.arranged(widths, torch.float32)))

    def arranged(self, widths: Sequence[int], dtype: torch.dtype) -> Params:
        p = Params(count=len(self.compare), full=self.full)
        p.width[: len(widths)] = widths
        for m, (act, given) in enumerate(self.latents):
            to = p.layers[m - 1].latent if m else p.input
            library().activation_of(NUMBERS[dtype], act, (ctypes.c_double * 3)(*given), byref(to))
        for layer, compare in zip(p.layers, self.compare, strict=False):
            layer.compare, layer.reversed = compare, self.full or compare
        library().arrange_chain(byref(p))
        return p

    def job(self, x: Tensor, weights: list[Tensor], biases: Sequence[MaybeTensor]) -> Params:
        p = self.arranged([x.shape[-1], *(w.shape[0] for w in weights)], x.dtype)
        for layer, weight, bias in zip(p.layers, weights, biases, strict=False):
            layer.weight, layer.weight_stride[:] = weight.data_ptr(), weight.stride()
            if bias is not None:
                layer.bias, layer.bias_stride = bias.data_ptr(), bias.stride(0)
        p.rows, p.x = prod(x.shape[:-1]), x.data_ptr()
        host = self.host
        assert library().cut_chain(byref(p), c_int64(host.limit), c_int64(host.multiprocessors), host.one_block)
        host.cuts.append((p.tile, p.blocks, p.tiles_each))
        return p

    def run(self, p: Params, backward: bool, like: Tensor) -> None:
        partials = torch.empty(library().room_for_partials(byref(p), backward))
        shared = library().run_chain(NUMBERS[like.dtype], backward, byref(p), c_void_p(partials.data_ptr()))
        assert shared <= self.host.limit

    def forward(
        self, x: Tensor, weights: list[Tensor], biases: Sequence[MaybeTensor], store: bool, reverse: bool
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        x = x.contiguous()
        p = self.job(x, weights, biases)
        out = x.new_empty(*x.shape[:-1], p.width[p.count])
        losses = torch.empty(p.count) if reverse else torch.zeros(p.count)
        d = [x.new_empty(p.rows, p.kept_d)] if store else []
        a = [x.new_empty(p.rows, p.kept_a)] if store and reverse else []
        p.out, p.losses, p.wants_losses, p.keeps = out.data_ptr(), losses.data_ptr(), reverse, store
        p.d, p.a = d[0].data_ptr() if d else None, a[0].data_ptr() if a else None
        self.run(p, False, x)
        return out, losses, d, a

    def backward(
        self,
        grad_out: MaybeTensor,
        grad_losses: MaybeTensor,
        x: Tensor,
        weights: list[Tensor],
        biases: Sequence[MaybeTensor],
        out: Tensor,
        d: MaybeTensor,
        a: MaybeTensor,
        needs_x: bool,
        needs_weights: list[bool],
        needs_biases: list[bool],
    ) -> tuple[MaybeTensor, list[MaybeTensor], list[MaybeTensor], MaybeTensor]:
        given, x = x, x.contiguous()
        p = self.job(x, weights, biases)
        held = [None if t is None else t.resolve_neg().contiguous() for t in (grad_out, d, a, out, grad_losses)]
        p.grad_out, p.d, p.a, p.out, p.grad_losses = (None if t is None else t.data_ptr() for t in held)
        p.keeps = d is not None
        grad_x = x.new_empty(x.shape) if needs_x else None
        p.grad_x = None if grad_x is None else grad_x.data_ptr()
        grad_w = [torch.empty_like(w) if needed else None for w, needed in zip(weights, needs_weights, strict=True)]
        grad_b = [torch.empty_like(b) if needed else None for b, needed in zip(biases, needs_biases, strict=True)]
        for layer, w, b in zip(p.layers, grad_w, grad_b, strict=False):
            if w is not None:
                layer.grad_weight, layer.grad_weight_stride[:] = w.data_ptr(), w.stride()
            if b is not None:
                layer.grad_bias, layer.grad_bias_stride = b.data_ptr(), b.stride(0)
        p.wants_losses = grad_losses is not None and a is None and not self.full
        losses = torch.empty(p.count) if p.wants_losses else None
        p.losses = None if losses is None else losses.data_ptr()
        self.run(p, True, x)
        if grad_x is not None and not given.is_contiguous():
            grad_x = torch.empty_like(given).copy_(grad_x)
        return grad_x, grad_w, grad_b, losses
