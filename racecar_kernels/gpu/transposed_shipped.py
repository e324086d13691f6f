"""What is compiled ahead of time to prove the fused transposed convolution without a GPU: every config, fully fused."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from . import configs
from . import transposed_kernels as kernels
from .device import Device
from .shipped import Shipped

# Pointers to images and weights, and whatever is float32 always; the other arguments are integers.
_IMAGES = {"y", "weight", "d", "out", "source", "g", "a", "p", "gp"}
_WIDE = {"bias", "minus", "c2", "partials"} | {f"{t}_{v}" for t in "yapd" for v in ("scale", "shift")}
_OF_NORM = {"norm_parts": "*fp64", "norm_rows": "*i32"}
# what a kernel that also takes a norm's statistics does not get: all that is behind them is left to another one
_BEHIND = {"a_scale", "a_shift", "d", "d_scale", "d_shift", "minus", "source", "partials"}
_FLOATS = {f"{t}_p{i}" for t in "yapd" for i in range(3)}
_BATCH = {"y_n", "u_n", "d_n", "g_n", "a_n", "p_n", "gp_n", "s_n", "o_split"}
_STRIDES = _BATCH | {"C_OUT", "C_IN", "CG_OUT", "CG_IN", "w_o", "w_h", "w_w", "o_o", "o_h", "o_w"}
_RELU = 1
_KNOWN = {f"{t}_ACT": _RELU for t in "YAPD"} | {f"{t}_DONE": t == "A" for t in "YAPD"} | {"KEEP_U": False}
_SHAPES = {"few": (3, 3), "odd": (100, 3), "many": (256, 3), "point": (256, 1)}  # channels of a tap, rows of the kernel

# uses of a weight, of which its gradient is the sum: in reverse alone, or both
_USES = tuple({"FORWARD": forward, "REVERSE": reverse} for forward, reverse in ((False, True), (True, True)))


def _window(size: int) -> dict[str, int]:
    return {"PH": size, "PW": size, "RAGGED_H": 0, "RAGGED_W": 0}


_ALONE: dict[str, tuple[Any, tuple[dict[str, Any], ...]]] = {
    "transposed": (kernels.transposed_kernel, ({**_window(1), "PHASES": False},)),
    "source": (kernels.source_gradient_kernel, ({},)),
    "weight": (kernels.weight_gradient_kernel, _USES),
}
"""The kernel of a family, and its constants beside sizes, where no up-sampling is folded and no pooling undone."""


def shipped(architecture: str = "sm_90") -> Iterator[Shipped]:
    """Every config, in bfloat16, in float32 as TF32 and in float32 without the matrix units.

    Prologues and epilogues are all there, since they are what registers run out on; a relu stands for the activations.
    Tiles are whole; those of a u of one channel are narrow. Not among them: an elu of y, of a and of d at once, with a
    ragged window of a pooling, which spills up to 336 bytes on sm_90 (Triton 3.7).
    """
    on = Device(architecture, 132)
    for kind in ("half", "tf32", "ieee"):
        for name, (channels, k) in _SHAPES.items():
            sizes = {"KH": k, "KW": k, "SH": 1, "SW": 1, "FLAT": name == "few"}
            others = 100 if name == "odd" else 256
            for columns in (others, 1) if name == "many" else (others,):
                own = configs.gemm("transposed", kind, channels, columns, k * k, on)
                exact = channels % 16 == 0 and columns % 16 == 0
                constants = {**sizes, **_window(1), "PHASES": False}
                yield _entry(f"{name} {columns}", kernels.transposed_kernel, kind, own, constants, exact=exact)
                yield _with_norm(f"{name} {columns}", kind, own, constants, exact=exact)
            own = configs.gemm("source", kind, channels, others, k * k, on)
            exact = channels % 16 == 0
            yield _entry(name, kernels.source_gradient_kernel, kind, own, sizes, exact=exact)
            own = configs.weight_gemm(kind, others, channels, k * k, on)
            for uses in _USES:
                yield _entry(name, kernels.weight_gradient_kernel, kind, own, {**sizes, **uses}, exact=exact)
        yield from _contiguous(kind, on)
        own = configs.gemm("transposed", kind, 256, 64, 16, on)  # up-sampling folded, pooling undone in the epilogue
        sizes = {"KH": 4, "KW": 4, "SH": 2, "SW": 2, "FLAT": False, "PHASES": True}
        yield _entry("folded", kernels.transposed_kernel, kind, own, {**sizes, **_window(2)}, exact=True)
        yield _with_norm("folded", kind, own, {**sizes, **_window(1)}, exact=True)
    for (family, kind, shape), more in configs.MORE_GEMMS.items():
        for own in more:
            yield from _tunable(family, kind, shape, own)


def _tunable(family: str, kind: str, shape: str, own: configs.Gemm) -> Iterator[Shipped]:
    """What only tuning chooses, with whole channels."""
    k = _SHAPES[shape][1]
    sizes = {"KH": k, "KW": k, "SH": 1, "SW": 1, "FLAT": False}
    kernel, every = _ALONE[family]
    for constants in every:
        yield _entry(f"tuned {shape}", kernel, kind, own, {**sizes, **constants}, exact=True)


def _with_norm(name: str, kind: str, own: configs.Gemm, constants: dict[str, Any], *, exact: bool) -> Shipped:
    """u with the statistics of the norm behind it."""
    constants = {**constants, "KEEP_U": True, "A_ACT": 0}
    return _entry(f"{name} norm", kernels.transposed_kernel, kind, own, constants, exact=exact, without=_BEHIND)


def _contiguous(kind: str, on: Device) -> Iterator[Shipped]:
    """The largest tiles with a weight (C_out, C_in, 3, 3) whose taps lie beside each other, not its channels."""
    sizes = {"KH": 3, "KW": 3, "SH": 1, "SW": 1, "FLAT": False}
    tiles = {family: configs.gemm(family, kind, 256, 256, 9, on) for family in ("transposed", "source")}
    tiles["weight"] = configs.weight_gemm(kind, 256, 256, 9, on)
    for family, own in tiles.items():
        kernel, every = _ALONE[family]
        for constants in every:
            yield _entry("contiguous weight", kernel, kind, own, {**sizes, **constants}, exact=True, last=False)


def _entry(
    name: str,
    kernel: Any,
    kind: str,
    own: configs.Gemm | None,
    constants: dict[str, Any],
    *,
    exact: bool,
    last: bool = True,
    without: Collection[str] = _OF_NORM,
) -> Shipped:
    """exact: all channels are divisible by 16. last: the weight is channels_last. without: arguments that are None."""
    name += ", both uses" if constants.get("FORWARD") else ""
    given = {**_KNOWN, "PRECISION": "tf32" if kind == "tf32" else "ieee", **constants, **(own.blocks if own else {})}
    # what lies beside each other in the weight: an argument that is 1 is a constant to Triton
    given |= {"w_i": 1, "o_i": 1} if last else {"w_w": 1, "o_w": 1}
    given |= dict.fromkeys(without)
    known = {n: given[n] for n in kernel.arg_names if n in given}
    signature = {n: _type_of(n, "bf16" if kind == "half" else "fp32") for n in kernel.arg_names if n not in known}
    strides = _STRIDES if last else _STRIDES - {"w_h", "o_h"}
    aligned = tuple(n for n, t in signature.items() if t.startswith("*") or (exact and n in strides))
    options = own.options if own else {"num_warps": 4}
    return Shipped(
        f"{kind} {name}", kernel, signature, known, options, aligned, matrix=own is not None and kind != "ieee"
    )


def _type_of(name: str, dtype: str) -> str:
    if name in _OF_NORM:
        return _OF_NORM[name]
    if name in _IMAGES:
        return f"*{dtype}"
    return "*fp32" if name in _WIDE else "fp32" if name in _FLOATS else "i64" if name in _BATCH else "i32"
