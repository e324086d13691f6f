"""Which layers are computed by one kernel, of Triton or of CUDA, and which by cuDNN or cuBLAS with a pointwise kernel.

A matter of measurement: `MEASURED` holds, by architecture, the shape classes and passes in which one of those kernels
was the fastest form: `make gpu` writes the rows (`python -m bench.layers` those of convolutions as well), and
`python -m bench.choose` makes the table of them, `measured.py`. Not yet measured on a GPU: it is empty, and everything
goes to the library. The backends `triton:fused`, `triton:library` and `cuda` override it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..fused import Fused, Incoming, Result
from ..layer import Ints, Tied
from ..lazy import Lazy
from . import device, linear_layer, measured, transposed
from .transposed_operands import kind_of, taps_of

MEASURED: dict[str, frozenset[str]] = {of: frozenset(names) for of, names in measured.FASTER.items()}
"""Architecture -> the names (`shape_class`) of what a kernel is fastest at: as they are, the fused one of Triton; with
`cuda` in front, the one of `racecar_kernels/cuda`."""

FORMS = {"fused": "", "cuda": "cuda "}
"""What there is beside the library, as the rows name it, and what it has in front of a name in `MEASURED`."""


FOLD = "fold"
"""What rows of folded weights have as their pass: no layer asks for it by itself, and `MEASURED` never has it."""


def shape_class(pass_: str, kind: str, taps: int, channels: tuple[int, int], stride: int) -> str:
    """A name such as `forward half 9 taps 64 to 128 channels stride 1`.

    kind: half, tf32 or ieee. channels: of y and of u in a group, rounded up to powers of two. stride: the factor of
    up-sampling where that is folded.
    """
    source, result = map(_rounded, channels)
    return f"{pass_} {kind} {taps} taps {source} to {result} channels stride {stride}"


CHAIN_PASSES = {
    "local": ("tied", "source", "both", "input"),
    "full": ("output", "forward", "source", "both", "input"),
}
"""What a chain of linear layers runs (`linear_chain.py`) by its variant, as the rows of `bench.linear_layers` name it.

Locally that is `store`; what is run again, or put off, is left out here, since no chain says how it is kept.
"""


def linear_class(pass_: str, kind: str, features: tuple[int, int]) -> str:
    """A name such as `tied half linear 128 to 1024 features`: those of y and of p, rounded up to powers of two."""
    outputs, inputs = map(_rounded, features)
    return f"{pass_} {kind} linear {outputs} to {inputs} features"


def linear_kind(t: Tensor, precision: str | None = None) -> str:
    """How matrix products of such tensors are computed: half, tf32 or ieee. precision: of float32; None: PyTorch's."""
    if t.dtype != torch.float32:
        return "half"
    precision = precision or torch.backends.cuda.matmul.fp32_precision
    return "tf32" if precision == "tf32" else "ieee"


