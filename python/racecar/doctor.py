"""What `racecar doctor` finds out: versions, compiled modules, and for every backend whether what it computes is right.

The check of a backend is the reverse of a small layer, forward and backward, in float32; of the backend `cuda`, a layer
and a chain that its kernels serve. What it gives may be off from
float64 by at most twice what plain PyTorch is off on the same device, norm-wise, in the median over the seeds.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import racecar_kernels as rk
from racecar_kernels import cuda_toolkit, extension
from racecar_kernels.cuda import linear_chain
from racecar_kernels.gpu import measured
from racecar_kernels.layer import Layer, Tied

SEEDS = 25  # with seven, the median of right results still varies by a factor of up to 1.8
ALLOWED = 2.0  # times plain PyTorch's own error

Tensors = Sequence[Tensor]
Function = Callable[[Tensors], Tensors]


@dataclass
class Check:
    """One backend, or a part of it, on one device. Without `error` it was not run: `why_not` says why."""

    backend: str
    device: str
    why_not: str | None = None
    error: float | None = None  # norm-wise, relative to float64
    plain_error: float | None = None  # PyTorch's
    milliseconds: float | None = None  # forward and backward, median
    trouble: str | None = None

    @property
    def outcome(self) -> str:
        return "wrong" if self.trouble else "not here" if self.why_not else "right"


def versions() -> dict[str, str | None]:
    """Of all that takes part; None for what is not installed."""
    driver = cuda_toolkit.driver_version()
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    try:
        nvcc = cuda_toolkit.find()
        compiler = f"{'.'.join(map(str, nvcc.version))} ({nvcc.home})"
    except cuda_toolkit.NoCompilerError:
        compiler = None
    except cuda_toolkit.ToolkitError as error:
        compiler = str(error)
    return {
        "racecar-kernels": rk.__version__,
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "CUDA of PyTorch": torch.version.cuda,
        "Triton": _installed("triton"),
        "NVIDIA driver": None if driver is None else f"for CUDA {'.'.join(map(str, driver))} and older",
        "GPU": ", ".join(f"{own.name} (sm_{own.major}{own.minor})" for own in gpus) or None,
        "nvcc": compiler,
    }


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def modules() -> list[dict[str, Any]]:
    """The compiled modules: when each is used, else why not, and how it was built."""
    found = []
    for name in (extension.CPP, extension.CUDA):
        module, reason = extension.load(name, warn=False), extension.why_not(name, warn=False)
        facts = module.build_facts() if module else None
        found.append({"module": name, "why_not": reason, "use": None if reason else use(name), "facts": facts})
    return found


def use(name: str) -> str:
    """When a module that nothing speaks against is used: its kernels may not have been measured to be the fastest."""
    chosen = [
        *linear_chain.MEASURED,
        *(own for of in measured.FASTER.values() for own in of if own.startswith("cuda ")),
    ]
    return "in use" if name == extension.CPP or chosen else 'loaded; used where asked for (backend="cuda")'


def drawn(sizes: Sequence[Sequence[int]], seed: int) -> Tensors:
    """Normal random numbers in float32, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*size, generator=generator)) for size in sizes]


# y, target, weight, bias, and scale and shift of a batch norm: a 3×3 convolution behind a max pooling of 2.
LAYER = ((4, 8, 6, 6), (4, 5, 12, 12), (8, 5, 3, 3), (8,), (5,), (5,))


def layer_by_definition(tensors: Tensors) -> Tensors:
    """a = relu(norm(Wᵀ(y − b))), ½·Σ(target − up(a))², and the gradients of the latter plus ½·Σa²."""
    y, target, weight, bias, scale, shift = tensors
    u = F.conv_transpose2d(y - bias.view(-1, 1, 1), weight, padding=1)
    a = F.batch_norm(u, None, None, scale, shift, training=True).relu()
    back = a.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return _with_gradients(tensors, a, 0.5 * (target - back).square().sum())


def layer_by(backend: str, tensors: Tensors) -> Tensors:
    """The same by `reverse_layer`."""
    y, target, weight, bias, scale, shift = tensors
    norm = nn.BatchNorm2d(len(scale), device=y.device, dtype=y.dtype)
    norm.weight, norm.bias = nn.Parameter(scale), nn.Parameter(shift)
    given = [y, target, weight, bias, norm.weight, norm.bias]
    latent, pre = [norm, nn.ReLU()], [nn.MaxPool2d(2)]
    a, loss = rk.reverse_layer(y, target, weight, bias, padding=1, pre=pre, latent=latent, backend=backend)
    return _with_gradients(given, a, loss)


