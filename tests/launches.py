"""What the Triton launchers hand to their kernels: recorded instead of run, or run on memory that lies far apart."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from racecar_kernels.gpu import linear_kernels, norm_kernels, pointwise_kernels, sums, transposed_kernels
from racecar_kernels.gpu.shipped import Shipped

MODULES = (pointwise_kernels, norm_kernels, transposed_kernels, linear_kernels, sums)
OPTIONS = {"num_warps": 4, "num_stages": 3}  # Triton's own, where a launcher names none
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # of a grid, by CUDA
USES = ("FORWARD", "REVERSE")  # of a weight, by what its gradient is compiled for
FAR = 2**31 + 64


class Launch(NamedTuple):
    """One call of a kernel: its function, the grid, every argument by name, and the compiler's options."""

    function: Any
    grid: tuple[int, ...]
    given: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.function.__name__

    def of_kind(self, *, constant: bool) -> dict[str, Any]:
        """The arguments that are compiled in, or those that are handed over."""
        kinds = self.function.__annotations__
        return {n: v for n, v in self.given.items() if (kinds.get(n) == "tl.constexpr") == constant}

    @property
    def blocks(self) -> dict[str, int]:
        return blocks_of(self.given)


def blocks_of(given: dict[str, Any]) -> dict[str, int]:
    return {n: v for n, v in given.items() if n.startswith("BLOCK_")}


class Replaced:
    """Stands where a kernel stood: `take(launch)` is called. An argument left out, or unknown, is a TypeError."""

    def __init__(self, kernel: Any, take: Any):
        self.function, self.kernel, self.take = kernel.fn, kernel, take

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **known: Any) -> None:
            options = {n: known.pop(n) for n in OPTIONS if n in known}
            bound = inspect.signature(self.function).bind(*args, **known)
            self.take(Launch(self.function, tuple(grid), dict(bound.arguments), {**OPTIONS, **options}))

        return call


def replace_kernels(monkeypatch: Any, take: Any) -> None:
    """`take(launch, kernel)` gets every launch of every family."""
    for module in MODULES:
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):

                def handed(launch: Launch, kernel: Any = kernel) -> None:
                    take(launch, kernel)

                monkeypatch.setattr(module, name, Replaced(kernel, handed))


# ------------------------------------------------------------------------------------------- against what is shipped


class Table:
    """What is compiled ahead of time for an architecture, by kernel."""

    def __init__(self, entries: Iterable[Shipped]):
        self.entries: dict[str, list[Shipped]] = defaultdict(list)
        for entry in entries:
            self.entries[entry.kernel.fn.__name__].append(entry)

    def check(self, launch: Launch) -> None:
        """Raises AssertionError with the launch where it is not what was compiled, or nothing that can be launched."""
        own = self.entries[launch.name]
        for size, most in zip(launch.grid, MOST_PROGRAMS, strict=False):
            assert 0 < size <= most, f"{launch.name}: a grid of {launch.grid}"
        for name, value in launch.of_kind(constant=True).items():
            hash(value)
            types = {type(entry.constants[name]) for entry in own if name in entry.constants}
            assert type(value) in types, f"{launch.name}: {name} = {value!r}, compiled with {types}"
        for name, value in launch.of_kind(constant=False).items():
            types = {entry.signature.get(name, "constexpr") for entry in own}
            assert fits(value, types), f"{launch.name}: {name} is {described(value)}, compiled with {types}"
        assert any(covers(entry, launch) for entry in own), f"{launch.name}: {launch.blocks} {launch.options}"


