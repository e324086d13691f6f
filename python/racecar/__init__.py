"""Pretrain a PyTorch model together with its own reverse pass (racecar training).

    import racecar
    net = racecar.wrap(model, lam=1e-5)
    loss = criterion(net(x), t) + net.reverse_loss

`python -m racecar` and the command `racecar` run a demonstration.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from racecar_kernels import __version__

    from .plan import Plan, PlannedLayer
    from .sampling import Sample
    from .wrapping import wrap

__all__ = ["Plan", "PlannedLayer", "Sample", "__version__", "wrap"]

# PyTorch is imported with the first of these, so that `racecar --help` does not wait for it
_HOME = {
    "Plan": ".plan",
    "PlannedLayer": ".plan",
    "Sample": ".sampling",
    "__version__": "racecar_kernels",
    "wrap": ".wrapping",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'racecar' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
