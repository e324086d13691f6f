"""`python -m bench.layers --out layers.json`: full fusion against library convolution and pointwise kernel, per layer.

For every distinct reverse layer of the networks, its three passes, each checked and then timed in every form: the
library's, Triton's fused one, and CUDA's where a side has 1 to 4 channels:

    forward    u = Wᵀ s; its activation, the residual's squares and the next source
    source     g_u through residual and activation, then the gradients of s and of the bias
    weight     ∂/∂W; the library is given the g_u that its source pass has made, the other forms make it themselves
               (`fused_given_us`, `cuda_given_us`: they are given g_u, too)
    fold       of few channels behind an up-sampling: the folded weight and its adjoint, which the CUDA form's other
               passes contain; whether its own kernels or PyTorch's pooling do that better

With a norm or an up-sampling in between (`"epilogue": "none"`) u, or its gradient, is all there is beside the product.
`bytes` and `flops` are the least that a pass needs: every operand read once, every result written once; rates of all
forms are taken from them. Without a GPU (--dry-run) tiny shapes run in Triton's interpreter, and no figure means
anything; their rows have the architecture "interpreter".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
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
from racecar_kernels.cuda.few_operands import MOST as MOST_FEW
from racecar_kernels.fused import Incoming
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

    def gradient_of_u(self) -> Tensor:
        """By the pointwise kernel."""
        from racecar_kernels.gpu.pointwise import KERNELS

        if not self.fused_epilogue:
            return self.g
        g: Tensor = KERNELS.grad_reverse(Lazy(self.d), self.a, self.shape.window, self.c2, self.g).g
        return g

    @cached_property
    def g_u(self) -> Tensor:
        """The same, kept."""
        return self.gradient_of_u()

    @staticmethod
    def _image(*size: int, dtype: torch.dtype, device: str) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)


Passes = dict[str, Form]


def forms(o: Operands, kernels: Mapping[str, Any]) -> dict[str, Passes]:
    """Pass -> form -> what computes it; see the top of this file. kernels: the launchers of every form but library."""
    found = {name: {"library": run} for name, run in _library(o).items()}
    for form, launchers in kernels.items():
        for name, run in _in_one_kernel(o, launchers).items():
            which, *given = name.split(" ")
            found[which]["_".join([form, *given])] = run
    return found


def _library(o: Operands) -> Passes:
    from racecar_kernels.gpu.pointwise import KERNELS

    factor, window = o.shape.factor, o.shape.window

    def forward() -> Results:
        u = few_channels.forward(KERNELS, o.s, o.weight, o.tied, o.like_u, factor)
        if not o.fused_epilogue:
            return {"u": u}
        lazy, d = Lazy(u, None, None, o.act), Lazy(o.d)
        if o.act == "identity":  # the first layer has no source below it
            return {"u": u, "loss": KERNELS.sum_of_squares(d, lazy, window)}
        loss, source = KERNELS.compare(d, lazy, window, minus=o.minus)
        return {"u": u, "loss": loss, "source": source}

    def source() -> Results:
        g_s = few_channels.source_gradient(KERNELS, o.gradient_of_u(), o.weight, o.tied, factor)
        return {"s": g_s, "bias": KERNELS.channel_sum(g_s).neg_()}

    g_u = o.g_u

    def weight() -> Results:
        return {"weight": few_channels.weight_gradient(KERNELS, Pair(g_u, o.s), o.weight, o.tied, factor)}

    return {"forward": forward, "source": source, "weight": weight}


def _in_one_kernel(o: Operands, launchers: Any) -> Passes:
    """By Triton's launchers or by CUDA's, which have one interface; `weight given`: the weight's gradient from g_u."""
    factor, window = o.shape.factor, o.shape.window
    given = tuple(o.s.shape)

    def forward() -> Results:
        if not o.fused_epilogue:
            return _made(u=launchers.forward(Lazy(o.s), o.weight, o.tied, o.like_u, factor=factor, keep="u").kept)
        below = o.act != "identity"
        found = launchers.forward(
            Lazy(o.s), o.weight, o.tied, o.like_u, factor=factor, act=o.act, keep="u", d=Lazy(o.d), window=window,
            source=below, minus=o.minus if below else None,
        )  # fmt: skip
        return _made(u=found.kept, loss=found.loss, source=found.source)

    def incoming() -> Incoming:
        """g_u as the kernels read it; through a pooling it is the pointwise kernel's."""
        if not o.fused_epilogue or window is not None:
            return Incoming(o.gradient_of_u())
        return Incoming(o.g, o.a, Lazy(o.d), o.c2)

    def source() -> Results:
        s, bias = launchers.source_gradient(incoming(), o.weight, o.tied, given, factor=factor, bias=True)
        return _made(s=s, bias=bias)

    g_u = Incoming(o.g_u)
    unmade = g_u if window is not None else incoming()  # its source pass has made g_u, too

    def weight(own: Incoming) -> Results:
        found = launchers.weight_gradient(o.weight, o.tied, reverse=(own, Lazy(o.s), None), factor=factor)
        return {"weight": found}

    return {
        "forward": forward,
        "source": source,
        "weight": partial(weight, unmade),
        "weight given": partial(weight, g_u),
    }


