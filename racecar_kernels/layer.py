"""What a reverse layer is made of, as plain immutable values.

A `Layer` holds everything about layer m that is not a tensor. It is hashable, so that plans can be compared and
cached, and turns into a string, because the schema of an operator knows strings but no structures.

    d_m ──pre──> tied operation ──latent──> d_{m+1}          forward
    d'_m <─undo pre── latent of m-1 <── transposed <── y      reverse
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from math import inf
from typing import Any, TypeVar

import torch

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Tied:
    """The operation whose weight the reverse shares: linear without `stride`, else a 1d, 2d or 3d convolution.

    `padding` holds (before, after) of every spatial dimension, so that `same` with even kernels has a place.
    """

    stride: Ints = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: Ints = ()
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def dims(self) -> int:
        return len(self.stride)

    def with_stride(self, stride: Ints) -> Tied:
        """The same operation with another stride."""
        return _with_stride(self, stride)

    def output_size(self, size: Ints, kernel: Ints) -> Ints:
        """Spatial size of the forward's result for an input of spatial `size`."""
        return tuple(
            (n + sum(p) - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        )


@lru_cache(maxsize=4096)
def _with_stride(tied: Tied, stride: Ints) -> Tied:
    return replace(tied, stride=stride)


@dataclass(frozen=True)
class Pool:
    """Max or average pooling in front of a tied operation. Undone by repeating every value `stride` times.

    `mode` matters to the forward alone: max, average, or other (an average that counts in its own way).
    """

    kernel: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    ceil_mode: bool = False
    mode: str = "max"

    def output_size(self, size: Ints) -> Ints:
        return tuple(map(self._length, size, self.kernel, self.stride, self.padding, self.dilation))

    def _length(self, n: int, k: int, s: int, p: int, d: int) -> int:
        reach = n + 2 * p - d * (k - 1) - 1
        length = (-(-reach // s) if self.ceil_mode else reach // s) + 1
        # with ceil_mode a window must still start inside the image or its left padding
        return length - 1 if self.ceil_mode and (length - 1) * s >= n + p else length


@dataclass(frozen=True)
class Upsample:
    """Nearest up-sampling by whole `factor`s. Undone by max pooling with the same factors."""

    factor: Ints

    def output_size(self, size: Ints) -> Ints:
        return tuple(n * f for n, f in zip(size, self.factor, strict=True))


Step = Pool | Upsample


@dataclass(frozen=True)
class Activation:
    """A row of the table in `activations.py`, with the module's settings. PReLU takes one tensor: its slopes."""

    name: str
    args: tuple[Any, ...] = ()

    @property
    def tensors(self) -> int:
        return 1 if self.name == "prelu" else 0


@dataclass(frozen=True)
class Norm:
    """A normalisation. Takes four tensors: scale, shift, mean, variance (the last two only when `running`).

    `kind` is batch, group (instance normalisation is one group per channel) or layer; `groups` belongs to group,
    `shape` to layer. `running`: a per-channel affine with the mean and variance given.
    """

    kind: str
    eps: float
    running: bool = False
    groups: int = 0
    shape: Ints = ()

    @property
    def tensors(self) -> int:
        return 4


Latent = Activation | Norm


@dataclass(frozen=True)
class Layer:
    """One reverse layer: `pre` and `tied` of layer m, `latent` of layer m-1 (for m = 1 the input's activation)."""

    tied: Tied
    pre: tuple[Step, ...] = ()
    latent: tuple[Latent, ...] = ()
    compare: bool = True  # False: only passed through, its loss is 0 (RR^s compares the first s layers)

    def input_shape(self, target: Ints) -> Ints:
        """Shape in which the tied operation saw its input, when the layer received `target`."""
        return after_steps(target, self.pre)

    def output_shape(self, target: Ints, weight: Ints) -> Ints:
        """Shape of what the tied operation gave, and so of the source y once it is undone."""
        seen = self.input_shape(target)
        if self.tied.dims == 0:
            return (*seen[:-1], weight[0])
        return (seen[0], weight[0], *self.tied.output_size(seen[2:], weight[2:]))

    @property
    def tensors(self) -> int:
        """Number of tensor slots (some may be None) that the latent takes."""
        return sum(step.tensors for step in self.latent)


@dataclass(frozen=True)
class Segment:
    """Reverse layers run one after the other, the highest m first, each the source of the next.

    `undo` is the `pre` of the layer above: operations that the source y has still to be taken back through.
    """

    layers: tuple[Layer, ...]
    undo: tuple[Step, ...] = ()
    backend: str | None = None

    def __str__(self) -> str:
        return _encode(self) if torch.compiler.is_compiling() else _encode_cached(self)

    def undo_of(self, i: int) -> tuple[Step, ...]:
        """Operations that the source of the i-th layer has still to be taken back through."""
        return self.layers[i - 1].pre if i else self.undo


@dataclass(frozen=True)
class Chain:
    """Layers that run forwards and backwards together, m = 1 first; see `chain.py`.

    A layer's `latent` is φ of the layer below, so that of the first one acts on the reverse alone; `last` is φ_n, which
    acts on the forward alone. full: every reverse layer begins where the one above it ended; else (local) at what its
    own layer gave. precision: of products of matrices in float32, tf32 or ieee; None: as PyTorch's setting is by then.
    """

    layers: tuple[Layer, ...]
    last: tuple[Latent, ...] = ()
    full: bool = True
    backend: str | None = None
    precision: str | None = None

    def __str__(self) -> str:
        return _encode(self) if torch.compiler.is_compiling() else _encode_cached(self)

    def latent(self, m: int) -> tuple[Latent, ...]:
        """φ of layer m, counted from 0."""
        return self.layers[m + 1].latent if m + 1 < len(self.layers) else self.last

    def reverses(self, m: int) -> bool:
        """Whether the reverse of layer m runs: locally for the compared layers alone."""
        return self.full or self.layers[m].compare

    @cached_property
    def cuts(self) -> tuple[tuple[tuple[Latent, ...], int, int], ...]:
        """φ of every layer, and from where to where its tensors stand among those of all."""
        found, at = [], 0
        for m in range(len(self.layers)):
            own = self.latent(m)
            found.append((own, at, at + sum(step.tensors for step in own)))
            at = found[-1][2]
        return tuple(found)

    @property
    def tensors(self) -> int:
        """Number of tensor slots that all φ take together."""
        return sum(step.tensors for m in range(len(self.layers)) for step in self.latent(m))


def after_steps(shape: Ints, steps: tuple[Step, ...]) -> Ints:
    """Shape after the forward's pooling and up-sampling; each acts on as many trailing dimensions as it has factors."""
    for step in steps:
        dims = len(step.factor if isinstance(step, Upsample) else step.kernel)
        shape = (*shape[:-dims], *step.output_size(shape[-dims:]))
    return shape


Parsed = TypeVar("Parsed")

_KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (Tied, Pool, Upsample, Activation, Norm, Layer, Segment, Chain)
}
_FIELDS = {kind: tuple(f.name for f in fields(kind)) for kind in _KINDS.values()}


def _encode(value: Any) -> str:
    """JSON, in Python so plain that torch.compile can trace it."""
    if type(value) in _FIELDS:
        parts = [f'"{type(value).__name__}"', *[_encode(getattr(value, name)) for name in _FIELDS[type(value)]]]
        return "[" + ",".join(parts) + "]"
    if isinstance(value, tuple):
        return "[" + ",".join([_encode(v) for v in value]) + "]"
    if isinstance(value, str):
        return '"' + value + '"'
    if isinstance(value, bool):
        return "true" if value else "false"
    words = {None: "null", inf: "Infinity", -inf: "-Infinity"}
    return words[value] if value in words else str(value)


def _decode(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], str) and value[0] in _KINDS:
        return _KINDS[value[0]](*map(_decode, value[1:]))
    return tuple(map(_decode, value))


_encode_cached = lru_cache(maxsize=4096)(_encode)


@lru_cache(maxsize=4096)
def parse(text: str) -> Segment:
    """The `Segment` that `str(segment)` came from."""
    return _parsed(text, Segment, "reverse layers")


@lru_cache(maxsize=4096)
def parse_chain(text: str) -> Chain:
    """The `Chain` that `str(chain)` came from."""
    return _parsed(text, Chain, "a chain")


def _parsed(text: str, kind: type[Parsed], what: str) -> Parsed:
    value = _decode(json.loads(text))
    if not isinstance(value, kind):
        raise ValueError(f"not a description of {what}: {text[:80]!r}; make one with str({kind.__name__}(...))")
    return value
