"""`python -m bench.layers --out layers.json`: full fusion against library convolution and pointwise kernel, per layer.

For every distinct reverse layer of the networks, its three passes, each checked and then timed in both forms:

    forward    u = Wᵀ s; its activation, the residual's squares and the next source
    source     g_u through residual and activation, then the gradients of s and of the bias
    weight     ∂/∂W; the library is given the g_u that its source pass has made, the fused kernel makes it itself
               (`fused_given_us`: it is given g_u, too)

With a norm or an up-sampling in between (`"epilogue": "none"`) u, or its gradient, is all there is beside the product.
`bytes` and `flops` are the least that a pass needs: every operand read once, every result written once; rates of both
forms are taken from them. Without a GPU (--dry-run) tiny shapes run in Triton's interpreter, and no figure means
anything; their rows have the architecture "interpreter".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.device_time import ceilings, medians, relative_error
from bench.layer_shapes import Shape, shapes_in
from racecar.bench import machine
from racecar.bench.networks import NETWORKS
from racecar_kernels import few_channels
from racecar_kernels.lazy import Lazy
from racecar_kernels.weight_gradient import Pair

Row = dict[str, Any]
Results = dict[str, Tensor]
Form = Callable[[], Results]

CHAINS = ("mnist", "cifar", "vgg19", "smoke")
DTYPES = ("bfloat16", "float32")
# Norm-wise, how far two right results may be apart: twice what the tests allow each of them against float64.
ALLOWED = {"half": 1.6e-2, "tf32": 4e-3, "ieee": 2e-5}


class Operands:
    """Random tensors of one layer, in channels_last."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        image = partial(self._image, dtype=dtype, device=device)
        self.shape, self.tied = shape, shape.tied
        self.like_u = (shape.batch, shape.c_in, *shape.size)
        fan_out = shape.c_out * prod(shape.kernel) / shape.groups
        self.weight = image(shape.c_out, shape.c_in // shape.groups, *shape.kernel) * fan_out**-0.5
        self.s = image(shape.batch, shape.c_out, *shape.source_size)
        self.d = image(shape.batch, shape.c_in, *shape.received_size)
        self.g = image(*self.like_u)
        self.minus = torch.randn(shape.c_in, device=device, dtype=dtype)
        self.c2 = torch.full((), 0.3, device=device)
        self.fused_epilogue = shape.epilogue != "none"
        self.act = shape.epilogue if self.fused_epilogue else "identity"
        a = image(*self.like_u)
        self.a = Lazy(a.relu_() if self.act == "relu" else a, None, None, self.act, done=True)

    @staticmethod
    def _image(*size: int, dtype: torch.dtype, device: str) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)


def forms(o: Operands) -> dict[str, dict[str, Form]]:
    """Pass -> form -> what computes it; see the top of this file."""
    from racecar_kernels.gpu import transposed as fused
    from racecar_kernels.gpu.pointwise import KERNELS

    factor, window = o.shape.factor, o.shape.window
    given = tuple(o.s.shape)

    def library_forward() -> Results:
        u = few_channels.forward(KERNELS, o.s, o.weight, o.tied, o.like_u, factor)
        if not o.fused_epilogue:
            return {"u": u}
        lazy, d = Lazy(u, None, None, o.act), Lazy(o.d)
        if o.act == "identity":  # the first layer has no source below it
            return {"u": u, "loss": KERNELS.sum_of_squares(d, lazy, window)}
        loss, source = KERNELS.compare(d, lazy, window, minus=o.minus)
        return {"u": u, "loss": loss, "source": source}

    def fused_forward() -> Results:
        if not o.fused_epilogue:
            return _made(u=fused.forward(Lazy(o.s), o.weight, o.tied, o.like_u, factor=factor, keep="u").kept)
        below = o.act != "identity"
        found = fused.forward(
            Lazy(o.s), o.weight, o.tied, o.like_u, factor=factor, act=o.act, keep="u", d=Lazy(o.d), window=window,
            source=below, minus=o.minus if below else None,
        )  # fmt: skip
        return _made(u=found.kept, loss=found.loss, source=found.source)

    def gradient_of_u() -> Tensor:
        if not o.fused_epilogue:
            return o.g
        g: Tensor = KERNELS.grad_reverse(Lazy(o.d), o.a, window, o.c2, o.g).g
        return g

    def library_source() -> Results:
        g_s = few_channels.source_gradient(KERNELS, gradient_of_u(), o.weight, o.tied, factor)
        return {"s": g_s, "bias": KERNELS.channel_sum(g_s).neg_()}

    def incoming() -> fused.Incoming:
        """g_u as the fused kernels read it; through a pooling it is the pointwise kernel's."""
        if not o.fused_epilogue or window is not None:
            return fused.Incoming(gradient_of_u())
        return fused.Incoming(o.g, o.a, Lazy(o.d), o.c2)

    def fused_source() -> Results:
        s, bias = fused.source_gradient(incoming(), o.weight, o.tied, given, factor=factor, bias=True)
        return _made(s=s, bias=bias)

    g_u = gradient_of_u()
    unmade = fused.Incoming(g_u) if window is not None else incoming()  # its source pass has made g_u, too

    def library_weight() -> Results:
        return {"weight": few_channels.weight_gradient(KERNELS, Pair(g_u, o.s), o.weight, o.tied, factor)}

    def fused_weight(own: fused.Incoming) -> Results:
        found = fused.weight_gradient(o.weight, o.tied, reverse=(own, Lazy(o.s), None), factor=factor)
        return {"weight": found}

    return {
        "forward": {"library": library_forward, "fused": fused_forward},
        "source": {"library": library_source, "fused": fused_source},
        "weight": {
            "library": library_weight,
            "fused": partial(fused_weight, unmade),
            "fused_given": partial(fused_weight, fused.Incoming(g_u)),
        },
    }