def _with_gradients(tensors: Tensors, a: Tensor, loss: Tensor) -> Tensors:
    total = loss + 0.5 * a.square().sum().to(loss.dtype)
    return [a.detach(), loss.detach(), *torch.autograd.grad(total, tensors)]


# y, target, weight and bias of a 3×3 convolution from three channels, in channels_last: the CUDA kernels serve it.
FEW = ((4, 8, 12, 12), (4, 3, 12, 12), (8, 3, 3, 3), (8,))


def few_by_definition(tensors: Tensors) -> Tensors:
    """a = relu(Wᵀ(y − b)), ½·Σ(target − a)², and the gradients of the latter plus ½·Σa²."""
    y, target, weight, bias = tensors
    a = F.conv_transpose2d(y - bias.view(-1, 1, 1), weight, padding=1).relu()
    return _with_gradients(tensors, a, 0.5 * (target - a).square().sum())


def few_by(backend: str, tensors: Tensors) -> Tensors:
    """The same by `reverse_layer`."""
    y, target, weight, bias = tensors
    y, target = (t.contiguous(memory_format=torch.channels_last) for t in (y, target))
    a, loss = rk.reverse_layer(y, target, weight, bias, padding=1, latent=[nn.ReLU()], backend=backend)
    return _with_gradients(tensors, a, loss)


# x, and the weights and biases of two linear layers with a tanh behind each.
CHAIN = ((16, 12), (8, 12), (8,), (4, 8), (4,))


def chain_by_definition(tensors: Tensors) -> Tensors:
    """The output, ½·Σ of both residuals squared in a full reverse, and the gradients of the latter plus ½·Σ output²."""
    x, first, first_bias, second, second_bias = tensors
    hidden = F.linear(x, first, first_bias).tanh()
    out = F.linear(hidden, second, second_bias).tanh()
    back = F.linear(out - second_bias, second.t()).tanh()
    losses = (hidden - back).square().sum() + (x - F.linear(back - first_bias, first.t())).square().sum()
    return _with_gradients(tensors, out, 0.5 * losses)


def chain_by(backend: str, tensors: Tensors) -> Tensors:
    """The same by `tied_chain`."""
    x, first, first_bias, second, second_bias = tensors
    tanh = rk.Activation("tanh")
    layers = [rk.Layer(Tied()), rk.Layer(Tied(), latent=(tanh,))]
    weights, biases = [first, second], [first_bias, second_bias]
    out, losses = rk.tied_chain(x, layers, weights, biases, last=[tanh], backend=backend)
    return _with_gradients(tensors, out, 0.5 * losses.sum())


# A weight, and the gradient of what it is when it is folded by 2.
FOLD = ((6, 5, 3, 3), (6, 5, 4, 4))


def fold_by_definition(tensors: Tensors) -> Tensors:
    """W_f[t] = Σ_{i < 2} W[t − i] in both directions, and its adjoint."""
    weight, grad = tensors
    folded = torch.stack([F.pad(weight, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)]).sum(0)
    return [folded.detach(), *torch.autograd.grad(folded, weight, grad.detach())]


def fold_by_cuda(tensors: Tensors) -> Tensors:
    """The same by the compiled module."""
    module = extension.load(extension.CUDA, warn=False)
    if module is None:
        raise RuntimeError(str(extension.why_not(extension.CUDA, warn=False)))
    weight, grad = (t.detach() for t in tensors)
    return [module.fold(weight, (2, 2)), module.fold_adjoint(grad, (2, 2), weight.dtype)]