def described(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else repr(value)


def fits(value: Any, types: set[str]) -> bool:
    """Whether an argument is what it was compiled as: None anywhere, a tensor of a type that it can have, a number."""
    if value is None:
        return any(t.startswith("*") or t == "constexpr" for t in types)
    if isinstance(value, Tensor):
        pointers = {t for t in types if t.startswith("*")}
        return bool(pointers) and (value.dtype == torch.float32 or pointers != {"*fp32"})
    if isinstance(value, int) and not isinstance(value, bool):
        return bool(types & {"i32", "i64"}) or (value == 1 and "constexpr" in types)  # Triton compiles a 1 in
    return isinstance(value, float) and "fp32" in types


def covers(entry: Shipped, launch: Launch) -> bool:
    """Whether a launch takes a tile that was compiled, or a part of one because there is no more to do."""
    compiled = blocks_of(entry.constants)
    options = {**OPTIONS, **entry.options}
    if "PRECISION" not in launch.given:  # no product: registers hold a warp's part, whatever its rows and columns
        each = prod(launch.blocks.values()) / launch.options["num_warps"]
        return each <= prod(compiled.values()) / options["num_warps"]
    same = all(launch.given.get(n) == entry.constants.get(n) for n in ("PRECISION", "FLAT", *USES))
    same = same and (launch.given.get("norm_parts") is not None) <= ("norm_parts" in entry.signature)
    return same and launch.options == options and all(launch.blocks[n] <= most for n, most in compiled.items())


def is_whole(launch: Launch, entries: Iterable[Shipped]) -> bool:
    """Whether the launch takes a tile exactly as it was compiled."""
    return any(
        blocks_of(entry.constants) == launch.blocks and {**OPTIONS, **entry.options} == launch.options
        for entry in entries
    )


# ------------------------------------------------------------------------------------------- far apart

_POINTWISE = {
    **dict.fromkeys(("x", "d", "g", "g_full", "out"), "f"),
    **dict.fromkeys(("pooled", "a", "source", "g_in", "g_pooled"), "s"),
}
_ROWS = {"p": "s_p", "weight": "s_w", "y": "s_y", "a": "s_a", "g_in": "s_g", "g_out": "s_go", "g_c": "s_gc"}
_IMAGES = {n: f"{n}_n" for n in ("y", "d", "g", "a", "p", "gp")}


def strides_of(launch: Launch, dimension: str) -> dict[str, str]:
    """Tensor argument to the argument that is its stride: of the batch ("n"), or of channels ("c", pointwise only)."""
    names = set(launch.given)
    if launch.function.__module__ == pointwise_kernels.__name__:
        found = {n: f"{size}_{dimension}" for n, size in _POINTWISE.items()}
        if launch.name == "grad_reverse_kernel":
            found["out"] = f"s_{dimension}"
    elif launch.function.__module__ == linear_kernels.__name__:
        found = {**_ROWS, "out": "s_out"}
    else:
        found = {**_IMAGES, "out": "s_n" if "s_n" in names else "u_n", "source": "u_n"}
    return {n: stride for n, stride in found.items() if stride in names and isinstance(launch.given.get(n), Tensor)}


class FarApart:
    """Runs kernels on copies whose last image, channel or row lies FAR numbers away, in memory not touched between."""

    def __init__(self, dimension: str, dtype: torch.dtype):
        self.dimension = dimension
        self.memory = torch.from_numpy(numpy.zeros(FAR + 2**20, numpy.uint16)).view(dtype)
        self.seen: set[str] = set()

    def __call__(self, launch: Launch, kernel: Any) -> None:
        given, moved, start = dict(launch.given), [], 0
        for name, stride in strides_of(launch, self.dimension).items():
            near = as_counted(given[name], launch)
            at = {"n": 0, "c": 1}[self.dimension]
            if near.dtype != self.memory.dtype or near.shape[at] < 2:
                continue
            apart = -(-FAR // (near.shape[at] - 1))
            strides = [apart if i == at else s for i, s in enumerate(near.stride())]
            far = self.memory[start:].as_strided(near.shape, strides).copy_(near)
            start += near.numel() + 16
            moved.append((near, far))
            given[name], given[stride] = far, apart
        kernel[launch.grid](**given, **launch.options)
        for near, far in moved:
            near.copy_(far)
        if moved:
            self.seen.add(launch.name)


def as_counted(t: Tensor, launch: Launch) -> Tensor:
    """t as the kernel counts: without a window, the pixels of all images of channels_last are numbered in one."""
    if "count" not in launch.given or not launch.given.get("f_n") or launch.given["count"] == t.shape[0]:
        return t
    return t.movedim(1, -1).view(-1, t.shape[1]) if launch.given["FLAT"] else t
