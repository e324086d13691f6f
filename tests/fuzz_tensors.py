"""Tensors for fuzzing: any strides, any values, from a few plain numbers; and whether somebody wrote to one.

Everything here is decided by the arguments, so that a case which failed can be run again from what it prints.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

import racecar_kernels as rk

# How a tensor lies in memory. `expanded` repeats a slice (stride 0), `overlapping` slides a window over memory.
STRIDES = ("contiguous", "channels_last", "permuted", "sliced", "offset", "expanded", "overlapping", "odd ones")
VALUES = ("normal", "normal", "normal", "lattice", "lattice", "nan", "inf")
DTYPES = ("float32", "float32", "float64", "float64", "bfloat16", "float16")

strides = st.sampled_from([*STRIDES, "contiguous", "channels_last"])
values = st.sampled_from(VALUES)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**16)
sizes = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 12, 0])  # 0 is refused, but not too often


def serving(name: str | None, dtype: str) -> str | None:
    """The backend to force: the one that was drawn, unless it does not serve the type."""
    query = rk.Query(rk.Layer(rk.Tied()), "cpu", getattr(torch, dtype))
    return None if name is None or rk.why_not(name, query) else name


@dataclass
class Source:
    """Makes the tensors of one case, in float64 and in strides of their own, and remembers their memory.

    kinds: taken in turn from STRIDES. values: `normal`; `lattice`: whole numbers from -2 to 2, with which float32 is
    exact and everything ties with something; `nan`, `inf`: normal with one such element now and then.
    """

    seed: int
    dtype: torch.dtype
    kinds: tuple[str, ...]
    values: str = "normal"
    made: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)

    def draw(self, shape: tuple[int, ...], *, special: bool = False) -> Tensor:
        """Values in float64 that `dtype` holds exactly; `special`: NaN or infinity may be among them."""
        if self.values == "lattice":
            x = torch.randint(-2, 3, shape, generator=self.generator).double()
        else:
            x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if special and self.values in ("nan", "inf") and x.numel():
            at = torch.randint(x.numel(), (1,), generator=self.generator)
            x.view(-1)[at] = float(self.values) * self.random.choice((1, -1))
        return x.to(self.dtype).double()

    def tensor(self, shape: tuple[int, ...], *, special: bool = False, leaf: bool = True) -> Tensor:
        """Random, in `dtype`, in the next one of `kinds`, with a gradient if `leaf`."""
        kind = self.kinds[len(self.made) % len(self.kinds)]
        t = placed(self.draw(shape, special=special).to(self.dtype), kind, self.random)
        self.made.append(t)
        return t.requires_grad_(leaf)


def placed(x: Tensor, kind: str, rng: random.Random) -> Tensor:
    """x, or for `expanded` and `overlapping` some of its values, in strides of this kind."""
    dims = x.dim()
    if kind == "contiguous" or dims == 0 or x.numel() == 0:
        return x
    if kind == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if dims > 2 else x
    if kind == "permuted":
        order = rng.sample(range(dims), dims)
        back = [order.index(d) for d in range(dims)]
        return x.permute(order).contiguous().permute(back)
    if kind == "sliced":
        steps = [rng.choice((1, 2, 3)) for _ in range(dims)]
        wide = x.new_full([n * s + 1 for n, s in zip(x.shape, steps, strict=True)], torch.nan)
        cut = wide[tuple(slice(1, None, s) for s in steps)][tuple(slice(0, n) for n in x.shape)]
        return cut.copy_(x)
    if kind == "offset":  # not at the start of a cache line, nor where a vector register would like it
        return x.new_full((x.numel() + 3,), torch.nan)[3:].view(x.shape).copy_(x)
    if kind == "expanded":
        d = rng.randrange(dims)
        return x.narrow(d, 0, 1).expand_as(x)
    if kind == "overlapping":
        return x.reshape(-1)[: sum(n - 1 for n in x.shape) + 1].clone().as_strided(x.shape, (1,) * dims)
    if kind == "odd ones":  # the stride of a dimension of size 1 means nothing, and may be anything
        stride = [rng.choice((0, 1, 77)) if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
        return x.as_strided(x.shape, stride)
    raise ValueError(f"no kind of strides is called {kind!r}; there are {', '.join(STRIDES)}")


@dataclass
class Snapshot:
    """What lies behind tensors, gaps included, and how often it was written to."""

    tensors: list[Tensor]

    def __post_init__(self) -> None:
        self.before = [(t._version, t.untyped_storage().clone()) for t in self.tensors]

    def check(self) -> None:
        """Raises AssertionError if an element behind one of the tensors was written to."""
        for t, (version, memory) in zip(self.tensors, self.before, strict=True):
            assert torch.equal(_bytes(t.untyped_storage()), _bytes(memory)), (
                f"an argument was written to: shape {tuple(t.shape)}, strides {t.stride()}"
            )
            assert t._version == version, f"an argument's version went from {version} to {t._version}"


def _bytes(memory: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(memory)


def exact(t: Tensor) -> Tensor:
    """The same values in float64, contiguous, as a leaf of its own."""
    return t.detach().to(torch.float64, copy=True).contiguous().requires_grad_(t.requires_grad)


def incoming(a: Tensor, kind: str, seed: int) -> Tensor | None:
    """A scalar through which a gradient of this kind reaches a: the same function of a, whatever its dtype."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    if kind == "expanded":
        return a.sum()
    if kind == "sliced":
        return a[..., ::2].sum() * 0.5 if a.dim() else a
    g = torch.randint(-2, 3, a.shape, generator=generator).to(a.dtype)
    if kind == "permuted" and a.dim() > 1:
        order = list(range(a.dim()))[::-1]
        return (a.permute(order) * g.permute(order).contiguous()).sum()
    return (a * g).sum()


INCOMING = ("none", "expanded", "sliced", "permuted", "dense")