def error_of(got: Tensors, exact: Tensors) -> float:
    """Root mean square over the tensors of |got − exact| / |exact|: a small gradient counts like a large one."""
    squares = [float((g.cpu().double() - e).square().sum() / e.square().sum()) for g, e in zip(got, exact, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


class Problem(NamedTuple):
    """What a backend is asked, and the same in plain PyTorch."""

    sizes: Sequence[Sequence[int]]
    by: Callable[[str, Tensors], Tensors]
    definition: Function


PROBLEMS = {"": Problem(LAYER, layer_by, layer_by_definition)}
OF_CUDA = {  # what its own kernels serve: all else is Triton's there
    ": few channels": Problem(FEW, few_by, few_by_definition),
    ": narrow chain": Problem(CHAIN, chain_by, chain_by_definition),
}


def checks() -> Iterator[Check]:
    """Every backend, on request or not, on every kind of device that is here and that it serves; and folding alone."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name in rk.backends(on_request=True):
        reasons = {kind: rk.why_not(name, rk.Query(Layer(Tied()), kind, torch.float32)) for kind in devices}
        served = [kind for kind in devices if reasons[kind] is None]
        if not served:
            yield Check(name, devices[-1], why_not=reasons[devices[-1]])
        for kind in served:
            for what, problem in (OF_CUDA if name == "cuda" else PROBLEMS).items():
                check = Check(f"{name}{what}", kind)
                yield judged(check, problem.sizes, partial(problem.by, name), problem.definition)
    reason = extension.why_not(extension.CUDA, warn=False)
    folding = Check(f"{extension.CUDA}: folding", devices[-1], why_not=reason)
    yield folding if reason else judged(folding, FOLD, fold_by_cuda, fold_by_definition)


def judged(check: Check, sizes: Sequence[Sequence[int]], ours: Function, plain: Function) -> Check:
    """`check` with what came out; whatever a kernel, a driver or a compiler raises is its trouble."""
    try:
        _measure(check, sizes, ours, plain)
    except Exception as error:
        check.trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return check
    if check.error is not None and check.plain_error is not None and check.error > ALLOWED * check.plain_error:
        check.trouble = (
            f"it is off from float64 by {check.error:.1e}, plain PyTorch by {check.plain_error:.1e}; "
            f"{ALLOWED:g} times that is allowed"
        )
    return check


def _measure(check: Check, sizes: Sequence[Sequence[int]], ours: Function, plain: Function) -> None:
    errors, plain_errors, times = [], [], []
    for seed in range(SEEDS):
        here = [nn.Parameter(t.detach().to(check.device)) for t in drawn(sizes, seed)]
        exact = plain([nn.Parameter(t.detach().cpu().double()) for t in here])
        if seed == 0:
            ours(here)  # compiles what is compiled at first use
        _wait_for(check.device)
        start = time.perf_counter()
        got = ours(here)
        _wait_for(check.device)
        times.append(1000 * (time.perf_counter() - start))
        if not all(t.isfinite().all() for t in got):
            raise ArithmeticError("not all of its results are finite numbers")
        errors.append(error_of(got, exact))
        plain_errors.append(error_of(plain(here), exact))
    check.error, check.plain_error = statistics.median(errors), statistics.median(plain_errors)
    check.milliseconds = statistics.median(times)


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def examine() -> dict[str, Any]:
    """All of it, ready for JSON. `wrong` names what gives wrong results."""
    with warnings.catch_warnings():  # that a module is refused stands in what is printed
        warnings.filterwarnings("ignore", "racecar_kernels: the compiled", RuntimeWarning)
        found = list(checks())
    return {
        "versions": versions(),
        "modules": modules(),
        "checks": [{**asdict(check), "outcome": check.outcome} for check in found],
        "wrong": [check.backend for check in found if check.trouble],
    }


COLOURS = {"right": "green", "wrong": "bold red", "not here": "yellow"}


def show(found: dict[str, Any], console: Console) -> None:
    """What `examine` found, as tables."""
    for name, value in found["versions"].items():
        console.print(f"{name:<16} {escape(value or 'none')}", highlight=False, soft_wrap=True)
    for module in found["modules"]:
        state = module["why_not"] or module["use"]
        console.print(f"\nracecar_kernels.{module['module']}: {escape(state)}", highlight=False, soft_wrap=True)
        for name, value in (module["facts"] or {}).items():
            text = (", " if name == "codes" else ".").join(map(str, value)) if isinstance(value, tuple) else str(value)
            console.print(f"  {name:<14} {escape(text)}", highlight=False, soft_wrap=True)
    table = Table(title="\nforward and backward of a small layer, float32", title_justify="left")
    for column in ("backend", "device", "outcome", "error", "plain PyTorch's", "ms"):
        table.add_column(column, justify="right" if column in ("error", "plain PyTorch's", "ms") else "left")
    for check in found["checks"]:
        figures = [f"{check[key]:.1e}" if check[key] is not None else "" for key in ("error", "plain_error")]
        time_ms = "" if check["milliseconds"] is None else f"{check['milliseconds']:.2f}"
        outcome = f"[{COLOURS[check['outcome']]}]{check['outcome']}[/]"
        table.add_row(escape(check["backend"]), check["device"], outcome, *figures, time_ms)
    console.print(table)
    for check in found["checks"]:
        if remark := check["trouble"] or check["why_not"]:
            console.print(f"{escape(check['backend'])}: {escape(remark)}", highlight=False, soft_wrap=True)
