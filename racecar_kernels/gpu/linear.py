"""Launches the Triton kernels of the tied linear layer: forward, its reverse with the same weight, and their gradients.

    y = act_f(p Wᵀ + b)                                     forward; p: rows × in, W: out × in, b: out, y: rows × out
    a = act_r((y - b) W),   loss = Σ (a - p)²               reverse; a: rows × in

Local: y is what the forward gave, and `tied` computes both in one kernel where the output features fit a tile. Full: y
is the a of the layer above, and `reverse` takes it. y - b and the residual never exist in memory; nor does, in
the backward, the gradient of u = (y - b) W

    g_u = act_r'(a) · (g_in + c2 · (a - p))                 c2: twice the gradient of the sum of squares

that both gradients need. Results are rounded to the type of p; all is summed in float32, always in the same order.
`why_not` names what is not served; a function given such tensors raises ValueError with that sentence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..pointwise import numbered
from . import configs, device
from . import linear_kernels as kernels
from .pointwise import _activation as activation
from .shipped import Shipped
from .sums import sum_partials
from .tuning import launcher

Act = tuple[str, tuple[Any, ...]]
"""An activation's name and arguments, as in `activations.TABLE`."""

IDENTITY: Act = ("identity", ())
MOST_OUTPUTS = 128  # for which one kernel computes forward and reverse: the source stays in registers
MOST_FEATURES = 2**31 - 2**16  # they and the rows are numbered with 32 bits


class ForthAndBack(NamedTuple):
    """y (rows × out), a (rows × in), Σ (a - p)² (float32, no dimensions)."""

    y: Tensor
    a: Tensor
    loss: Tensor


class Reversed(NamedTuple):
    """A reverse that was run, and what its result receives: the gradient g_in (rows × in), and c2 (one number).

    y may be missing where the gradient of an y that is no layer's own output is all that is wanted.
    """

    y: Tensor | None
    a: Tensor
    p: Tensor | None
    weight: Tensor
    bias: Tensor | None = None
    act: Act = IDENTITY
    g_in: Tensor | None = None
    c2: Tensor | None = None


def why_not(*matrices: Tensor | None, bias: Tensor | None = None, acts: Sequence[Act] = ()) -> str | None:
    """None where the Triton kernels serve these tensors and activations together, else a sentence that says why not."""
    tensors = [t for t in matrices if t is not None]
    reason = device.why_not_tensors(tensors, [] if bias is None else [bias])
    if reason is not None:
        return reason
    if bias is not None and bias.dtype not in device.DTYPES:
        return f"a bias of {device.listed(device.DTYPES)} is needed, got {bias.dtype}"
    for t in tensors:
        if t.dim() != 2:
            return f"matrices of (rows, features) are needed, got {t.dim()} dimensions"
        if t.shape[1] > 1 and t.stride(1) != 1:
            return f"features must lie beside each other, got strides {t.stride()}"
        if t.numel() == 0 or max(t.shape) > MOST_FEATURES:
            return f"1 to {MOST_FEATURES} rows and features are served, got {tuple(t.shape)}"
    if bias is not None and bias.numel() > 1 and bias.stride() != (1,):
        return f"a bias must lie in one piece, got strides {bias.stride()}"
    for name, args in acts:
        if numbered(name, args) is None:
            return f"not served: {name}{args or ''} is not computed from its output"
    return None


def fits(weight: Tensor) -> bool:
    """Whether `tied` is one kernel: the output features of W (out × in) fit a tile."""
    return weight.shape[0] <= MOST_OUTPUTS


# ------------------------------------------------------------------------------------------- forward and reverse


@launcher
def linear(p: Tensor, weight: Tensor, bias: Tensor | None = None, act: Act = IDENTITY, *, tf32: bool = False) -> Tensor:
    """y = act(p Wᵀ + b), rows × out. tf32: float32 is multiplied in the matrix units, with 10 bits of mantissa."""
    _serve(p, weight, bias=bias, acts=[act])
    rows, inputs, outputs = _sizes(weight, bias, p=p)
    y = p.new_empty(rows, outputs)
    number, values = activation(*act, p.dtype)
    grid, known = _product("product", (p, weight, y), rows, outputs, inputs, tf32)
    kernels.linear_fwd_kernel[grid](
        p, weight, bias, y, rows, inputs, outputs, *_strides(p, weight, y), *values,
        ACT=number, **known,
    )  # fmt: skip
    return y


