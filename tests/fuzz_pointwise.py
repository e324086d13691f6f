"""Fuzzing `racecar_kernels.pointwise`: every function, every level of SIMD instructions, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from fuzz_judge import check_close
from fuzz_tensors import Snapshot, Source, dtypes, exact, seeds, strides, values
from hypothesis import strategies as st
from torch import Tensor

from racecar_kernels import extension, pointwise
from racecar_kernels.activations import TABLE
from racecar_kernels.layer import Tied
from racecar_kernels.pointwise import BatchNorm, Lazy, Window

MODULE = extension.load()
LEVELS = ("none",) if MODULE is None else tuple(MODULE.simd_levels())
# Served in C++ and not; each with arguments.
ARGUMENTS = {
    "leaky_relu": (0.25,), "elu": (0.5,), "celu": (0.5,), "gelu": ("none",), "hardtanh": (-1.0, 2.0),
    "hardshrink": (0.5,), "softshrink": (0.5,), "softplus": (1.0, 20.0), "threshold": (0.5, -1.0),
}  # fmt: skip
# With whole numbers exact, so that ties and kinks have to be met.
PIECEWISE = ("identity", "relu", "relu6", "hardtanh", "leaky_relu")
ACTS = ("identity", *(name for name in TABLE if name != "prelu"), *PIECEWISE)
FUNCTIONS = (
    "channel_sum", "batch_norm", "batch_norm_backward_", "norm_input_grad_", "materialise",
    "sum_of_squares", "compare", "grad_reverse", "grad_forward", "grad_reverse", "grad_forward",
)  # fmt: skip
MEASURING = ("batch_norm", "batch_norm_backward_")  # divide
TENSORS = ("x", "scale", "shift", "mean")
FAULTS = ("a of another size", "window beyond the image", "shift of another length", "an activation of no name")


@dataclass(frozen=True)
class PointwiseCase:
    """Plain values, so that `check(PointwiseCase(...))` runs a printed case again."""

    seed: int
    function: str
    level: str
    shape: tuple[int, ...]  # (N, C, ...)
    window: tuple[int, int] | None
    act_d: str
    act_a: str
    affine: str  # d and a: both, shift, none
    terms: tuple[bool, bool, bool]  # c2 · residual, incoming gradients at one size and at the other
    in_place: bool
    pooled: bool
    done: bool  # d and a hold what their activations gave
    mean: bool  # what the sums of gradients take off
    extra: bool  # the sums and the loss beside a gradient, a bias off what is materialised
    layout: str  # of all tensors, or `each`
    dtype: str
    values: str
    strides: tuple[str, ...]
    fault: str
    conv: tuple[int, ...] = ()  # of grad_weight: channels, kernel, stride, dilation, padding in two directions each


lengths = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 70, 1, 0])
channels = st.sampled_from([1, 2, 3, 8, 17, 64, 5, 16, 0])
shapes = (
    st.tuples(st.integers(0, 40), channels)
    | st.tuples(st.integers(1, 3), channels, lengths)
    | st.tuples(st.integers(1, 3), channels, lengths, lengths)
    | st.tuples(st.integers(1, 3), channels, lengths, lengths)
    | st.tuples(st.integers(1, 2), channels, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
)
fields = dict(
    seed=seeds,
    function=st.sampled_from(FUNCTIONS),
    level=st.sampled_from(LEVELS),
    shape=shapes,
    window=st.none() | st.sampled_from([(2, 2), (1, 1), (2, 3), (3, 1), (1, 4), (5, 5)]),
    act_d=st.sampled_from(ACTS),
    act_a=st.sampled_from(ACTS),
    affine=st.sampled_from(["both", "both", "shift", "none"]),
    terms=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    in_place=st.booleans(),
    pooled=st.booleans(),
    done=st.sampled_from([False, False, True]),
    mean=st.booleans(),
    extra=st.booleans(),
    layout=st.sampled_from(["contiguous", "channels_last", "channels_last", "each"]),
    dtype=dtypes,
    values=values,
    strides=st.lists(strides, min_size=1, max_size=4).map(tuple),
    fault=st.sampled_from(["none"] * 40 + list(FAULTS)),
)
nonempty = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33])
one_to_three = st.sampled_from([3, 1, 2])
grad_weight = dict(
    function=st.just("grad_weight"),
    shape=st.tuples(st.integers(1, 3), st.sampled_from([16, 32, 48, 16, 17]), nonempty, nonempty),
    act_d=st.sampled_from([*PIECEWISE, "tanh", "sigmoid", "elu", "gelu"]),
    act_a=st.sampled_from([*PIECEWISE, "tanh"]),
    affine=st.sampled_from(["none"] * 7 + ["both"]),
    layout=st.sampled_from(["channels_last"] * 7 + ["each"]),
    fault=st.just("none"),
    conv=st.tuples(
        st.sampled_from([1, 2, 3, 1, 4]),
        *[one_to_three] * 4,
        *[st.sampled_from([1, 1, 2])] * 2,
        *[st.integers(0, 3)] * 2,
    ),
)
pointwise_cases = st.sampled_from([False] * 9 + [True]).flatmap(
    lambda of_weight: st.builds(PointwiseCase, **(fields | grad_weight if of_weight else fields))
)


@dataclass
class Operands:
    """What the functions take: d and what has its size, a and what has the pooled size, values per channel."""

    d: Lazy
    a: Lazy
    g_full: Tensor
    g_small: Tensor
    c2: Tensor
    k: list[Tensor]
    conv: list[Tensor]  # of grad_weight: image and weight

    @property
    def tensors(self) -> list[Tensor]:
        lazies = [t for lazy in (self.d, self.a) for t in map(lazy.__getattribute__, TENSORS) if t is not None]
        return [*lazies, self.g_full, self.g_small, self.c2, *self.k, *self.conv]

    def holding(self, tensors: list[Tensor]) -> Operands:
        """The same with other tensors, in the order of `tensors`."""
        left = iter(tensors)
        lazies = [
            lazy._replace(**{name: None if getattr(lazy, name) is None else next(left) for name in TENSORS})
            for lazy in (self.d, self.a)
        ]
        g_full, g_small, c2, *rest = left
        return Operands(*lazies, g_full, g_small, c2, rest[:4], rest[4:])


def check(case: PointwiseCase) -> str:
    """Runs a case; raises AssertionError where something is wrong, else says what it was: served or refused."""
    if case.values in ("nan", "inf"):  # the sums of what is not finite are tested where the activations are
        case = replace(case, values="normal")
    whole = case.values == "lattice"
    if whole:
        fix = {act: act if getattr(case, act) in PIECEWISE else "relu" for act in ("act_d", "act_a")}
        case = replace(case, **{key: getattr(case, key) if v == key else v for key, v in fix.items()})
    fits = (
        len(case.shape) == 4 and case.window and all(k <= n for k, n in zip(case.window, case.shape[2:], strict=True))
    )
    case = replace(case, window=case.window if fits else None)
    if MODULE is not None:
        best = MODULE.simd_level()
        MODULE.set_simd_level(case.level)
    try:
        operands = build(case)
        if case.fault != "none":
            return _refused(case, operands)
        return _served(case, operands)
    finally:
        if MODULE is not None:
            MODULE.set_simd_level(best)


def build(case: PointwiseCase) -> Operands:
    dtype = getattr(torch, case.dtype)
    kinds = case.strides if case.layout == "each" else (case.layout,)
    source = Source(case.seed, dtype, kinds, case.values)
    wide = Source(case.seed + 1, torch.float64 if dtype == torch.float64 else torch.float32, case.strides, case.values)
    small = case.shape
    if case.window:
        small = (*small[:2], *(n // k for n, k in zip(small[2:], case.window, strict=True)))

    def per_channel() -> Tensor:
        return wide.tensor((case.shape[1],), leaf=False)

    def lazy(shape: tuple[int, ...], act: str) -> Lazy:
        scale = per_channel() if case.affine == "both" else None
        shift = per_channel() if case.affine != "none" else None
        args = ARGUMENTS.get(act, ())
        done = case.done and shift is None and (act == "identity" or TABLE[act].from_output(*args))
        return Lazy(
            source.tensor(shape, leaf=False), scale, shift, act, args, per_channel() if case.mean else None, done
        )

    d, a = lazy(case.shape, case.act_d), lazy(small, case.act_a)
    full, pooled = source.tensor(case.shape, leaf=False), source.tensor(small, leaf=False)
    k = [per_channel() for _ in range(4)]
    conv = [source.tensor(shape, leaf=False) for shape in _convolved(case)]
    return Operands(d, a, full, pooled, torch.tensor(0.5, dtype=wide.dtype), k, conv)


def _convolved(case: PointwiseCase) -> list[tuple[int, ...]]:
    """Shapes of an image and a weight that give one of the case's shape; every padding leaves something to see."""
    if not case.conv:
        return []
    c_in, kernel = case.conv[0], case.conv[1:3]
    size = [
        (n - 1) * s + d * (k - 1) + 1 - 2 * p
        for n, k, s, d, p in zip(case.shape[2:], kernel, *_settings(case), strict=True)
    ]
    return [(case.shape[0], c_in, *size), (case.shape[1], c_in, *kernel)]


