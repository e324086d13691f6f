"""Which layers are computed by one fused kernel, and which by cuDNN with a pointwise kernel behind it.

A matter of measurement: `MEASURED` holds, by architecture, the shape classes and passes in which the fused kernel was
the faster one (`make gpu` writes the rows, `python -m bench.layers` alone as well). Not yet measured on a GPU: it is
empty, and everything goes to the library. The backends `triton:fused` and `triton:library` override it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import prod
from typing import Any

from torch import Tensor

from ..fused import Fused, Incoming, Result
from ..layer import Ints, Tied
from ..lazy import Lazy
from . import device, transposed
from .transposed_operands import kind_of, taps_of

MEASURED: dict[str, frozenset[str]] = {}
"""Architecture -> the names (`shape_class`) of what the fused kernel is faster at."""


def shape_class(pass_: str, kind: str, taps: int, channels: tuple[int, int], stride: int) -> str:
    """A name such as `forward half 9 taps 64 to 128 channels stride 1`.

    kind: half, tf32 or ieee. channels: of y and of u in a group, rounded up to powers of two. stride: the factor of
    up-sampling where that is folded.
    """
    source, result = (1 << max(0, n - 1).bit_length() for n in channels)
    return f"{pass_} {kind} {taps} taps {source} to {result} channels stride {stride}"


Takes = Callable[[str, Tensor, Tied, "Ints | None"], bool]


def measured(pass_: str, weight: Tensor, tied: Tied, factor: Ints | None) -> bool:
    """Whether the fused kernel was the faster one on this GPU."""
    own = MEASURED.get(device.of(weight).architecture)
    if own is None:
        return False
    channels = (weight.shape[0] // tied.groups, weight.shape[1])
    return shape_class(pass_, kind_of(weight), taps_of(weight), channels, max(factor or tied.stride)) in own


def always(pass_: str, weight: Tensor, tied: Tied, factor: Ints | None) -> bool:
    """Wherever the fused kernel serves."""
    return True


def way(weight: Tensor, tied: Tied, takes: Takes) -> str:
    """Which passes of a layer the fused kernel computes, for a plan: its shapes are not known there."""
    passes = [pass_ for pass_ in ("forward", "source", "weight") if tied.dims == 2 and takes(pass_, weight, tied, None)]
    return f"fused {', '.join(passes)}" if passes else "library"


def faster(rows: Iterable[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """`MEASURED` from the rows of bench/layers.py: where the fused kernel won in every row of a class."""
    won: dict[str, dict[str, bool]] = {}
    for row in rows:
        if row.get("fused_us") is None or row.get("wrong") or row["architecture"] == "interpreter":
            continue
        kind = "half" if row["dtype"] in ("bfloat16", "float16") else "tf32"
        channels = (row["c_out"] // row["groups"], row["c_in"] // row["groups"])
        name = shape_class(row["pass"], kind, prod(row["kernel"]), channels, max(row["factor"] or row["stride"]))
        of = won.setdefault(row["architecture"], {})
        of[name] = of.get(name, True) and row["fused_us"] < row["library_us"]
    return {architecture: frozenset(n for n, is_faster in of.items() if is_faster) for architecture, of in won.items()}


def fused(takes: Takes) -> Fused:
    """The fused kernels, where `takes` and they themselves have nothing against it."""
    return Fused(partial(_forward, takes), partial(_source_gradient, takes), partial(_weight_gradient, takes))


def _forward(takes: Takes, y: Lazy, weight: Tensor, tied: Tied, shape: Ints, **options: Any) -> Result | None:
    factor = options["factor"]
    if tied.dims != 2 or not takes("forward", weight, tied, factor):
        return None
    asked = {"factor": factor, "d": options["d"], "window": options["window"]}
    if transposed.why_not(y, weight, tied, shape, **asked) is not None:
        return None
    return transposed.forward(y, weight, tied, shape, **options)


def _source_gradient(
    takes: Takes, incoming: Incoming, weight: Tensor, tied: Tied, shape: Ints, **options: Any
) -> tuple[Tensor | None, Tensor | None] | None:
    factor = options["factor"]
    if tied.dims != 2 or not takes("source", weight, tied, factor):
        return None
    if transposed.why_not_gradients(incoming, [], weight, tied, shape, factor) is not None:
        return None
    return transposed.source_gradient(incoming, weight, tied, shape, **options)


def _weight_gradient(
    takes: Takes,
    weight: Tensor,
    tied: Tied,
    *,
    reverse: tuple[Incoming, Lazy, Tensor | None],
    factor: Ints | None = None,
) -> Tensor | None:
    if tied.dims != 2 or not takes("weight", weight, tied, factor):
        return None
    incoming, y, _ = reverse
    if transposed.why_not_gradients(incoming, [y], weight, tied, tuple(y.x.shape), factor) is not None:
        return None
    return transposed.weight_gradient(weight, tied, reverse=reverse, factor=factor)
