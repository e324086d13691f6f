"""Chains of narrow linear layers: the C++ kernels, on every level of SIMD instructions here, against plain PyTorch."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import racecar
import racecar_kernels as rk
from racecar_kernels import Activation, Chain, Layer, Tied, extension, linear_chain
from racecar_kernels.layer import Norm, Upsample

C = extension.load()
LEVELS = C.simd_levels() if C is not None else ["none"]
MLP = (12, 10, 7, 5, 4, 3, 2)
ACTS = [
    None, ("relu", ()), ("relu6", ()), ("hardtanh", (-0.5, 0.7)), ("leaky_relu", (0.1,)), ("elu", (0.8,)), ("selu", ()),
    ("celu", (2.0,)), ("tanh", ()), ("sigmoid", ()), ("softsign", ()),
]  # fmt: skip
WAYS = [("full", "store"), ("full", "recompute"), ("local", "store"), ("local", "recompute"), ("local", "deferred")]

each_level = pytest.mark.parametrize("level", LEVELS)
each_way = pytest.mark.parametrize(("variant", "memory"), WAYS)
pytestmark = [
    pytest.mark.skipif(C is None, reason=str(extension.why_not())),
    pytest.mark.usefixtures("poisoned", "_level_again"),
]


@pytest.fixture
def _level_again():
    best, threads = C.simd_level(), torch.get_num_threads()
    yield
    C.set_simd_level(best)
    torch.set_num_threads(threads)


@dataclass
class Sample:
    """A chain with its tensors."""

    layers: list[Layer]
    last: tuple[Activation, ...]
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]

    def to(self, where: torch.dtype | str) -> Sample:
        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(where).requires_grad_()

        return replace(self, x=cast(self.x), weights=[*map(cast, self.weights)], biases=[*map(cast, self.biases)])

    def tensors(self) -> list[Tensor]:
        return [self.x, *self.weights, *(b for b in self.biases if b is not None)]

    def chain(self, variant: str = "full", backend: str | None = None) -> Chain:
        return Chain(tuple(self.layers), self.last, variant == "full", backend)


def make(widths=MLP, shape=(17,), acts=(("tanh", ()),), entry=None, compared=None, without=(), seed=0) -> Sample:
    """`acts` take turns behind the layers; `entry` acts on the reconstructed input; `without`: layers with no bias."""
    gen = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=gen, dtype=torch.float64)

    own = [(Activation(*act),) if act is not None else () for act in acts]
    latents = [own[m % len(own)] for m in range(len(widths) - 1)]
    first = () if entry is None else (Activation(*entry),)
    layers = [
        Layer(Tied(), (), latent, compare=compared is None or m < compared)
        for m, latent in enumerate([first, *latents[:-1]])
    ]
    weights = [random(b, a) / a**0.5 for a, b in pairwise(widths)]
    biases = [None if m in without else random(b) / 2 for m, b in enumerate(widths[1:])]
    return Sample(layers, latents[-1], random(*shape, widths[0]), weights, biases).to(torch.float64)


def run(sample: Sample, variant="full", memory="store", backend=None, wanted=None) -> list[Tensor]:
    """Output, losses and gradients."""
    report = rk.ChainReport()
    out, losses = rk.tied_chain(
        sample.x, sample.layers, sample.weights, sample.biases, last=sample.last, variant=variant, memory=memory,
        backend=backend, report=report,
    )  # fmt: skip
    grads = torch.autograd.grad(total(out, losses), wanted or sample.tensors())
    return [out.detach(), (report.losses if memory == "deferred" else losses).detach(), *grads]


def total(out: Tensor, losses: Tensor) -> Tensor:
    g = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    shares = torch.linspace(0.2, 0.9, len(losses), dtype=losses.dtype, device=losses.device)
    return (out * g).sum() + (losses * shares).sum()


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        scale = float(theirs.norm()) + 1e-300
        assert float((ours - theirs).norm()) / scale < 1e-12


def infinite_where_nothing_is_compared() -> Sample:
    """The first layer has no loss; a sigmoid makes one infinite number of x finite again."""
    s = make((6, 5, 4), (20,), acts=(("sigmoid", ()),))
    s.layers[0] = replace(s.layers[0], compare=False)
    with torch.no_grad():
        s.x[7, 2] = float("inf")
    return s


def assert_finite_alike(got: list[Tensor], want: list[Tensor]) -> None:
    """And some of it is finite at all."""
    assert [torch.isfinite(g).tolist() for g in got] == [torch.isfinite(w).tolist() for w in want]
    assert all(torch.isfinite(g).any() for g in want) and not all(torch.isfinite(g).all() for g in want)


def assert_served(sample: Sample) -> None:
    assert linear_chain.why_not(sample.chain(), sample.x, sample.weights) is None


@each_level
@each_way
@pytest.mark.parametrize(
    "sample",
    [
        dict(),
        dict(shape=(1,)),
        dict(shape=(64,), entry=("sigmoid", ())),
        dict(shape=(3, 2, 5), widths=(7, 4, 6), without=(0,)),
        dict(shape=(), widths=(3, 2)),
        dict(shape=(1000,), compared=2),
        dict(shape=(512,), widths=(64, 33, 1, 50, 64), acts=(("tanh", ()), None, ("relu", ()))),
    ],
    ids=["mlp", "one row", "whole block", "tokens", "vector", "RR^2", "wide"],
)
def test_equals_the_plain_chain(sample, variant, memory, level):
    C.set_simd_level(level)
    sample = make(**sample)
    assert_served(sample)
    assert_same(run(sample, variant, memory), run(sample, variant, memory, "reference"))


@each_level
@each_way
def test_a_layer_without_a_loss_spreads_no_infinity(variant, memory, level):
    C.set_simd_level(level)
    s = infinite_where_nothing_is_compared()
    assert_served(s)
    assert_finite_alike(run(s, variant, memory), run(s, variant, memory, "reference"))


@each_level
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_every_activation(act, level):
    C.set_simd_level(level)
    for variant, memory in (("full", "store"), ("local", "deferred")):
        sample = make((5, 4, 3), (9,), (act,), entry=act)
        assert_same(run(sample, variant, memory), run(sample, variant, memory, "reference"))


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_way
def test_no_less_exact_than_plain_pytorch(variant, memory, dtype, level):
    """At most twice plain PyTorch's own error against float64, norm-wise, median of seven seeds."""
    C.set_simd_level(level)
    ours, plain = [], []
    for seed in range(7):
        narrow = make(shape=(200,), entry=("tanh", ()), seed=seed).to(dtype)
        exact = run(narrow.to(torch.float64), variant, memory, "reference")
        for errors, backend in ((ours, None), (plain, "reference")):
            errors.append([_error(a, b) for a, b in zip(run(narrow, variant, memory, backend), exact, strict=True)])
    for mine, theirs in zip(zip(*ours, strict=True), zip(*plain, strict=True), strict=True):
        assert statistics.median(mine) <= 2 * statistics.median(theirs) + torch.finfo(dtype).eps / 16


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype, level):
    C.set_simd_level(level)
    for widths, rows in ((MLP, 5000), ((64, 48, 64), 1500)):
        sample = make(widths, (rows,)).to(dtype)
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run(sample, "full", "recompute"))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@each_way
def test_memory_layouts(variant, memory):
    sample = make((6, 5, 4), (8, 3))
    want = run(sample, variant, memory, "reference")
    strided = replace(
        sample,
        x=sample.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        weights=[w.detach().t().contiguous().t().requires_grad_() for w in sample.weights],
        biases=[torch.stack([b.detach()] * 2, 1)[:, 0].requires_grad_() for b in sample.biases],
    )
    got = run(strided, variant, memory)
    assert_same(got, want)
    assert [g.stride() for g in got[3:5]] == [w.stride() for w in strided.weights]