def _settings(case: PointwiseCase) -> tuple[list[int], list[int], list[int]]:
    """Stride, dilation and padding of its convolution."""
    kernel, stride, dilation, most = (case.conv[i : i + 2] for i in (1, 3, 5, 7))
    whole = [(n - 1) * s + d * (k - 1) for n, k, s, d in zip(case.shape[2:], kernel, stride, dilation, strict=True)]
    return list(stride), list(dilation), [min(p, n // 2) for p, n in zip(most, whole, strict=True)]


def _grad_weight(case: PointwiseCase, o: Operands, given: tuple[Any, ...], *, ref: bool) -> object:
    """The weight's gradient; `ref`: a library's of the gradient that is written out first. None: not served."""
    image, weight = o.conv
    stride, dilation, padding = _settings(case)
    if not ref:
        tied = Tied(tuple(stride), tuple((p, p) for p in padding), tuple(dilation))
        return pointwise.grad_weight(*given, image, weight, tied, sums=case.extra)
    g = pointwise.grad_forward_ref(*given, sums=True)
    rest = (None, stride, padding, dilation, False, [0, 0], 1, [False, True, False])
    found = torch.ops.aten.convolution_backward(g.g, image, weight, *rest)[1]
    return found, g.total if case.extra else None


def call(case: PointwiseCase, o: Operands, *, ref: bool) -> list[Tensor]:
    """What the case's function gives, without what it leaves out."""
    name = case.function
    plain = name[:-1] + "_ref_" if name.endswith("_") else name + "_ref"
    f: Callable = getattr(pointwise, plain if ref else name)
    window: Window = case.window
    loss, first, second = case.terms
    incoming = (
        o.d, o.a if loss else None, window, o.c2 if loss else None, o.g_small if first else None,
        o.g_full if second else None,
    )  # fmt: skip
    given: dict[str, Callable[[], object]] = {
        "channel_sum": lambda: f(o.d.x),
        "batch_norm": lambda: f(o.d.x, o.k[0] if case.extra else None, o.k[1] if case.mean else None, 0.1),
        "batch_norm_backward_": lambda: f(o.g_full, o.d.x, BatchNorm(*o.k), o.k[2], o.k[3]),
        "norm_input_grad_": lambda: f(o.g_full, o.d.x, *o.k),
        "materialise": lambda: f(
            o.d, window, pooled=case.pooled and window is not None, in_place=case.in_place,
            minus=o.k[0] if case.extra else None,
        ),
        "sum_of_squares": lambda: f(o.d, o.a, window),
        "compare": lambda: f(o.d, o.a, window, minus=o.k[0] if case.extra else None),
        "grad_reverse": lambda: f(
            o.d, o.a, window, o.c2 if loss else None, o.g_small if first else None,
            in_place=case.in_place and first, sums=case.extra, loss=case.extra and loss,
        ),
        "grad_forward": lambda: f(*incoming, in_place=case.in_place and second, sums=case.extra),
        "grad_weight": lambda: _grad_weight(case, o, incoming, ref=ref),
    }  # fmt: skip
    results = given[case.function]()
    results = results if isinstance(results, tuple) else (results,)
    return [t for t in results if t is not None]


def _served(case: PointwiseCase, operands: Operands) -> str:
    dtype = getattr(torch, case.dtype)
    inputs = [exact(t) for t in operands.tensors]
    written = {"norm_input_grad_": operands.g_full, "batch_norm_backward_": operands.g_full}
    if case.in_place:
        written |= dict(materialise=operands.d.x, grad_reverse=operands.g_small, grad_forward=operands.g_full)
    out = written.get(case.function)
    if out is not None and _overlaps(out):
        return "passed over"  # in place needs memory of its own for every element, in PyTorch too
    if 0 in case.shape[1:] and case.window:
        return "passed over"  # PyTorch pools no images without channels
    kept = Snapshot([t for t in operands.tensors if t is not out])
    got = call(case, operands, ref=False)
    kept.check()
    if case.function == "grad_weight" and not got:
        return "passed over"  # not served

    def truth(tensors: list[Tensor], *, plain: bool = False) -> dict[str, list[Tensor]]:
        held = operands.holding([t.clone() for t in tensors])
        if plain:
            held.d, held.a = held.d._replace(act="identity", args=()), held.a._replace(act="identity", args=())
            signs = [t.abs() for t in held.tensors]
            held = held.holding(signs)
        return {str(i): [t] for i, t in enumerate(call(case, held, ref=True))}

    if 0 in case.shape:
        want = truth(inputs)
        assert [tuple(g.shape) for g in got] == [tuple(w[0].shape) for w in want.values()]
        return "served"
    exactly = case.values == "lattice" and case.dtype in ("float32", "float64") and case.function not in MEASURING
    check_close({str(i): [t] for i, t in enumerate(got)}, truth, inputs, dtype, exact=exactly)
    return "served"


def _overlaps(t: Tensor | None) -> bool:
    return t is not None and sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 < t.numel()


def _refused(case: PointwiseCase, o: Operands) -> str:
    """Sizes that do not fit each other: an error of any kind, but an error."""
    if 0 in case.shape or case.affine == "none":
        return "passed over"
    if case.fault != "an activation of no name" and pointwise.why_not(o.d, o.a, window=case.window) is not None:
        return "passed over"  # the plain twin broadcasts: see test_fuzz.py
    d, window = o.d, case.window
    calls: dict[str, Callable[[], object]] = {
        "a of another size": lambda: pointwise.sum_of_squares(d, Lazy(torch.cat([o.a.x] * 2, 1)), window),
        "window beyond the image": lambda: pointwise.materialise(d, (99, 99), pooled=True),
        "shift of another length": lambda: pointwise.materialise(d._replace(shift=torch.cat([d.shift, d.shift]))),
        "an activation of no name": lambda: pointwise.materialise(d._replace(act="prelu")),
    }
    try:
        calls[case.fault]()
    except (ValueError, TypeError, RuntimeError) as error:
        if len(str(error).split()) < 4:
            raise AssertionError(f"no sentence: {error!r}") from error
        return "refused"
    raise AssertionError("what cannot work was computed")
