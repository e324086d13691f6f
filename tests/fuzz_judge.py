"""Whether a result is right: against float64, as exact as the problem allows and no less.

A chosen tolerance fails right code (a norm over three almost equal values, a sign that flips at 0) or lets wrong code
pass. So results are judged together, norm-wise, in units of what a perturbation of the inputs by a few units in the
last place does to the truth itself: what is that near to it is a backward stable computation. Where the inputs are
whole numbers and everything is piecewise linear, results are exact, ties included, and nothing else is let through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Units in the last place that are right: a few roundings of intermediate results, which half precision keeps rounded;
# sums of thousands of terms in the others.
ROUNDINGS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32, torch.float64: 64}
PERTURBED = 6

Results = dict[str, list["Tensor | None"]]
Truth = Callable[..., Results]


def check_close(got: Results, truth: Truth, inputs: list[Tensor], dtype: torch.dtype, *, exact: bool) -> None:
    """Raises AssertionError where `got` is further from `truth(inputs)` (float64) than `dtype` explains.

    Every entry of the results is judged as one vector: what is 0 in truth has rounding errors as large as its
    neighbours'.

    truth: `truth(inputs)`, and with `plain=True` the same, and the gradients of all inputs, where no activation
    saturates and no norm subtracts a mean: the size of what may have been rounded, where the truth itself is 0.
    """
    want = truth(inputs)
    if dtype == torch.float16 and not all(g.isfinite().all() for ours in got.values() for g in ours):
        return  # its range ends at 65504, and what overflows on the way depends on the algorithm
    finite = all(t.isfinite().all() for t in inputs)
    for what, ours in got.items():
        assert len(ours) == len(want[what]), f"{what}: {len(ours)} results, not {len(want[what])}"
        pairs = [(g.detach().double(), w.detach()) for g, w in zip(ours, want[what], strict=True)]
        for g, w in pairs:
            assert g.shape == w.shape, f"{what}: shape {tuple(g.shape)}, not {tuple(w.shape)}"
        if not all(w.isfinite().all() for _, w in pairs):
            # not of gradients: some derivatives at NaN are 1 in one of PyTorch's own kernels and NaN in another (ELU)
            if what != "gradients":
                check_special(pairs, what)
        elif finite and pairs and max(float(w.abs().max()) for _, w in pairs) < torch.finfo(dtype).max / 16:
            _check_group(pairs, truth, inputs, dtype, exact=exact, what=what)


def _check_group(
    pairs: list[tuple[Tensor, Tensor]],
    truth: Truth,
    inputs: list[Tensor],
    dtype: torch.dtype,
    *,
    exact: bool,
    what: str,
) -> None:
    size, off = _norm([w for _, w in pairs]), _norm([g - w for g, w in pairs])
    eps = torch.finfo(dtype).eps
    allowed = ROUNDINGS[dtype] * eps * size
    if off > allowed and not exact:
        allowed += (
            ROUNDINGS[dtype] * eps * _norm([t.detach() for t in truth(inputs, plain=True)[what] if t is not None])
        )
        allowed += ROUNDINGS[dtype] * _moved(lambda near: truth(near)[what], inputs, [w for _, w in pairs], eps)
    if not size:  # a norm has divided what cancelled by sqrt(eps), in plain PyTorch as well
        allowed *= 4
    if off <= allowed:
        return
    worst = max(range(len(pairs)), key=lambda i: _norm([pairs[i][0] - pairs[i][1]]))
    g, w = pairs[worst]
    raise AssertionError(
        f"{what}: off by {off:.3g} of {size:.3g}, allowed {allowed:.3g}; most in result {worst}, of shape "
        f"{tuple(g.shape)}:\n{g}\nshould be\n{w}"
    )


def check_special(pairs: list[tuple[Tensor, Tensor]], what: str) -> None:
    """NaN and infinity are never hidden: where the truth is not finite, neither is the result."""
    for i, (g, w) in enumerate(pairs):
        hidden = ~w.isfinite() & g.isfinite()
        assert not hidden.any(), f"{what}: result {i} is finite where the truth is not:\n{g}\nshould be\n{w}"


def _moved(
    truth: Callable[[list[Tensor]], Sequence[Tensor | None]], inputs: list[Tensor], want: list[Tensor], eps: float
) -> float:
    """How far the truth moves, at most, when every input moves by a few eps of itself."""
    most = 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(PERTURBED):
        noise = [torch.rand(t.shape, generator=generator, dtype=torch.float64) * 2 - 1 for t in inputs]
        near = [
            (t.detach() * (1 + 2 * eps * n)).requires_grad_(t.requires_grad) for t, n in zip(inputs, noise, strict=True)
        ]
        moved = [t for t in truth(near) if t is not None]
        most = max(most, _norm([m.detach() - w for m, w in zip(moved, want, strict=True)]))
    return most


def _norm(tensors: Sequence[Tensor]) -> float:
    return sum(float(t.square().sum()) for t in tensors) ** 0.5


def gradients(total: Tensor | None, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """One per leaf that asks for one; a leaf that is not reached has the gradient 0."""
    wanted = [t for t in leaves if t.requires_grad]
    if total is None or not wanted:
        return []
    found = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else [None] * len(wanted)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
