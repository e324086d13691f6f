"""Fuzzing `reverse_layer`: one layer of any rank, size, strides, type and kind, right or refused with a sentence."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fuzz_modules as fm
import torch
from fuzz_judge import check_close, gradients
from fuzz_tensors import INCOMING, Snapshot, Source, dtypes, exact, incoming, seeds, serving, sizes, strides, values
from hypothesis import strategies as st
from torch import Tensor, nn

import racecar_kernels as rk

MODES = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
# Each is refused, whatever the rest of the case is like.
FAULTS = (
    "y size", "target channels", "bias shape", "integer y", "complex target", "mixed weight", "sparse target",
    "meta weight", "y is a list", "stride 0", "empty batch", "norm channels", "scalar y", "scalar target",
    "negative padding", "no kernel", "no output channels", "one output channel more than groups take", "bias is a list",
)  # fmt: skip
# The files whose sentences are meant for users; an error out of any other one got past the checks.
SENTENCES = ("checks.py", "descriptions.py", "functional.py", "describe.py", "backends/__init__.py", "layer.py")


@dataclass(frozen=True)
class LayerCase:
    """Plain values, so that `check(LayerCase(...))` runs a printed case again."""

    seed: int
    dims: int  # 0: linear
    lead: int  # dimensions in front of a linear layer's features
    batch: int
    size: tuple[int, ...]
    channels: tuple[int, int]  # in and out, each times groups
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: int | str
    dilation: int
    mode: str
    bias: bool
    pre: tuple[str, ...]
    latent: tuple[str, ...]
    undo: tuple[str, ...]
    norm: str
    reduction: str
    memory: str
    backend: str | None
    dtype: str
    values: str
    strides: tuple[str, ...]
    needs: int  # bits: which tensors have a gradient
    incoming: str
    loss: bool  # whether the loss has a gradient
    shared: bool  # one tensor as y and as target, where the shapes allow it
    fitted: bool  # what does not fit the sizes is made to fit, so that most cases are served
    fault: str


def threes(of: st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(of, of, of)


layer_cases = st.builds(
    LayerCase,
    seed=seeds,
    dims=st.sampled_from([0, 1, 2, 2, 3]),
    lead=st.integers(0, 3),
    batch=st.sampled_from([1, 2, 3, 5]),
    size=threes(sizes),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    groups=st.sampled_from([1, 1, 1, 2, 3]),
    kernel=threes(st.sampled_from([1, 2, 3, 3, 4])),
    stride=threes(st.sampled_from([1, 1, 2, 3])),
    padding=st.sampled_from([0, 1, 1, 2, 3, "same", "valid"]),
    dilation=st.sampled_from([1, 1, 1, 2]),
    mode=st.sampled_from(MODES),
    bias=st.booleans(),
    pre=st.lists(st.sampled_from(sorted(fm.STEPS)), max_size=2).map(tuple),
    latent=st.lists(st.sampled_from(fm.LATENTS), max_size=3).map(tuple),
    undo=st.lists(st.sampled_from(sorted(fm.STEPS)), max_size=2).map(tuple),
    norm=st.sampled_from(["batch", "batch", "running"]),
    reduction=st.sampled_from(["l2", "sum", "mean"]),
    memory=st.sampled_from(["store", "recompute"]),
    backend=st.sampled_from([None, *rk.backends()]),
    dtype=dtypes,
    values=values,
    strides=st.lists(strides, min_size=1, max_size=5).map(tuple),
    needs=st.integers(0, 63) | st.just(63),
    incoming=st.sampled_from(INCOMING),
    loss=st.booleans(),
    shared=st.booleans(),
    fitted=st.sampled_from([True] * 6 + [False]),
    fault=st.sampled_from(["none"] * 100 + list(FAULTS)),
)


def check(case: LayerCase) -> str:
    """Runs a case; raises AssertionError where something is wrong, else says what it was: served or refused."""
    layer = build(case)
    if case.fault != "none" or layer is None or layer.shapes is None:
        call = refused_call(case, layer)
        return "passed over" if call is None else must_be_refused(call)
    return Run(case, layer).check()


@dataclass
class Built:
    """A case as modules in float64; shapes of target, of what the operation sees and of y, None where refused."""

    pre: list[nn.Module]
    op: nn.Module
    latent: list[nn.Module]
    undo: list[nn.Module]
    target: tuple[int, ...]
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None

    @property
    def settings(self) -> dict:
        if isinstance(self.op, nn.Linear):
            return {}
        return {n: getattr(self.op, n) for n in ("stride", "padding", "dilation", "groups", "padding_mode")}


def build(case: LayerCase) -> Built | None:
    """The modules, and whether plain PyTorch takes them; None where torch.nn does not even make them."""
    torch.manual_seed(case.seed)
    dims, whole, fitted = case.dims, case.values == "lattice", case.fitted
    size = tuple(max(n, 1) for n in case.size) if fitted else case.size
    groups = case.groups if dims else 1
    c_in, c_out = (c * groups for c in case.channels)
    if not dims:
        target = (*size[: max(case.lead - 1, 0)], *[case.batch][: case.lead], c_in)
        pre, op, undo = [], nn.Linear(c_in, c_out, bias=case.bias), []
    else:
        target = (case.batch, c_in, *size[:dims])
        pre, undo = (fm.steps(names, dims, whole=whole) for names in (case.pre, case.undo))
        pre = fm.fitting(pre, target) if fitted else pre
        settings = dict(dilation=case.dilation, groups=groups, bias=case.bias, padding_mode=case.mode)
        stride = (1,) * dims if case.padding == "same" else case.stride[:dims]
        op = fm.CONV[dims](c_in, c_out, case.kernel[:dims], stride, case.padding, **settings)
        if fitted and not fm.fitting([op.double()], fm.works(pre, target)):
            op = fm.CONV[dims](c_in, c_out, 1, stride, 0, groups=groups, bias=case.bias)
    seen = fm.works(pre, target)
    latent = fm.latents(case.latent, dims, seen or target, whole=whole)
    full = seen and fm.works([op.double()], seen)
    if fitted and seen and full:
        undo, latent = fm.fitting(undo, full), fm.fitting(latent, seen)
    y = full and fm.works(undo, full)
    fits = seen and fm.works(latent, seen)
    return Built(pre, op, latent, undo, target, (seen, y) if y and fits else None)


class Run:
    """A case that has to be served: once by us, once by definition."""

    def __init__(self, case: LayerCase, layer: Built) -> None:
        assert layer.shapes is not None
        self.case, self.layer, self.seen = case, layer, torch.Size(layer.shapes[0])
        self.dtype = getattr(torch, case.dtype)
        source = Source(case.seed, self.dtype, case.strides, case.values)
        self.y = source.tensor(layer.shapes[1], special=True)
        self.target = source.tensor(layer.target, special=case.seed % 2 == 0)
        if case.shared and self.y.shape == self.target.shape:
            self.target = self.y
        self.parameters = [source.tensor(tuple(p.shape)) for m in (layer.op, *layer.latent) for p in m.parameters()]
        for module in layer.latent:
            for name, buffer in module.named_buffers():
                if name in ("running_mean", "running_var"):
                    buffer.copy_(torch.rand(buffer.shape, generator=source.generator) + 0.3)
                    buffer.copy_(buffer.to(self.dtype))
        distinct = {id(t): t for t in (self.y, self.target, *self.parameters)}
        self.leaves = list(distinct.values())
        for i, t in enumerate(self.leaves):
            t.requires_grad_(bool(case.needs >> min(i, 5) & 1))
        self.snapshot = Snapshot(source.made)

    def check(self) -> str:
        case = self.case
        try:
            ours = self.ours()
        except RuntimeError as error:  # plain PyTorch has gaps of its own in half precision
            if case.dtype.endswith("float16") and "not implemented" in str(error):
                return "passed over"
            raise
        self.snapshot.check()
        # a mean divides, by what need not be a power of two
        exactly = case.values == "lattice" and case.dtype in ("float32", "float64") and case.reduction != "mean"
        inputs = [exact(t) for t in self.leaves]
        check_close(ours, self.truth, inputs, self.dtype, exact=exactly)
        return "served"

    def total(self, a: Tensor, loss: Tensor) -> Tensor | None:
        parts = [incoming(a, self.case.incoming, self.case.seed), loss * 0.5 if self.case.loss else None]
        given = [p for p in parts if p is not None]
        return sum(given[1:], given[0]) if given else None

    def ours(self) -> dict[str, list[Tensor | None]]:
        case, layer, dtype = self.case, self.layer, self.dtype
        own = len(list(layer.op.parameters()))
        latent = [copy.deepcopy(m).to(dtype) for m in layer.latent]
        fm.set_tensors(latent, self.parameters[own:])
        weight, bias = self.parameters[0], self.parameters[1] if own > 1 else None
        a, loss = rk.reverse_layer(
            self.y, self.target, weight, bias, **layer.settings, pre=layer.pre, latent=latent, undo=layer.undo,
            norm=case.norm, reduction=case.reduction, memory=case.memory, backend=serving(case.backend, case.dtype),
        )  # fmt: skip
        assert a.dtype == dtype and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert a.requires_grad == loss.requires_grad == any(t.requires_grad for t in self.leaves)
        grads = gradients(self.total(a, loss), self.leaves)
        for g, t in zip(grads, [t for t in self.leaves if t.requires_grad], strict=False):
            assert g.dtype == t.dtype and g.device == t.device
        return {"a": [a], "loss": [loss], "gradients": grads}

    def truth(self, leaves: list[Tensor], *, plain: bool = False) -> dict[str, list[Tensor | None]]:
        case, layer = self.case, self.layer
        if plain:
            leaves = [t.detach().requires_grad_() for t in leaves]
        at = {id(t): leaf for t, leaf in zip(self.leaves, leaves, strict=True)}
        y, target = at[id(self.y)], at[id(self.target)]
        fm.set_tensors([layer.op, *layer.latent], [at[id(p)] for p in self.parameters])
        full = layer.op(torch.zeros(self.seen, dtype=torch.float64)).shape
        source = fm.undone(layer.undo, y, full)
        a = fm.reversed_once(layer.op, source, self.seen, layer.latent, case.norm, plain=plain)
        total = fm.residual(target, layer.pre, a).square().sum()
        loss = {"l2": total / 2, "sum": total, "mean": total / target.numel()}[case.reduction]
        return {"a": [a], "loss": [loss], "gradients": gradients(self.total(a, loss), leaves)}


def refused_call(case: LayerCase, layer: Built | None) -> Callable[[], object] | None:
    """A call that cannot work: because of the sizes, or of the case's fault. None where the fault does not apply."""
    if layer is None:
        return None
    dtype, op, broken = getattr(torch, case.dtype), copy.deepcopy(layer.op), case.fault
    seen, y_shape = layer.shapes or (layer.target, layer.target)
    target, settings, latent = layer.target, dict(layer.settings), [copy.deepcopy(m).to(dtype) for m in layer.latent]
    if broken != "none" and layer.shapes is None:
        return None
    if broken == "empty batch":
        if len(target) < 2:
            return None
        target, y_shape = (0, *target[1:]), (0, *y_shape[1:])
    source = Source(case.seed, dtype, case.strides, case.values)
    y, d = source.tensor(y_shape), source.tensor(target)
    weight, bias = (None if p is None else source.tensor(tuple(p.shape)) for p in (op.weight, op.bias))
    channels = seen[1] if len(seen) > 1 else seen[0]
    faults: dict[str, Callable[[], dict]] = {
        "none": dict,
        "empty batch": dict,
        "y size": lambda: dict(y=source.tensor((*y_shape[:-1], y_shape[-1] + 1))),
        "target channels": lambda: dict(target=torch.cat([d, d], 1 if case.dims else -1)),
        "bias shape": lambda: dict(bias=source.tensor((weight.shape[0] + 1,))),
        "bias is a list": lambda: dict(bias=[1.0]),
        "integer y": lambda: dict(y=torch.ones(y_shape, dtype=torch.int32)),
        "complex target": lambda: dict(target=d.detach().to(torch.complex64)),
        "mixed weight": lambda: dict(weight=weight.to(torch.float64 if case.dtype != "float64" else torch.float32)),
        "sparse target": lambda: dict(target=d.detach().contiguous().to_sparse()),
        "meta weight": lambda: dict(weight=weight.to("meta")),
        "y is a list": lambda: dict(y=[1.0, 2.0]),
        "stride 0": lambda: dict(stride=0),
        "negative padding": lambda: dict(padding=-1),
        "norm channels": lambda: dict(latent=[fm.BATCH[case.dims](channels + 1).to(dtype)]),
        "scalar y": lambda: dict(y=source.tensor(())),
        "scalar target": lambda: dict(target=source.tensor(())),
        "no kernel": lambda: dict(weight=weight.narrow(-1, 0, 0)),
        "no output channels": lambda: dict(weight=weight[:0], bias=None),
        "one output channel more than groups take": lambda: dict(
            weight=torch.cat([weight, weight[:1]]), bias=None, y=torch.cat([y, y[:, :1]], 1)
        ),
    }  # fmt: skip
    needs_convolution = broken in ("stride 0", "negative padding") or broken.startswith("one output channel")
    if (needs_convolution and not case.dims) or (broken.startswith("one output channel") and case.groups == 1):
        return None
    arguments = dict(y=y, target=d, weight=weight, bias=bias, pre=layer.pre, latent=latent, undo=layer.undo)
    arguments |= (
        settings
        | dict(memory=case.memory, backend=serving(case.backend, case.dtype), reduction=case.reduction)
        | faults[broken]()
    )
    return lambda: rk.reverse_layer(**arguments)


def must_be_refused(call: Callable[[], object]) -> str:
    """The call has to raise one of our own sentences, before anything is computed."""
    try:
        call()
    except (ValueError, TypeError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = Path(where).as_posix().endswith(tuple(f"racecar_kernels/{name}" for name in SENTENCES))
        if not ours or len(str(error).split()) < 4:
            raise AssertionError(f"refused, but not in a sentence of ours: {error!r} from {where}") from error
        return "refused"
    except Exception as error:
        raise AssertionError(f"got past the checks, and then failed: {type(error).__name__}: {error}") from error
    raise AssertionError("what cannot work was computed")