@each_way
def test_some_gradients_alone(variant, memory):
    sample = make()
    want = run(sample, variant, memory, "reference", wanted=sample.weights[1:])
    for t in (sample.x, sample.weights[0], sample.biases[2]):
        t.requires_grad_(False)
    assert_same(run(sample, variant, memory, wanted=sample.weights[1:]), want)


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_one_gradient_of_the_two(memory):
    sample = make()
    for pick in (0, 1):

        def of(backend: str | None, pick: int = pick) -> list[Tensor]:
            found = rk.tied_chain(
                sample.x, sample.layers, sample.weights, sample.biases, last=sample.last, memory=memory, backend=backend
            )
            return list(torch.autograd.grad(found[pick].sum(), sample.tensors()))

        assert_same(of(None), of("reference"))


@each_way
def test_the_graph_may_be_used_twice_and_then_is_gone(variant, memory):
    sample = make()
    out, losses = rk.tied_chain(
        sample.x, sample.layers, sample.weights, sample.biases, last=sample.last, variant=variant, memory=memory
    )
    loss = total(out, losses)
    first, second = (torch.autograd.grad(loss, sample.tensors(), retain_graph=keep) for keep in (True, False))
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, sample.tensors())


def test_compiles_for_any_batch():
    sample = make()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return rk.tied_chain(x, sample.layers, sample.weights, sample.biases, last=sample.last)

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for rows in (17, 33):
        other = replace(sample, x=torch.randn(rows, 12, dtype=torch.float64, requires_grad=True))
        torch._dynamo.mark_dynamic(other.x, 0)
        out, losses = compiled(other.x)
        grads = torch.autograd.grad(total(out, losses), other.tensors())
        assert_same([out.detach(), losses.detach(), *grads], run(other))


def test_a_weight_changed_in_between_is_noticed():
    sample = make()
    out, losses = rk.tied_chain(sample.x, sample.layers, sample.weights, sample.biases, last=sample.last)
    with torch.no_grad():
        sample.weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total(out, losses).backward()


