"""λ: how much the loss of every layer counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

Lam = float | Sequence[float] | Mapping[str, float]


def parse_lam(lam: Any, names: Sequence[str]) -> list[float]:
    """One λ per compared layer, m = 1 first, from a number, a sequence or a mapping by layer name.

    A layer that a mapping does not name gets 0. Tensors and arrays of one number per layer are taken too.

    Raises:
        TypeError: not a number, sequence or mapping of numbers.
        ValueError: negative, infinite or NaN; a sequence of another length; a name that no layer has.
    """
    if hasattr(lam, "tolist"):
        lam = lam.tolist()
    if isinstance(lam, Mapping):
        unknown = [name for name in lam if name not in names]
        if unknown:
            raise ValueError(f"lam names {', '.join(map(repr, unknown))}; the compared layers are {', '.join(names)}")
        return [_number(lam.get(name, 0.0), f"lam[{name!r}]") for name in names]
    if isinstance(lam, Real) and not isinstance(lam, bool):
        return [_number(lam, "lam")] * len(names)
    if isinstance(lam, (str, bytes)) or not isinstance(lam, Sequence):
        raise TypeError(
            f"lam must be a number, a sequence of one number per layer, or a mapping from layer names to numbers, "
            f"got {type(lam).__name__} {lam!r}"
        )
    if len(lam) != len(names):
        raise ValueError(f"lam has {len(lam)} values, the compared layers are {len(names)}: {', '.join(names)}")
    return [_number(value, f"lam[{i}]") for i, value in enumerate(lam)]


def _number(value: Any, name: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} must be a finite number of at least 0, got {number}")
    return number
