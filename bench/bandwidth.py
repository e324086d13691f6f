"""Every pointwise kernel on a large tensor: bytes moved per second against the bandwidth of a copy in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.device_time import ceilings, medians, relative_error
from racecar_kernels import pointwise_ref as ref
from racecar_kernels.lazy import Lazy

LARGE, TINY = (64, 64, 224, 224), (2, 8, 6, 6)
WINDOW = (2, 2)
GOAL = 0.85  # of the bandwidth of a copy
ALLOWED = {torch.bfloat16: 1.6e-2, torch.float32: 1e-4}  # norm-wise from plain PyTorch, which sums in another order


class Kernel(NamedTuple):
    """A function of the family and its twin in plain PyTorch.

    Attributes:
        images: how many whole tensors are read and written.
        timed: what is timed instead of `run`, where a fresh tensor to write over would be copied on the way.
    """

    name: str
    run: Callable[[], Any]
    right: Callable[[], Any]
    images: float
    timed: Callable[[], Any] | None = None


def kernels(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> list[Kernel]:
    """All of them on random tensors in channels_last; `2x2`: through a pooling."""
    from racecar_kernels.gpu import pointwise as ours

    torch.manual_seed(0)
    n, c, h, w = shape

    def image(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    x, g, a, g_small, a_small = image(*shape).add_(0.5), image(*shape), image(*shape), *(
        image(n, c, h // 2, w // 2) for _ in range(2)
    )  # fmt: skip
    mean, k0, k1, k2, scale, shift, minus = torch.rand(7, c, device=device).add_(0.2).unbind()
    c2 = torch.full((), 0.3, device=device)
    refused = ours.why_not(x, g, a)
    if refused is not None:  # they would compute with plain PyTorch, and nobody would notice
        raise ValueError(f"the pointwise kernels: {refused}")
    d, relu, small = Lazy(x), Lazy(a, None, None, "relu"), Lazy(a_small, None, None, "relu")
    affine = Lazy(x, scale, shift, "relu")
    in_place = g.clone(memory_format=torch.preserve_format)

    def pair(name: str, images: float, *args: Any, suffix: str = "", **kwargs: Any) -> Kernel:
        both = (partial(f, *args, **kwargs) for f in (getattr(ours, name), getattr(ref, f"{name}_ref")))
        return Kernel(f"{name}{suffix}", *both, images)

    combined = (x, mean, 0.5 * k0, 0.1 * k1, 0.1 * k2)
    return [
        pair("channel_sum", 1, g),
        pair("batch_norm", 1, x, scale, shift, 1e-5),
        Kernel(
            "norm_input_grad_",
            lambda: ours.norm_input_grad_(in_place.copy_(g), *combined),
            lambda: ref.norm_input_grad_ref_(in_place.copy_(g), *combined),
            3,
            lambda: ours.norm_input_grad_(in_place, *combined),
        ),
        pair("materialise", 2, affine),
        pair("materialise", 1.25, relu, WINDOW, full=False, pooled=True, suffix=" 2x2"),
        pair("sum_of_squares", 2, d, relu),
        pair("compare", 3, d, relu, minus=minus),
        pair("compare", 1.5, d, small, WINDOW, minus=minus, suffix=" 2x2"),
        pair("grad_reverse", 4, d, relu, None, c2, g),
        pair("grad_reverse", 1.75, d, small, WINDOW, c2, g_small, suffix=" 2x2"),
        pair("grad_forward", 4, d, relu, None, c2, None, g),
        pair("grad_forward", 3.5, d, small, WINDOW, c2, g_small, g, suffix=" 2x2"),
    ]


def measure(
    dtype: str, device: str, *, rounds: int = 30, tiny: bool = False,
    finished: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """Ceilings and a row per kernel; one whose results are wrong has no time, and says how far off it is."""
    shape, kind = TINY if tiny else LARGE, getattr(torch, dtype)
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {"ceilings": ceilings(device, rounds, tiny=tiny), "shape": list(shape), "rows": rows}
    whole = kind.itemsize * torch.Size(shape).numel()
    for kernel in kernels(shape, kind, device):
        row: dict[str, Any] = {"kernel": kernel.name, "dtype": dtype, "bytes": int(kernel.images * whole)}
        try:
            rows.append({**row, **_timed(kernel, row["bytes"], found["ceilings"], ALLOWED[kind], device, rounds)})
        except Exception as error:  # one kernel's compilation or memory is not to cost the others
            rows.append({**row, "wrong": True, "why": f"{type(error).__name__}: {error}"})
        finished(found)
    return found


def _timed(
    kernel: Kernel, size: int, best: dict[str, float], allowed: float, device: str, rounds: int
) -> dict[str, Any]:
    right = [t.clone(memory_format=torch.preserve_format) for t in _tensors(kernel.right())]
    off = max((relative_error(got, want) for got, want in zip(_tensors(kernel.run()), right, strict=True)), default=0.0)
    del right
    if not off <= allowed:
        return {"wrong": True, "why": f"off from plain PyTorch by {off:.1e}, {allowed:.0e} is allowed"}
    us = medians({kernel.name: kernel.timed or kernel.run}, device, rounds)[kernel.name]
    rate = size / us / 1e3  # GB/s
    return {"off": off, "us": us, "gb_s": rate, "share": rate / best["copy_gb_s"]}


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    several: Iterable[Any] = found
    return [t for t in several if isinstance(t, Tensor)]
