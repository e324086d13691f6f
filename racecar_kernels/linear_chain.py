"""A chain of narrow linear layers in one C++ call per direction: what such a network would else spend on calls.

The mathematics is that of `chain.py`. A block of rows goes through all layers, forth and back, while it is in the
cache. `store` keeps d_2 .. d_n and a_1 .. a_n, each in one tensor; `recompute` and `deferred` keep nothing but x, and
run a block again where its backward begins: a tenth of the step at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import extension, pointwise
from .layer import Activation, Chain, Latent, parse_chain
from .results import NoSecondDerivative, loss_dtype

MaybeTensors = Sequence["Tensor | None"]
Kept = tuple[list[Tensor], list[Tensor]]  # of the forward, of the reverse

# The rule, in one place: well above this width PyTorch's matrix products, layer by layer, are the faster ones.
WIDEST = 64
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
ONE_CALL = "a chain of narrow linear layers is one call already"


def why_not(chain: Chain, x: Tensor, weights: Sequence[Tensor]) -> str | None:
    """None where the C++ kernels serve this chain, else a sentence that says why not. Reads shapes and types only."""
    if any(w.dim() != 2 for w in weights):  # asked first, since it costs nothing
        return "not all of its layers are linear"
    reason = _compiled(str(chain))[0]
    if reason is not None:
        return reason
    if x.device.type != "cpu" or x.dtype not in DTYPES:
        return f"the kernels serve {', '.join(map(str, DTYPES))} on the CPU, got {x.dtype} on {x.device}"
    if any(w.dtype != x.dtype for w in weights):
        return "all weights need the type of x"
    widest = max(max(w.shape) for w in weights)
    if widest > WIDEST:
        return f"a layer has {widest} features; above {WIDEST} PyTorch's matrix products are faster"
    return None


def forward(
    text: str, x: Tensor, weights: list[Tensor], biases: MaybeTensors, memory: str
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """What the operator `tied_chain` gives."""
    extension.never_replayed(ONE_CALL)
    out, losses, d, a = _compiled(text)[1].forward(x, weights, biases, memory == "store", memory != "deferred")
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
    return run_backward(_compiled(text)[1], grad_out, grad_losses, x, weights, biases, out, kept, needs)


def run_backward(
    native: Any,
    grad_out: Tensor | None,
    grad_losses: Tensor | None,
    x: Tensor,
    weights: list[Tensor],
    biases: MaybeTensors,
    out: Tensor,
    kept: Kept,
    needs: Sequence[bool],
) -> list[Tensor]:
    """`backward` by a compiled chain, of whichever device: gradients that `needs` has, in turn, then new losses."""
    n = len(weights)
    d, a = (part[0] if part else None for part in kept)
    of_biases = [needed and b is not None for needed, b in zip(needs[1 + n : 1 + 2 * n], biases, strict=True)]
    grad_x, grad_w, grad_b, losses = native.backward(
        grad_out, grad_losses, x, weights, biases, out, d, a, needs[0], needs[1 : 1 + n], of_biases
    )
    found = x.new_empty(0, dtype=loss_dtype(x)) if losses is None else losses
    return [*(g for g in (grad_x, *grad_w, *grad_b) if g is not None), found]


def fake_kept(chain: Chain, x: Tensor, weights: Sequence[Tensor], memory: str) -> Kept:
    """Tensors like those that `forward` keeps: d_2 .. d_n, and the a of all layers that run backwards."""
    if memory != "store":
        return [], []
    rows, widths = prod(x.shape[:-1]), [w.shape[1] for w in weights]
    reversed_ = [width for m, width in enumerate(widths) if chain.reverses(m)]
    return [x.new_empty(rows, sum(widths[1:]))], [x.new_empty(rows, sum(reversed_))]


def apply(
    text: str, x: Tensor, weights: Sequence[Tensor], biases: MaybeTensors, memory: str, report: Any
) -> tuple[Tensor, Tensor] | None:
    """Output and losses as a node of the graph, past the operator and all of Python's part in it.

    None where that will not do: another kind of chain, tensors that do not fit or are not plain, a mode that watches.
    """
    native = _compiled(text)[1]
    if native is None:
        return None
    found: tuple[Tensor, Tensor] | None = native.apply(
        x, weights, biases, memory == "store", memory != "deferred", report
    )
    return found


def first_derivatives_only(grads: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The gradients, which refuse to be differentiated again; called by the node."""
    return list(NoSecondDerivative.apply(len(grads), *grads, *inputs))


@lru_cache(maxsize=4096)
def _compiled(text: str) -> tuple[str | None, Any]:
    """Why the kernels cannot serve this chain, whatever its tensors; else the chain as they take it."""
    chain = parse_chain(text)
    reason = why_never(chain, (None, "cpp"))
    module = extension.load()
    if reason is not None or module is None:
        return reason or extension.why_not(), None
    compare = [layer.compare for layer in chain.layers]
    return None, module.LinearChain(numbered_latents(chain), compare, chain.full, WIDEST)


def numbered_latents(chain: Chain) -> list[tuple[int, tuple[float, ...]] | None]:
    """What acts on a_1, then φ_1 .. φ_n, as csrc/pointwise.h counts activations."""
    first = chain.layers[0].latent
    return [_numbered(own) for own in (first, *map(chain.latent, range(len(chain.layers))))]


def why_never(chain: Chain, backends: Sequence[str | None]) -> str | None:
    """Why no kernels of these backends serve a chain as linear layers, whatever its tensors; None if they may."""
    if not any(layer.compare for layer in chain.layers):
        return "no layer is compared"
    if chain.backend not in backends:
        return f"backend {chain.backend!r} was asked for"
    if not all(layer.tied.dims == 0 and not layer.pre for layer in chain.layers):
        return "not all of its layers are linear"
    for own in (layer.latent for layer in chain.layers):
        if _numbered(own) is None:
            return f"{own} is not one activation that can be differentiated from its output"
    if _numbered(chain.last) is None:
        return f"{chain.last} is not one activation that can be differentiated from its output"
    return None


def _numbered(own: tuple[Latent, ...]) -> tuple[int, tuple[float, ...]] | None:
    if not own:
        return pointwise.numbered("identity", ())
    step = own[0]
    return pointwise.numbered(step.name, step.args) if len(own) == 1 and isinstance(step, Activation) else None