@launcher
def reverse(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: Act = IDENTITY,
    p: Tensor | None = None,
    *,
    tf32: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """a = act((y - b) W), rows × in, and Σ (a - p)² if there is p (rows × in) to compare it with. y: rows × out."""
    _serve(y, weight, p, bias=bias, acts=[act])
    rows, inputs, outputs = _sizes(weight, bias, y=y, p=p)
    a = y.new_empty(rows, inputs)
    number, values = activation(*act, y.dtype)
    grid, known = _product("product", (y, weight, p, a), rows, inputs, outputs, tf32)
    partials = None if p is None else y.new_empty(grid[0], dtype=torch.float32)
    kernels.reverse_fwd_kernel[grid](
        y, p, weight, bias, a, partials, rows, inputs, outputs,
        *_strides(y, p, weight, a), *values, ACT=number, **known,
    )  # fmt: skip
    return a, None if partials is None else partials.sum()


@launcher
def tied(
    p: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: Act = IDENTITY,
    reverse_act: Act = IDENTITY,
    *,
    tf32: bool = False,
    fused: bool | None = None,
) -> ForthAndBack:
    """Forward and reverse from its own output. fused: in one kernel; None: where the output features fit."""
    if fused and not fits(weight):
        raise ValueError(f"one kernel computes up to {MOST_OUTPUTS} output features, got {weight.shape[0]}")
    if fused is False or not fits(weight):
        y = linear(p, weight, bias, act, tf32=tf32)
        a, loss = reverse(y, weight, bias, reverse_act, p, tf32=tf32)
        return ForthAndBack(y, a, y.new_zeros((), dtype=torch.float32) if loss is None else loss)
    _serve(p, weight, bias=bias, acts=[act, reverse_act])
    rows, inputs, outputs = _sizes(weight, bias, p=p)
    y, a = p.new_empty(rows, outputs), p.new_empty(rows, inputs)
    (f_act, f_values), (r_act, r_values) = activation(*act, p.dtype), activation(*reverse_act, p.dtype)
    math = _math(p, tf32)
    blocks, grid, options = configs.linear_tied(math, rows, inputs, outputs, device.of(p), _aligned(p, weight, y))
    partials = p.new_empty(grid, dtype=torch.float32)
    kernels.tied_fwd_kernel[grid](
        p, weight, bias, y, a, partials, rows, inputs, outputs,
        *_strides(p, weight, y, a), *f_values, *r_values, F_ACT=f_act, R_ACT=r_act, PRECISION=_precision(math),
        **blocks, **options,
    )  # fmt: skip
    return ForthAndBack(y, a, partials.sum())


# ------------------------------------------------------------------------------------------- backward


@launcher
def grad_source(
    r: Reversed,
    *,
    own: Act | None = None,
    g_out: Tensor | None = None,
    needs_y: bool = True,
    needs_bias: bool | None = None,
    tf32: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of y, gs = g_u Wᵀ (rows × out), and of the bias, -Σ_rows gs (out, float32).

    needs_bias: None: where there is a bias.

    own: y is the layer's own output, of this activation, and receives g_out besides. Then the gradients are those of
    c = p Wᵀ + b, g_c = act_f'(y) · (g_out + gs), and of the bias from both its uses, Σ_rows (g_c - gs).
    """
    if own is None and g_out is not None:
        raise ValueError("g_out is what a layer's own output receives, and needs its activation; got own = None")
    if own is not None and r.y is None:
        raise ValueError("an own output's activation is differentiated from that output; got y = None")
    rows, inputs, outputs = _check(r, g_out, acts=[r.act, own or IDENTITY])
    out = r.a.new_empty(rows, outputs) if needs_y else None
    grid, known = _product("source", (r.a, r.y, r.p, r.weight, r.g_in, g_out), rows, outputs, inputs, tf32)
    blocks = triton.cdiv(rows, known["BLOCK_R"])
    needs_bias = r.bias is not None if needs_bias is None else needs_bias
    partials = r.a.new_empty(blocks, outputs, dtype=torch.float32) if needs_bias else None
    (r_act, r_values), (f_act, f_values) = activation(*r.act, r.a.dtype), activation(*(own or IDENTITY), r.a.dtype)
    y = None if own is None else r.y
    kernels.grad_source_kernel[grid](
        r.a, r.p, r.g_in, r.c2, r.weight, y, g_out, out, partials, rows, inputs,
        outputs, *_strides(r.a, r.p, r.g_in, r.weight, y, g_out, out), *r_values, *f_values, R_ACT=r_act, F_ACT=f_act,
        **known,
    )  # fmt: skip
    return out, None if partials is None else sum_partials(partials, partials.new_empty(outputs))


@launcher
def grad_weight(
    r: Reversed, g_c: Tensor | None = None, *, reverse: bool = True, splits: int | None = None, tf32: bool = False
) -> Tensor:
    """dW = (y - b)ᵀ g_u + g_cᵀ p, out × in: both uses of the weight, or one (reverse=False, g_c=None).

    g_c: rows × out, the gradient of c = p Wᵀ + b. splits: into how many parts the rows are cut, at most; None: as many
    as keep the device busy.
    """
    rows, inputs, outputs = _check(r, g_c, acts=[r.act])
    if g_c is not None and r.p is None:
        raise ValueError("g_c needs p, what the forward received; got p = None")
    if reverse and r.y is None:
        raise ValueError("the weight's use in reverse needs its source; got y = None")
    number, values = activation(*r.act, r.a.dtype)
    math = _math(r.a, tf32)
    aligned = _aligned(r.y, r.a, r.p, r.weight, r.g_in, g_c)
    blocks, grid, each, options = configs.linear_weight(math, rows, inputs, outputs, device.of(r.a), aligned, splits)
    dw = r.weight.new_empty(outputs, inputs)
    partials = dw if grid[1] == 1 else dw.new_empty(grid[1], outputs * inputs, dtype=torch.float32)
    kernels.grad_weight_kernel[grid](
        r.y, r.bias, r.a, r.p, r.g_in, r.c2, g_c, partials, rows, inputs, outputs,
        each, *_strides(r.y, r.a, r.p, r.g_in, g_c), *values, ACT=number, REVERSE=reverse,
        PRECISION=_precision(math), **blocks, **options,
    )  # fmt: skip
    return dw if partials is dw else sum_partials(partials, dw)


@launcher
def grad_input(g_c: Tensor, r: Reversed, *, tf32: bool = False) -> Tensor:
    """g_c W + c2 (p - a), rows × in: what p receives from the forward and from the residual. g_c: rows × out."""
    rows, inputs, outputs = _check(r, g_c)
    out = g_c.new_empty(rows, inputs)
    grid, known = _product("product", (g_c, r.weight, r.a, r.p), rows, inputs, outputs, tf32)
    kernels.grad_input_kernel[grid](
        g_c, r.weight, r.a, r.p, r.c2, out, rows, inputs, outputs,
        *_strides(g_c, r.weight, r.a, r.p, out), **known,
    )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------- what the launchers share


def _serve(*matrices: Tensor | None, bias: Tensor | None, acts: Sequence[Act]) -> None:
    reason = why_not(*matrices, bias=bias, acts=acts)
    if reason is not None:
        raise ValueError(f"the Triton kernels of the linear layer: {reason}")


def _sizes(weight: Tensor, bias: Tensor | None, **matrices: Tensor | None) -> tuple[int, int, int]:
    """Rows, input and output features; ValueError where the matrices do not fit each other."""
    outputs, inputs = weight.shape
    given = {name: t for name, t in matrices.items() if t is not None}
    rows = next(iter(given.values())).shape[0]
    for name, t in given.items():
        right = (rows, outputs if name in ("y", "g_c", "g_out") else inputs)
        if tuple(t.shape) != right:
            raise ValueError(f"{name} should be {right} beside a weight of {(outputs, inputs)}, got {tuple(t.shape)}")
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias should be {(outputs,)} beside a weight of {(outputs, inputs)}, got {tuple(bias.shape)}")
    return rows, inputs, outputs


def _check(r: Reversed, g_y: Tensor | None, acts: Sequence[Act] = ()) -> tuple[int, int, int]:
    _serve(r.a, r.y, r.p, r.weight, r.g_in, g_y, bias=r.bias, acts=acts)
    if r.c2 is not None and (r.p is None or r.c2.numel() != 1 or r.c2.device != r.a.device):
        raise ValueError("c2 is one number, on the device of p, which it needs")
    return _sizes(r.weight, r.bias, y=r.y, a=r.a, p=r.p, g_in=r.g_in, g_out=g_y)


def _product(
    kernel: str, operands: tuple[Tensor | None, ...], rows: int, columns: int, depth: int, tf32: bool
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid, blocks, precision and options of a kernel that writes rows × columns and sums over depth."""
    first = operands[0]
    if first is None:
        raise TypeError("the first operand is never left out")
    math, aligned = _math(first, tf32), _aligned(*operands)
    blocks, grid, options = configs.linear(kernel, math, rows, columns, depth, device.of(first), aligned)
    return grid, {"PRECISION": _precision(math), **blocks, **options}


def _aligned(*tensors: Tensor | None) -> bool:
    """Whether Triton reads rows in pieces of 16 bytes: features, strides and addresses are multiples of 16."""
    return all(
        t is None or (t.shape[1] % 16 == 0 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0) for t in tensors
    )


def _math(t: Tensor, tf32: bool) -> str:
    """How the products are computed: half (bfloat16, float16), tf32 or ieee."""
    return "half" if t.dtype != torch.float32 else "tf32" if tf32 else "ieee"


def _precision(math: str) -> str:
    if math == "half" and device.INTERPRETED:
        return "wide"
    return "tf32" if math == "tf32" else "ieee"


def _strides(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.stride(0) for t in tensors]


# ------------------------------------------------------------------------------------------- what is shipped


_BY_TABLE = {
    "product": (kernels.linear_fwd_kernel, kernels.reverse_fwd_kernel, kernels.grad_input_kernel),
    "source": (kernels.grad_source_kernel,),
    "weight": (kernels.grad_weight_kernel,),
    "tied": (kernels.tied_fwd_kernel,),
}
_FLOATS = ("bias", "partials", "c2")  # float32, whatever type the matrices have
_COUNTS = ("rows", "inputs", "outputs", "each")


def shipped(architecture: str) -> Iterator[Shipped]:
    """Every config of an architecture (sm_80, ...) for compiling ahead of time, in float32 (ieee, tf32) and bfloat16.

    All optional tensors are there, and the activations are tanh. `tied` comes for every number of output features that
    is told apart.
    """
    for aligned in (True, False):
        for table, by_math in configs.linear_tiles(architecture, aligned).items():
            for math, tiles in by_math.items():
                for tile, kernel in itertools.product(tiles, _BY_TABLE[table]):
                    yield from _of_tile(table, math, tile, kernel, aligned)


def _of_tile(table: str, math: str, tile: configs.Tile, kernel: Any, aligned: bool) -> Iterator[Shipped]:
    for columns in (16, 32, 64, MOST_OUTPUTS) if table == "tied" else (tile.columns,):
        own = dict(_constants(table, math, tile._replace(columns=columns)))
        constants = {name: value for name, value in own.items() if name in kernel.arg_names}
        types = {name: _type(name, math) for name in kernel.arg_names if name not in constants}
        names = tuple(n for n, kind in types.items() if kind[0] == "*" or n[:2] == "s_" or n in ("inputs", "outputs"))
        given = names if aligned else ()
        name = f"{table} {math} {tile[:3]}{'' if aligned else ' ragged'}"
        entry = Shipped(name, kernel, types, constants, configs.options(tile), given, math != "ieee")
        yield entry
        if "REVERSE" in constants:  # the weight's use forward alone
            yield entry._replace(name=f"{name} forward", constants={**constants, "REVERSE": False})


def _constants(table: str, math: str, tile: configs.Tile) -> Iterator[tuple[str, Any]]:
    blocks = {"tied": ("BLOCK_R", "BLOCK_O", "BLOCK_I"), "weight": ("BLOCK_O", "BLOCK_I", "BLOCK_K")}
    yield from zip(blocks.get(table, ("BLOCK_R", "BLOCK_C", "BLOCK_K")), tile[:3], strict=True)
    yield from (("ACT", 4), ("R_ACT", 4), ("F_ACT", 4), ("REVERSE", True), ("GROUP", configs.GROUP))
    yield "PRECISION", "tf32" if math == "tf32" else "ieee"


def _type(name: str, math: str) -> str:
    if name[-2:] in ("p0", "p1", "p2"):
        return "fp32"
    if name in _COUNTS or name.startswith("s_"):
        return "i32"
    return "*bf16" if math == "half" and name not in _FLOATS else "*fp32"