def _folding(o: Operands, factor: tuple[int, int]) -> tuple[Passes, int]:
    """PyTorch's and CUDA's, and the bytes that both results need."""
    from racecar_kernels.cuda import few_operands
    from racecar_kernels.transposed import fold, fold_adjoint

    kernels, grad = few_operands.folding(o.weight), fold(o.weight.float(), factor)

    def library() -> Results:
        return {"folded": fold(o.weight, factor), "unfolded": fold_adjoint(grad, factor)}

    def cuda() -> Results:
        unfolded = kernels.fold_adjoint(grad, factor, grad.dtype)
        return {"folded": kernels.fold(o.weight, factor), "unfolded": unfolded}

    least = sum(t.nbytes for t in (o.weight, grad, *library().values()))
    return {"library": library, **({} if kernels is None else {"cuda": cuda})}, least


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


def rows_of(shape: Shape, dtype: str, device: str, rounds: int) -> Iterator[Row]:
    """A row per pass, and one for folding.

    `why` says why the fused form has no figure, `cuda_why` why CUDA's has none for few channels.
    """
    from racecar_kernels.cuda import few_channels as cuda
    from racecar_kernels.gpu import device as of_device
    from racecar_kernels.gpu import transposed
    from racecar_kernels.gpu.chooser import FOLD
    from racecar_kernels.gpu.transposed_operands import kind_of

    o = Operands(shape, getattr(torch, dtype), device)
    kind = kind_of(o.weight)
    own = {
        "architecture": of_device.of(o.s).architecture if device == "cuda" else "interpreter",
        "dtype": dtype,
        "multiplied": kind,
    }
    launchers = {"fused": transposed, **({"cuda": cuda} if min(shape.c_in, shape.c_out) <= MOST_FEW else {})}
    refused = {form: _why_not(o, own) for form, own in launchers.items()}
    kernels = {form: own for form, own in launchers.items() if refused[form] is None}
    for name, runs in forms(o, kernels).items():
        row: Row = {**own, "pass": name, **shape.key, "library_us": None, "fused_us": None, "cuda_us": None}
        row |= {"bytes": least_bytes(o, name), "flops": shape.flops}
        row |= {"cuda_why": refused["cuda"]} if refused.get("cuda") else {}
        yield timed(row, runs, refused["fused"], ALLOWED[kind], device, rounds)
    if "cuda" in kernels and shape.factor is not None:
        runs, least = _folding(o, shape.factor)
        row = {**own, "pass": FOLD, **shape.key, "library_us": None, "fused_us": None, "cuda_us": None}
        yield timed({**row, "bytes": least, "flops": 0}, runs, None, ALLOWED[kind], device, rounds)


def _why_not(o: Operands, launchers: Any) -> str | None:
    d = o.d if o.fused_epilogue else None
    why: str | None = launchers.why_not(
        o.s, o.weight, o.tied, o.like_u, factor=o.shape.factor, d=d, window=o.shape.window
    )
    return why


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
            rows += [{**row, "layers": names} for row in rows_of(shape, dtype, device, rounds)]
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
        times = " ".join(str(row.get(f"{form}_us")) for form in ("library", "fused", "cuda"))
        print(f"{row['layers'][0]:<10}{row.get('pass', ''):<9}{times}  {row.get('why') or ''}")
    return 1 if any(row.get("wrong") for row in found["rows"]) else 0


def _write(path: Path, found: dict[str, Any], dry_run: bool) -> None:
    path.write_text(json.dumps({"dry_run": dry_run, **found}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
