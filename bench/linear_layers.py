"""Linear layers in rows like those of `bench/layers.py`: matrix products and pointwise kernels, or fused.

    output     y = φ(p Wᵀ + b), what a full chain runs forwards
    tied       the same, its reverse a = φ((y - b) W), and the residual's squares
    forward    the reverse alone, from a y that is there, and the squares: what a reverse layer by itself runs
    source     g_u through residual and activation, then the gradients of y and of the bias
    weight     ∂/∂W of the reverse; the products are given the g_u that their source pass has made
    both       ∂/∂W of the reverse and of the forward, from the gradient of p Wᵀ + b
    input      the gradient of p, from that gradient and from the residual

`kernel` and `stride` are empty, `pixels` is the number of rows. `gpu/chooser.py` makes its table of these rows, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.device_time import ceilings
from bench.layers import ALLOWED, Form, Row, timed
from racecar.bench.networks import NETWORKS
from racecar_kernels.lazy import Lazy

MLP_ROWS = NETWORKS["mlp"].gpu_batch
# rows, input and output features: the MLP's first and last layer, then one whose outputs fit a tile, and wide ones
SIZES = [(MLP_ROWS, 12, 10), (MLP_ROWS, 3, 2), (16384, 784, 128), (16384, 1024, 1024), (4096, 4096, 1024)]
TINY = [(6, 12, 10), (5, 20, 18)]
ACT = ("tanh", ())


def forms(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> dict[str, dict[str, Form]]:
    """Pass -> form -> what computes it."""
    from racecar_kernels.gpu import linear as fused
    from racecar_kernels.gpu.pointwise import KERNELS

    torch.manual_seed(0)
    tf32 = dtype == torch.float32 and device == "cuda"
    p, g = (torch.randn(rows, inputs, device=device, dtype=dtype) for _ in range(2))
    g_c = torch.randn(rows, outputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype) * inputs**-0.5
    bias, c2 = torch.randn(outputs, device=device, dtype=dtype), torch.full((), 0.3, device=device)
    y, a, _ = fused.tied(p, weight, bias, ACT, ACT, tf32=tf32)
    lazy_a = Lazy(a, None, None, *ACT, done=True)
    reversed_ = fused.Reversed(y, a, p, weight, bias, ACT, g, c2)

    def less_bias(t: Tensor) -> Tensor:
        found: Tensor = KERNELS.materialise(Lazy(t), minus=bias)[0]
        return found

    def reverse(source: Tensor) -> dict[str, Tensor]:
        back = KERNELS.materialise(Lazy(less_bias(source) @ weight, None, None, *ACT), in_place=True)[0]
        return {"a": back, "loss": KERNELS.sum_of_squares(Lazy(p), Lazy(back))}

    def output() -> dict[str, Tensor]:
        return {"y": KERNELS.materialise(Lazy(F.linear(p, weight, bias), None, None, *ACT), in_place=True)[0]}

    def products() -> dict[str, Tensor]:
        own = output()
        return {**own, **reverse(own["y"])}

    def fused_reverse() -> dict[str, Tensor]:
        return dict(zip(("a", "loss"), fused.reverse(y, weight, bias, ACT, p, tf32=tf32), strict=True))  # type: ignore[arg-type]

    def gradient_of_u() -> Tensor:
        found: Tensor = KERNELS.grad_reverse(Lazy(p), lazy_a, None, c2, g).g
        return found

    def source() -> dict[str, Tensor]:
        g_s = F.linear(gradient_of_u(), weight)
        return {"y": g_s, "bias": KERNELS.channel_sum(g_s).neg_()}

    def fused_source() -> dict[str, Tensor]:
        return dict(zip(("y", "bias"), fused.grad_source(reversed_, tf32=tf32), strict=True))  # type: ignore[arg-type]

    def of_input() -> dict[str, Tensor]:
        return {"p": KERNELS.grad_forward(Lazy(p), lazy_a, None, c2, None, g_c @ weight, in_place=True).g}

    g_u, s = gradient_of_u(), less_bias(y)
    return {
        "output": {"library": output, "fused": lambda: {"y": fused.linear(p, weight, bias, ACT, tf32=tf32)}},
        "tied": {
            "library": products,
            "fused": lambda: fused.tied(p, weight, bias, ACT, ACT, tf32=tf32)._asdict(),
        },
        "forward": {"library": lambda: reverse(y), "fused": fused_reverse},
        "source": {"library": source, "fused": fused_source},
        "weight": {
            "library": lambda: {"weight": s.t() @ g_u},
            "fused": lambda: {"weight": fused.grad_weight(reversed_, tf32=tf32)},
        },
        "both": {
            "library": lambda: {"weight": (s.t() @ g_u).addmm_(g_c.t(), p)},
            "fused": lambda: {"weight": fused.grad_weight(reversed_, g_c, tf32=tf32)},
        },
        "input": {"library": of_input, "fused": lambda: {"p": fused.grad_input(g_c, reversed_, tf32=tf32)}},
    }


def rows_of(rows: int, inputs: int, outputs: int, dtype: str, device: str, rounds: int) -> Iterator[Row]:
    """A row per pass."""
    from racecar_kernels.gpu import device as of_device

    kind = "half" if dtype != "float32" else "tf32" if device == "cuda" else "ieee"
    known = {"architecture": "interpreter", "dtype": dtype, "multiplied": kind, "kernel": [], "stride": [],
             "factor": None, "c_in": inputs, "c_out": outputs, "groups": 1, "pixels": rows, "size": [rows]}  # fmt: skip
    if device == "cuda":
        known["architecture"] = of_device.of(torch.empty(0, device=device)).architecture
    images = {
        "output": (1, 1),
        "tied": (2, 1),
        "forward": (2, 1),
        "source": (3, 1),
        "weight": (3, 1),
        "both": (3, 2),
        "input": (3, 1),
    }  # of rows x inputs, and of rows x outputs
    for name, runs in forms(rows, inputs, outputs, getattr(torch, dtype), device).items():
        wide, narrow = images[name]
        numbers = rows * (wide * inputs + narrow * outputs) + inputs * outputs
        least = {"bytes": numbers * getattr(torch, dtype).itemsize}
        least["flops"] = 2 * rows * inputs * outputs * (2 if name in ("tied", "both") else 1)
        row: Row = {**known, "pass": name, "library_us": None, "fused_us": None, **least}
        yield timed(row, runs, None, ALLOWED[kind], device, rounds)


def measure(
    dtype: str, device: str, *, rounds: int = 20, tiny: bool = False,
    finished: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """Ceilings and the rows of all sizes, as `layers.measure` gives them."""
    rows: list[Row] = []
    found: dict[str, Any] = {"ceilings": ceilings(device, rounds, tiny=tiny), "rows": rows}
    for size in TINY if tiny else SIZES:
        layers = [f"linear {size[0]} rows"]
        try:
            rows += [{**row, "layers": layers} for row in rows_of(*size, dtype, device, rounds)]
        except Exception as error:  # one layer's compilation or memory is not to cost the others
            known = {"dtype": dtype, "c_in": size[1], "c_out": size[2], "size": [size[0]], "factor": None}
            rows.append({**known, "layers": layers, "wrong": True, "why": f"{type(error).__name__}: {error}"})
        finished(found)
    return found