def _rounded(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


Takes = Callable[[str, Tensor, Tied, "Ints | None"], bool]


def is_fastest(
    pass_: str, weight: Tensor, tied: Tied, factor: Ints | None, form: str = "fused", precision: str | None = None
) -> bool:
    """Whether a kernel of this form was the fastest one on this GPU. precision: as in `linear_kind`."""
    own = MEASURED.get(device.of(weight).architecture)
    if own is None:
        return False
    if tied.dims == 0:
        name = linear_class(pass_, linear_kind(weight, precision), (weight.shape[0], weight.shape[1]))
    else:
        channels = (weight.shape[0] // tied.groups, weight.shape[1])
        name = shape_class(pass_, kind_of(weight), taps_of(weight), channels, max(factor or tied.stride))
    return FORMS[form] + name in own


def always(pass_: str, weight: Tensor, tied: Tied, factor: Ints | None) -> bool:
    """Wherever the fused kernel serves."""
    return True


SERVED = {2: transposed, 0: linear_layer}
"""Dimensions of a tied operation -> the launchers of its fused kernels."""


def way(weight: Tensor, tied: Tied, forms: Mapping[str, Fused]) -> str:
    """Which passes of a layer each form computes, for a plan: the sizes of its images are not known there."""
    left = ["forward", "source", "weight"] if tied.dims else ["tied", "forward", "source", "weight"]
    told = []
    for form, kernels in forms.items():
        passes = [pass_ for pass_ in left if kernels.takes(pass_, weight, tied, None)]
        left = [pass_ for pass_ in left if pass_ not in passes]
        told += [f"{form} {', '.join(passes)}"] if passes else []
    return "; ".join(told) or "library"


def faster(rows: Iterable[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """`MEASURED` from the rows of `bench.layers` and `bench.linear_layers`.

    A form wins where it was faster than the library in every row of a class that it served; of two such forms the one
    with the lower mean of time to the library's time.
    """
    ratios: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        if row.get("wrong") or row["architecture"] == "interpreter" or row["pass"] == FOLD:
            continue
        kind = "half" if row["dtype"] in ("bfloat16", "float16") else "tf32"
        channels = (row["c_out"] // row["groups"], row["c_in"] // row["groups"])
        if row["kernel"]:
            name = shape_class(row["pass"], kind, prod(row["kernel"]), channels, max(row["factor"] or row["stride"]))
        else:
            name = linear_class(row["pass"], kind, channels)
        of = ratios.setdefault(row["architecture"], {}).setdefault(name, {})
        for form in FORMS:
            if row.get(f"{form}_us") is not None:
                of.setdefault(form, []).append(row[f"{form}_us"] / row["library_us"])
    found = {}
    for architecture, classes in ratios.items():
        won = {name: _fastest(of) for name, of in classes.items()}
        found[architecture] = frozenset(FORMS[form] + name for name, form in won.items() if form is not None)
    return found


def _fastest(ratios: Mapping[str, list[float]]) -> str | None:
    """Of the forms that were always faster than the library, by their times to the library's time."""
    faster = {form: fmean(own) for form, own in ratios.items() if max(own) < 1}
    return min(faster, key=faster.__getitem__, default=None)


def fused(takes: Takes) -> Fused:
    """The fused kernels, for those layers that `takes` wants and they themselves have nothing against."""
    return Fused(lambda pass_, weight, tied, factor: tied.dims in SERVED and takes(pass_, weight, tied, factor),
                 _forward, _source_gradient, _weight_gradient)  # fmt: skip


def _forward(y: Lazy, weight: Tensor, tied: Tied, shape: Ints, **options: Any) -> Result | None:
    if tied.dims == 0:
        del options["norm"]  # its statistics are left to the pointwise kernels
        return linear_layer.forward(y, weight, shape, tf32=linear_kind(weight) == "tf32", **options)
    asked = {name: options[name] for name in ("factor", "d", "window")}
    if transposed.why_not(y, weight, tied, shape, **asked) is not None:
        return None
    return transposed.forward(y, weight, tied, shape, **options)


def _source_gradient(
    incoming: Incoming, weight: Tensor, tied: Tied, shape: Ints, **options: Any
) -> tuple[Tensor | None, Tensor | None] | None:
    if tied.dims == 0:
        return linear_layer.source_gradient(incoming, weight, shape, tf32=linear_kind(weight) == "tf32", **options)
    if transposed.why_not_gradients(incoming, [], weight, tied, shape, options["factor"]) is not None:
        return None
    return transposed.source_gradient(incoming, weight, tied, shape, **options)


def _weight_gradient(
    weight: Tensor, tied: Tied, *, reverse: tuple[Incoming, Lazy, Tensor | None], factor: Ints | None = None
) -> Tensor | None:
    if tied.dims == 0:
        return linear_layer.weight_gradient(weight, reverse, tf32=linear_kind(weight) == "tf32")
    incoming, y, _ = reverse
    if transposed.why_not_gradients(incoming, [y], weight, tied, tuple(y.x.shape), factor) is not None:
        return None
    return transposed.weight_gradient(weight, tied, reverse=reverse, factor=factor)