def test_second_derivatives_are_refused():
    sample = make()
    out, losses = rk.tied_chain(sample.x, sample.layers, sample.weights, sample.biases, last=sample.last)
    (g,) = torch.autograd.grad(total(out, losses), [sample.x], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        g.sum().backward()


def test_batched_gradients_are_refused():
    sample = make()
    out, _ = rk.tied_chain(sample.x, sample.layers, sample.weights, sample.biases, last=sample.last)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.grad(out, sample.weights, torch.ones(3, *out.shape, dtype=out.dtype), is_grads_batched=True)


def test_without_gradient_the_losses_are_known_at_once():
    sample, report = make(), rk.ChainReport()
    with torch.no_grad():
        out, losses = rk.tied_chain(
            sample.x, sample.layers, sample.weights, sample.biases, last=sample.last, variant="local",
            memory="deferred", report=report,
        )  # fmt: skip
    want = run(sample, "local", "store", "reference")
    assert_same([out, losses, report.losses], [want[0], want[1], want[1]])


@each_way
def test_the_operator_gives_what_the_node_gives(variant, memory):
    """Modes and compilers see the operator, everybody else runs past it."""
    sample = make()
    text = str(sample.chain(variant))
    out, losses, _, kept, back = torch.ops.racecar.tied_chain(
        sample.x.detach(), [w.detach() for w in sample.weights], [b.detach() for b in sample.biases], [], text, memory
    )
    got = run(sample, variant, memory)
    assert torch.equal(out, got[0]) and (memory == "deferred" or torch.equal(losses, got[1]))
    assert len(kept) == len(back) == (1 if memory == "store" else 0)
    grad_losses = torch.linspace(0.2, 0.9, len(losses), dtype=losses.dtype)
    *grads, found = torch.ops.racecar.tied_chain_backward(
        torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out), grad_losses, sample.x, sample.weights,
        sample.biases, [], out, [], kept, back, text, [True] * len(sample.tensors()),
    )  # fmt: skip
    assert all(map(torch.equal, grads, got[2:]))
    assert memory == "store" or variant == "full" or torch.equal(found, got[1])


@each_way
def test_opcheck(variant, memory):
    sample = make((5, 4, 3), (2, 6), without=(1,))
    tensors = [t.detach() for t in sample.weights], [None if b is None else b.detach() for b in sample.biases]
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.racecar.tied_chain, (sample.x.detach(), *tensors, [], str(sample.chain(variant)), memory)
        )


@pytest.mark.parametrize(("variant", "memory"), WAYS[:4])
def test_compiles_into_one_graph(variant, memory):
    sample = make()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return rk.tied_chain(
            x, sample.layers, sample.weights, sample.biases, last=sample.last, variant=variant, memory=memory
        )

    torch._dynamo.reset()
    out, losses = torch.compile(forward, fullgraph=True, backend="aot_eager")(sample.x)
    grads = torch.autograd.grad(total(out, losses), sample.tensors())
    assert_same([out.detach(), losses.detach(), *grads], run(sample, variant, memory))


@pytest.mark.parametrize(
    ("layers", "last", "widths", "dtype", "reason"),
    [
        (lambda own: own, (Activation("gelu", ("none",)),), MLP, torch.float64, "differentiated from its output"),
        (lambda own: own, (Norm("layer", 1e-5, shape=(2,)),), MLP, torch.float64, "differentiated from its output"),
        (lambda own: own, (), (3, 65), torch.float64, "a layer has 65 features"),
        (lambda own: own, (), (3, 2), torch.float16, "float16"),
        (lambda own: [replace(own[0], pre=(Upsample((2,)),))], (), (3, 2), torch.float64, "not all .* linear"),
    ],
)
def test_what_is_not_served(layers, last, widths, dtype, reason):
    sample = make(widths, (4,)).to(dtype)
    chain = Chain(tuple(layers(sample.layers)), last)
    assert re.search(reason, str(linear_chain.why_not(chain, sample.x, sample.weights)))


def test_a_forced_reference_stays_the_reference(monkeypatch):
    sample = make()
    monkeypatch.setattr(C, "LinearChain", None)  # nobody may ask for one
    linear_chain._compiled.cache_clear()
    run(sample, backend="reference")
    assert "'reference' was asked for" in str(
        linear_chain.why_not(sample.chain(backend="reference"), sample.x, sample.weights)
    )
    linear_chain._compiled.cache_clear()


def test_a_wrapped_network_trains_through_it():
    """Gradients of a wrapped MLP against its hooks', and a kept amount below plain training's."""
    from racecar.measure import kept_bytes

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(m for a, b in pairwise(MLP) for m in (nn.Linear(a, b), nn.Tanh())))

    x, plain = torch.randn(512, 12), network()
    one, hooked = (racecar.wrap(network(), lam=0.1, memory="recompute") for _ in range(2))
    hooked[4].register_forward_hook(lambda *_: None)
    for net in (one, hooked):
        (net(x).square().mean() + net.reverse_loss).backward()
    assert "TiedLinearChain" in one(x).grad_fn.name() and "TiedLinearChain" not in hooked(x).grad_fn.name()
    for a, b in zip(one.parameters(), hooked.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    least = kept_bytes(lambda: plain(x).sum(), plain.parameters())
    assert kept_bytes(lambda: one(x).sum() + one.reverse_loss, one.parameters()) < least / 2
