"""Fuzzing `tied_chain` and, with one target per layer of its own, `reverse_layers`."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import fuzz_modules as fm
import torch
from fuzz_judge import check_close, gradients
from fuzz_layers import must_be_refused
from fuzz_tensors import INCOMING, Snapshot, Source, dtypes, exact, incoming, seeds, serving, sizes, strides, values
from hypothesis import strategies as st
from torch import Tensor, nn

import racecar_kernels as rk
from racecar_kernels import describe

# Each is refused, whatever the rest of the chain is like.
FAULTS = (
    "no layers", "a weight less", "a parameter more", "integer x", "empty batch", "channels", "deferred and full",
    "variant", "x is a list", "first latent takes tensors", "scalar x", "mixed weight", "a bias is a list",
    "counts in its own way", "a weight is a list", "a parameter is a list", "meta weight",
)  # fmt: skip


@dataclass(frozen=True)
class LayerOf:
    """One layer of a chain, m = 1 first; `latent` is φ_m, behind its operation."""

    channels: int
    kernel: tuple[int, int, int]
    stride: int
    padding: int | str
    groups: int
    mode: str
    bias: bool
    pre: tuple[str, ...]
    latent: tuple[str, ...]
    compare: bool


@dataclass(frozen=True)
class ChainCase:
    """Plain values, so that `check(ChainCase(...))` runs a printed case again."""

    seed: int
    dims: int  # 0: linear
    lead: int
    batch: int
    size: tuple[int, int, int]
    channels: int
    layers: tuple[LayerOf, ...]
    input_activation: str
    op: str  # tied_chain or reverse_layers
    variant: str
    memory: str
    backend: str | None
    dtype: str
    values: str
    strides: tuple[str, ...]
    needs: int
    incoming: str
    loss: bool
    shared: bool  # one weight for all layers that can share it
    fault: str


three = st.sampled_from([1, 2, 3, 3, 4])
parts = dict(
    kernel=st.tuples(three, three, three),
    stride=st.sampled_from([1, 1, 1, 2]),
    padding=st.sampled_from([0, 1, 1, 2, "same"]),
    groups=st.sampled_from([1, 1, 1, 2]),
    mode=st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    pre=st.lists(st.sampled_from(sorted(fm.STEPS)), max_size=2).map(tuple),
    latent=st.lists(st.sampled_from(fm.LATENTS), max_size=2).map(tuple),
    compare=st.sampled_from([True, True, True, False]),
)
layers_of = st.builds(LayerOf, channels=st.integers(1, 4), **parts)
# The first one's weight has a kernel of its own: for multiples of 16 channels, no norm behind it, and no gradient of x.
by_kernel = dict(kernel=st.tuples(*[st.sampled_from([1, 2, 3])] * 3), groups=st.just(1), mode=st.just("zeros"),
             latent=st.sampled_from([(), ("relu",), ("tanh",), ("leaky_relu",)]))  # fmt: skip
first_layers = st.builds(LayerOf, channels=st.sampled_from([1, 2, 3, 4, 1, 2, 3, 4, 16, 32]), **parts)
wide_layers = st.builds(LayerOf, channels=st.sampled_from([16, 32, 17]), **{**parts, **by_kernel, "pre": st.just(())})


def starting(first: st.SearchStrategy) -> st.SearchStrategy:
    """Up to three layers."""
    return st.tuples(first, st.lists(layers_of, max_size=2)).map(lambda drawn: (drawn[0], *drawn[1]))


fields = dict(
    seed=seeds,
    dims=st.sampled_from([0, 1, 2, 2, 3]),
    lead=st.integers(0, 3),
    batch=st.sampled_from([1, 2, 3]),
    size=st.tuples(sizes, sizes, sizes),
    channels=st.integers(1, 3),
    layers=starting(first_layers),
    input_activation=st.sampled_from(["", "", "relu", "sigmoid", "gelu"]),
    op=st.sampled_from(["tied_chain", "tied_chain", "reverse_layers"]),
    variant=st.sampled_from(["full", "local"]),
    memory=st.sampled_from(["store", "recompute", "deferred"]),
    backend=st.sampled_from([None, *rk.backends()]),
    dtype=dtypes,
    values=values,
    strides=st.lists(strides, min_size=1, max_size=5).map(tuple),
    needs=st.integers(0, 63) | st.just(63) | st.just(62),  # 62: all but x
    incoming=st.sampled_from(INCOMING),
    loss=st.booleans(),
    shared=st.booleans(),
    fault=st.sampled_from(["none"] * 60 + list(FAULTS)),
)
wide = dict(
    dims=st.just(2), channels=st.sampled_from([1, 1, 2, 3]), layers=starting(wide_layers), op=st.just("tied_chain"),
    strides=st.just(("channels_last",)), needs=st.sampled_from([62, 62, 58, 54, 60]), fault=st.just("none"),
)  # fmt: skip
chain_cases = st.sampled_from([False] * 7 + [True]).flatmap(
    lambda for_wide: st.builds(ChainCase, **(fields | wide if for_wide else fields))
)


@dataclass
class Link:
    """One layer in modules, its φ, and the shapes that it receives and that its operation sees."""

    pre: list[nn.Module]
    op: nn.Module
    latent: list[nn.Module]
    received: tuple[int, ...]
    seen: tuple[int, ...]


def build(case: ChainCase) -> tuple[list[Link], tuple[int, ...]] | None:
    """The layers that plain PyTorch can run one behind the other, and the shape of what comes out; None: not one."""
    torch.manual_seed(case.seed)
    dims, whole, c = case.dims, case.values == "lattice", case.channels
    size = tuple(min(max(n, 1), 8) for n in case.size)
    h = (case.batch, 2 * c, *size[:dims]) if dims else (*size[: max(case.lead - 1, 0)], *[case.batch][: case.lead], c)
    links: list[Link] = []
    for layer in case.layers:
        pre = fm.fitting(fm.steps(layer.pre, dims, whole=whole), h)
        seen = fm.works(pre, h)
        op = seen and _operation(layer, dims, seen)
        given = op and fm.works([op], seen)
        if not (seen and op and given) or max(seen) > 40:
            break
        latent = fm.fitting(fm.latents(layer.latent, dims, given, whole=whole), given)
        links.append(Link(pre, op, latent, h, seen))
        h = given
    return (links, h) if links else None


def _operation(layer: LayerOf, dims: int, seen: tuple[int, ...]) -> nn.Module:
    if not dims:
        return nn.Linear(seen[-1], layer.channels, bias=layer.bias).double()
    stride = 1 if layer.padding == "same" else layer.stride
    groups = layer.groups if seen[1] % layer.groups == 0 else 1
    out, settings = layer.channels * groups, dict(groups=groups, bias=layer.bias)
    op = fm.CONV[dims](seen[1], out, layer.kernel[:dims], stride, layer.padding, padding_mode=layer.mode, **settings)
    return op.double() if fm.works([op.double()], seen) else fm.CONV[dims](seen[1], out, 1, **settings).double()


def _unwritten(case: ChainCase) -> bool:
    """A weight's gradient of which PyTorch's own conv3d leaves elements unwritten (2.13, input of one pixel)."""
    return case.dims == 3 and case.dtype == "bfloat16" and case.layers[0].channels >= 16


def check(case: ChainCase) -> str:
    """Runs a case; raises AssertionError where something is wrong, else says what it was: served or refused."""
    built = build(case)
    if built is None or _unwritten(case):
        return "passed over"
    run = Run(case, *built)
    if case.fault == "none" and not run.can_be_reversed():
        return must_be_refused(run.segment if run.targets else run.chain)
    if case.fault != "none":
        return must_be_refused(lambda: rk.tied_chain(**run.broken()))
    return run.check()


class Run:
    """A chain that has to be served: once by us, once by definition."""

    def __init__(self, case: ChainCase, links: list[Link], out: tuple[int, ...]) -> None:
        self.case, self.links = case, links
        self.dtype = getattr(torch, case.dtype)
        self.variant = "full" if case.op == "reverse_layers" else case.variant
        full_deferred = case.memory == "deferred" and (self.variant == "full" or case.op == "reverse_layers")
        self.memory = "recompute" if full_deferred else case.memory
        self.activation = fm.latents((case.input_activation,) if case.input_activation else (), case.dims, (1, 1),
                                     whole=case.values == "lattice")  # fmt: skip
        source = Source(case.seed, self.dtype, case.strides, case.values)
        self.x = source.tensor(links[0].received, special=True)
        # reverse_layers: a target for every layer, and y
        targets = [source.tensor(link.received, special=True) for link in links[1:]]
        self.targets = [self.x, *targets, source.tensor(out)] if case.op == "reverse_layers" else []
        self.parameters = [[source.tensor(tuple(p.shape)) for p in link.op.parameters()] for link in links]
        if case.shared and len(links) > 1 and links[0].op.weight.shape == links[1].op.weight.shape:
            self.parameters[1][0] = self.parameters[0][0]
        self.own = [[source.tensor(tuple(p.shape)) for m in link.latent for p in m.parameters()] for link in links]
        for link in links:
            for name, buffer in (b for m in link.latent for b in m.named_buffers()):
                if name in ("running_mean", "running_var"):
                    buffer.copy_((torch.rand(buffer.shape, generator=source.generator) + 0.3).to(self.dtype))
        flat = [self.x, *self.targets, *(t for own in (*self.parameters, *self.own) for t in own)]
        self.leaves = list({id(t): t for t in flat}.values())
        for i, t in enumerate(self.leaves):
            t.requires_grad_(bool(case.needs >> min(i, 5) & 1))
        self.snapshot = Snapshot(source.made)

    def can_be_reversed(self) -> bool:
        """Whether something is compared, and every φ fits what comes back: smaller than in the forward, if pooled."""
        if not self.targets and not any(of.compare for of, _ in zip(self.case.layers, self.links, strict=False)):
            return False
        return all(
            fm.works(below.latent, link.seen)
            for below, link, of in zip(self.links, self.links[1:], self.case.layers[1:], strict=False)
            if self.variant == "full" or of.compare
        )

    def check(self) -> str:
        try:
            ours = self.chain() if self.case.op == "tied_chain" else self.segment()
        except RuntimeError as error:  # plain PyTorch has gaps of its own in half precision
            if self.case.dtype.endswith("float16") and "not implemented" in str(error):
                return "passed over"
            raise
        self.snapshot.check()
        exactly = self.case.values == "lattice" and self.case.dtype in ("float32", "float64")
        check_close(ours, self.truth, [exact(t) for t in self.leaves], self.dtype, exact=exactly)
        return "served"

    def total(self, out: Tensor, losses: Tensor) -> Tensor | None:
        weights = torch.tensor([0.5, 1.0, 0.25][: len(losses)], dtype=losses.dtype)
        parts = [
            incoming(out, self.case.incoming, self.case.seed),
            (losses * weights).sum() if self.case.loss else None,
        ]
        given = [p for p in parts if p is not None]
        return sum(given[1:], given[0]) if given else None

    def described(self) -> tuple[list[rk.Layer], list[list[rk.Latent]], list[list[Tensor | None]]]:
        """The layers, every φ and its tensors, as the operators take them."""
        phis, tensors = [], []
        for link, own in zip(self.links, self.own, strict=True):
            modules = [copy.deepcopy(m).to(self.dtype) for m in link.latent]
            fm.set_tensors(modules, own)
            steps = [describe.latent_of(m) for m in modules]
            phis.append([s for s in steps if s is not None])
            tensors.append([t for m, s in zip(modules, steps, strict=True) for t in describe.latent_tensors(m, s)])
        first = [describe.latent_of(m) for m in self.activation]
        layers = [
            rk.Layer(describe.tied_of(link.op), describe.steps_of(link.pre, self.case.dims), tuple(below), of.compare)
            for link, below, of in zip(self.links, [first, *phis], self.case.layers, strict=False)
        ]
        return layers, phis, tensors

    def arguments(self) -> dict:
        layers, phis, tensors = self.described()
        weights = [own[0] for own in self.parameters]
        biases = [own[1] if len(own) > 1 else None for own in self.parameters]
        return dict(
            x=self.x, layers=layers, weights=weights, biases=biases, params=[t for own in tensors for t in own],
            last=phis[-1], variant=self.variant, memory=self.memory,
            backend=serving(self.case.backend, self.case.dtype),
        )  # fmt: skip

    def chain(self) -> dict[str, list[Tensor | None]]:
        report = rk.ChainReport()
        out, losses = rk.tied_chain(**self.arguments(), report=report)
        assert out.dtype == self.dtype and out.requires_grad == any(t.requires_grad for t in self.leaves)
        grads = gradients(self.total(out, losses), self.leaves)
        deferred = self.memory == "deferred" and out.requires_grad
        if self.memory == "deferred" and not deferred:
            losses = report.losses
        elif deferred and self.case.loss:
            assert not losses.any(), "a deferred loss is 0 until the backward"
            losses = report.losses
        assert losses is not None and losses.dtype == (torch.float64 if self.dtype == torch.float64 else torch.float32)
        known = {} if deferred and not self.case.loss else {"losses": [losses]}
        return {"out": [out], **known, "gradients": grads}

    def segment(self) -> dict[str, list[Tensor | None]]:
        given = self.arguments()
        layers, (*targets, y) = given["layers"], self.targets
        _, _, tensors = self.described()
        params = [t for own in tensors[:-1][::-1] for t in own]  # φ of the layers below, the highest first
        segment = rk.Segment(tuple(layers[::-1]), (), serving(self.case.backend, self.case.dtype))
        a, losses = rk.reverse_layers(
            segment, y, targets[::-1], given["weights"][::-1], given["biases"][::-1], params,
            keep=self.memory == "store",
        )  # fmt: skip
        losses = losses.flip(0)
        return {"out": [a], "losses": [losses], "gradients": gradients(self.total(a, losses), self.leaves)}

    def truth(self, leaves: list[Tensor], *, plain: bool = False) -> dict[str, list[Tensor | None]]:
        if plain:
            leaves = [t.detach().requires_grad_() for t in leaves]
        at = {id(t): leaf for t, leaf in zip(self.leaves, leaves, strict=True)}
        for link, op, own in zip(self.links, self.parameters, self.own, strict=True):
            fm.set_tensors([link.op], [at[id(t)] for t in op])
            fm.set_tensors(link.latent, [at[id(t)] for t in own])
        if self.targets:
            *d, y = [at[id(t)] for t in self.targets]
            d = [*d, y]
        else:
            d = [at[id(self.x)]]
            for link in self.links:
                d.append(fm.apply_latent(link.latent, link.op(nn.Sequential(*link.pre)(d[-1])), plain=plain))
            y = d[-1]
        losses, a = [], y
        for m in reversed(range(len(self.links))):
            link, below = self.links[m], self.links[m - 1].latent if m else self.activation
            if self.variant == "local" and not self.targets and not self.case.layers[m].compare:
                losses.append(y.new_zeros(()))  # is not run backwards, so φ need not fit what would come back
                continue
            source = y if self.variant == "full" else d[m + 1]
            a = fm.reversed_once(link.op, source, torch.Size(link.seen), below, plain=plain)
            y = fm.undone(link.pre, a, d[m].shape)
            compared = self.case.layers[m].compare
            losses.append((d[m] - y).square().sum() if compared else y.new_zeros(()))
        out, found = a if self.targets else d[-1], torch.stack(losses[::-1])
        return {"out": [out], "losses": [found], "gradients": gradients(self.total(out, found), leaves)}

    def broken(self) -> dict:
        """Arguments that have to be refused."""
        given, fault = self.arguments(), self.case.fault
        weights, x = given["weights"], self.x
        other = torch.float64 if self.dtype != torch.float64 else torch.float32
        own = nn.AvgPool2d(2, count_include_pad=False)
        counting = rk.Layer(rk.Tied((1, 1), ((0, 0),) * 2, (1, 1)), describe.steps_of([own], 2))
        image = torch.zeros(1, 1, 4, 4, dtype=self.dtype)
        changes = {
            "no layers": dict(layers=[]),
            "a weight less": dict(weights=weights[1:]),
            "a parameter more": dict(params=[*given["params"], None]),
            "integer x": dict(x=x.detach().to(torch.int64)),
            "empty batch": dict(x=x[:0] if x.dim() > 1 else x.new_empty(0, x.shape[0])),
            "channels": dict(x=torch.cat([x, x], 1 if self.case.dims else -1)),
            "deferred and full": dict(memory="deferred", variant="full"),
            "variant": dict(variant="reverse"),
            "x is a list": dict(x=[0.0]),
            "first latent takes tensors": dict(
                layers=[rk.Layer(given["layers"][0].tied, (), (rk.Activation("prelu"),)), *given["layers"][1:]]
            ),
            "scalar x": dict(x=x.new_zeros(())),
            "mixed weight": dict(weights=[weights[0].to(other), *weights[1:]]),
            "meta weight": dict(weights=[weights[0].to("meta"), *weights[1:]]),
            "a weight is a list": dict(weights=[[1.0], *weights[1:]]),
            "a bias is a list": dict(biases=[[1.0], *given["biases"][1:]]),
            "a parameter is a list": dict(
                params=[[1.0]], layers=given["layers"][:1], weights=weights[:1], biases=given["biases"][:1],
                last=[rk.Activation("prelu")],
            ),
            "counts in its own way": dict(
                x=image, layers=[counting], weights=[torch.zeros(1, 1, 1, 1, dtype=self.dtype)], biases=[None],
                params=[], last=[],
            ),
        }  # fmt: skip
        return given | changes[fault]