def _made(**tensors: Tensor | None) -> Results:
    return {name: t for name, t in tensors.items() if t is not None}


def least_bytes(o: Operands, which: str) -> int:
    """Of a pass in one kernel: what it has to read and to write."""
    images = {
        "forward": [o.s, o.g, *([o.d] if o.fused_epilogue else []), *([o.g] if o.act == "relu" else [])],
        "source": [o.g, o.s, *([o.a.x, o.d] if o.fused_epilogue else [])],
        "weight": [o.g, o.s, o.weight, *([o.a.x, o.d] if o.fused_epilogue and o.shape.window is None else [])],
    }[which]
    return sum(t.nbytes for t in (*images, o.weight)) - (o.weight.nbytes if which == "weight" else 0)


def measured(shape: Shape, dtype: str, device: str, rounds: int) -> Iterator[Row]:
    """A row per pass; `why` says why a form has no figure."""
    from racecar_kernels.gpu import device as of_device
    from racecar_kernels.gpu import transposed as fused
    from racecar_kernels.gpu.transposed_operands import kind_of

    o = Operands(shape, getattr(torch, dtype), device)
    kind = kind_of(o.weight)
    own = {
        "architecture": of_device.of(o.s).architecture if device == "cuda" else "interpreter",
        "dtype": dtype,
        "multiplied": kind,
    }
    refused = fused.why_not(
        o.s, o.weight, o.tied, o.like_u, factor=shape.factor, d=o.d if o.fused_epilogue else None, window=shape.window
    )
    for name, runs in forms(o).items():
        row: Row = {**own, "pass": name, **shape.key, "library_us": None, "fused_us": None}
        row |= {"bytes": least_bytes(o, name), "flops": shape.flops}
        yield timed(row, {"library": runs["library"]} if refused else runs, refused, ALLOWED[kind], device, rounds)


def timed(row: Row, runs: dict[str, Form], refused: str | None, allowed: float, device: str, rounds: int) -> Row:
    """The row with times, once every form's results agree with the library's."""
    right = runs["library"]()
    errors = {
        f"{form} {name}": relative_error(got, right[name])
        for form, run in runs.items()
        if form != "library"
        for name, got in run().items()
    }
    wrong = {name: off for name, off in errors.items() if not off <= allowed}
    del right
    if wrong:
        listed = ", ".join(f"{name} by {off:.1e}" for name, off in wrong.items())
        return {**row, "wrong": True, "why": f"off from the library's results: {listed}; {allowed:.0e} is allowed"}
    row |= {f"{form}_us": us for form, us in medians(runs, device, rounds).items()}
    row |= {"off": max(errors.values(), default=None)}
    return {**row, "why": refused} if refused else row


def measure(
    networks: Sequence[str], dtype: str, device: str, *, rounds: int = 20, tiny: bool = False,
    finished: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """Ceilings and the rows of these networks; `finished` is told after every layer what there is by then.

    Whatever goes wrong with one layer is said in its row, and the others are measured.
    """
    rows: list[Row] = []
    found: dict[str, Any] = {"ceilings": ceilings(device, rounds, tiny=tiny), "rows": rows}
    layers: dict[Shape, list[str]] = {}
    for name in networks:
        network = NETWORKS[name]
        for shape, numbers in shapes_in(network, 1 if tiny else network.gpu_batch, tiny=tiny).items():
            layers.setdefault(shape, []).extend(f"{name} {m}" for m in numbers)
    for shape, names in layers.items():
        try:
            rows += [{**row, "layers": names} for row in measured(shape, dtype, device, rounds)]
        except Exception as error:  # one layer's compilation or memory is not to cost the others
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            rows.append({"dtype": dtype, **shape.key, "layers": names, "wrong": True, "why": why})
        finished(found)
    return found


def interpret(command: list[str]) -> None:
    """Triton's kernels on CPU tensors. Begins anew with `command` where Triton was imported without its interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *command], {**os.environ, "TRITON_INTERPRET": "1"})
    from racecar_kernels.gpu import device

    device.INTERPRETED = True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.layers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--network", action="append", choices=CHAINS, help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="float32 is multiplied as TF32")
    parser.add_argument("--rounds", type=int, default=20, help="times of each, of which the median counts")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; figures mean nothing")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} sees no CUDA device; --dry-run tries the same code", file=sys.stderr)
        return 2
    if options.dry_run:
        interpret(["-m", "bench.layers", *(sys.argv[1:] if arguments is None else arguments)])
    else:
        machine.prepare_cuda()
    device = "cpu" if options.dry_run else "cuda"
    found = measure(
        options.network or CHAINS, options.dtype, device, rounds=options.rounds, tiny=options.dry_run,
        finished=lambda so_far: _write(options.out, so_far, options.dry_run),
    )  # fmt: skip
    _write(options.out, found, options.dry_run)
    for row in found["rows"]:
        print(f"{row['layers'][0]:<10}{row.get('pass', ''):<9}{row.get('library_us')} {row.get('fused_us')}"
              f"  {row.get('why') or ''}")  # fmt: skip
    return 1 if any(row.get("wrong") for row in found["rows"]) else 0


def _write(path: Path, found: dict[str, Any], dry_run: bool) -> None:
    path.write_text(json.dumps({"dry_run": dry_run, **found}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
