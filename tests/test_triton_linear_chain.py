"""Chains and reverse layers of linear layers in the tied linear kernels: compiled for a GPU, else interpreted."""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import pairwise
from typing import Any

import oracle
import pytest
import torch
from test_linear_chain import ACTS, WAYS, Sample, make, run, total
from torch import Tensor, nn

import racecar
import racecar_kernels as rk
from racecar_kernels import Activation, Chain, chain_engines
from racecar_kernels.layer import Norm, Upsample

pytest.importorskip("triton", reason="Triton is not installed")
from launches import Launch, replace_kernels
from test_triton_training import COMPILED, WARM, captured, merely_warm, no_synchronisation, trainer

from racecar_kernels.gpu import chooser, device, linear_chain

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = "triton:fused"
ROUNDING = 2**-24  # of a loss, which is one float32 number: whichever way it falls, it is up to this far off
each_way = pytest.mark.parametrize(("variant", "memory"), WAYS)
to_measure = pytest.mark.parametrize(("variant", "memory"), [w for w in WAYS if w[1] != "recompute"])
# Widths of layers and shape of the batch: fewer features than a block, ragged ones, aligned ones, one row, tokens,
# an output too wide for one kernel in the middle, layers that are passed through alone.
SAMPLES: dict[str, dict[str, Any]] = {
    "narrow": dict(widths=(7, 4, 6), shape=(5,)),
    "aligned": dict(widths=(16, 32), shape=(48,)),
    "one row, one feature": dict(widths=(3, 1, 2), shape=(1,)),
    "vector": dict(widths=(3, 2), shape=()),
    "tokens, no bias": dict(widths=(7, 4, 6), shape=(3, 5), without=(0,)),
    "too wide for one kernel": dict(widths=(5, 130, 2), shape=(4,), acts=(("tanh", ()), None)),
    "RR^1": dict(widths=(7, 4, 6), shape=(18,), compared=1, entry=("sigmoid", ())),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched since, but for those that finish sums."""
    names: list[str] = []

    def noted(launch: Launch, kernel: Any) -> None:
        if launch.name not in ("sum_partials_kernel", "finish_sums_kernel"):
            names.append(launch.name)
        kernel[launch.grid](**launch.given, **launch.options)

    replace_kernels(monkeypatch, noted)
    return names


def made(*shape: Any, dtype: torch.dtype = torch.float32, **how: Any) -> Sample:
    """A chain on the device."""
    return make(*shape, **how).to(dtype).to(DEVICE)


def errors_of(got: list[Tensor], want: list[Tensor]) -> tuple[float, ...]:
    """Of the output, of the losses, and of all gradients together, norm-wise."""
    return tuple(oracle.error(got[part], want[part]) for part in (slice(0, 1), slice(1, 2), slice(2, None)))


def at_most_twice(ours: list[tuple[float, ...]], plain: list[tuple[float, ...]]) -> None:
    """Plain PyTorch's own error against float64, in the median of seven seeds."""
    assert len(ours) == len(plain) == 7
    medians = [[statistics.median(part) for part in zip(*errors, strict=True)] for errors in (ours, plain)]
    for own, other, least in zip(*medians, (0, ROUNDING, 0), strict=True):
        assert own <= 2 * other + least, medians


def check(variant: str, memory: str, dtype: torch.dtype, **sample: Any) -> None:
    """A chain: every result is at most twice as far off as plain PyTorch's."""
    ours, plain = [], []
    for seed in range(7):
        own = made(**sample, seed=seed, dtype=dtype)
        assert chain_engines.serving(own.chain(variant, FUSED), own.x, own.weights) is linear_chain
        exact = run(own.to(torch.float64), variant, memory, "reference")
        for errors, backend in ((ours, FUSED), (plain, "reference")):
            got = run(own, variant, memory, backend)
            assert [(t.shape, t.stride()) for t in got[2:]] == [(t.shape, t.stride()) for t in own.tensors()]
            errors.append(errors_of(got, exact))
    at_most_twice(ours, plain)


@to_measure
@pytest.mark.parametrize("name", SAMPLES)
def test_a_chain_against_float64(name: str, variant: str, memory: str) -> None:
    check(variant, memory, torch.float32, **SAMPLES[name])


@to_measure
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_against_float64(dtype: torch.dtype, variant: str, memory: str) -> None:
    check(variant, memory, dtype, widths=(21, 17, 5), shape=(37,), entry=("tanh", ()))


@pytest.mark.parametrize("variant", ["full", "local"])
def test_what_runs_again_is_the_same(variant: str) -> None:
    s = made((7, 4, 6), (2, 9), entry=("tanh", ()))
    assert all(map(torch.equal, run(s, variant, "recompute", FUSED), run(s, variant, "store", FUSED)))


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_every_activation(act: Any) -> None:
    for variant, memory in (("full", "store"), ("local", "deferred")):
        check(variant, memory, torch.float32, widths=(5, 4, 3), shape=(9,), acts=(act,), entry=act)


# ------------------------------------------------------------------------------------------- what is launched and kept

LAYERS = 3
BACK = ["grad_source_kernel", "grad_weight_kernel", "grad_input_kernel"]
ALONE = ["grad_forward_kernel", "grad_weight_kernel", "grad_input_kernel"]  # where the reverse was another layer's
REVERSE, SOURCE = ["reverse_fwd_kernel"], ["grad_source_kernel"]


@pytest.mark.parametrize(
    ("variant", "memory", "forward", "backward"),
    [
        ("local", "store", ["tied_fwd_kernel"] * LAYERS, BACK * LAYERS),
        ("local", "recompute", ["tied_fwd_kernel"] * LAYERS, (REVERSE + BACK) * LAYERS),
        ("local", "deferred", ["linear_fwd_kernel"] * LAYERS, (REVERSE + BACK) * LAYERS),
        ("full", "store", ["linear_fwd_kernel"] * LAYERS + REVERSE * LAYERS, SOURCE * 2 + BACK + ALONE * 2),
        (
            "full", "recompute", ["linear_fwd_kernel"] * LAYERS + REVERSE * LAYERS,
            REVERSE * LAYERS + SOURCE * 2 + BACK + ALONE * 2,
        ),
    ],
)  # fmt: skip
def test_what_is_launched(variant: str, memory: str, forward: list[str], backward: list[str], launched) -> None:
    s = made((7, 4, 6, 5), (18,))
    out, losses = rk.tied_chain(
        s.x, s.layers, s.weights, s.biases, last=s.last, variant=variant, memory=memory, backend=FUSED
    )
    assert launched == forward
    launched.clear()
    torch.autograd.grad(total(out, losses), s.tensors())
    assert launched == backward


@each_way
def test_what_is_kept(variant: str, memory: str) -> None:
    """d_2 .. d_n, which the network keeps anyway; under `store` one a per layer."""
    s = made((7, 4, 6, 5), (2, 9))
    *_, kept, back = torch.ops.racecar.tied_chain(*flat(s), str(s.chain(variant, FUSED)), memory)
    assert [tuple(t.shape) for t in kept] == [(18, 4), (18, 6)]
    assert [tuple(t.shape) for t in back] == ([(18, 7), (18, 4), (18, 6)] if memory == "store" else [])


def flat(s: Sample) -> tuple[Any, ...]:
    """The tensors as the operator takes them."""
    return s.x.detach(), [w.detach() for w in s.weights], [b if b is None else b.detach() for b in s.biases], []


@pytest.mark.parametrize("variant", ["full", "local"])
def test_a_gradient_that_is_not_held_gives_the_same(variant: str, monkeypatch: pytest.MonkeyPatch, launched) -> None:
    """The weight's gradient by its two uses, one after the other: only in a full reverse, and not of layer 1."""
    s = made((7, 4, 3, 2), (18,))
    want = run(s, variant, backend=FUSED)
    once = launched.count("grad_weight_kernel")
    monkeypatch.setattr(linear_chain, "MOST_HELD", 0)
    got = run(s, variant, backend=FUSED)
    assert once == 3 and launched.count("grad_weight_kernel") - once == (4 if variant == "full" else 3)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_way
def test_memory_layouts(variant: str, memory: str) -> None:
    s = made((6, 5, 4), (8, 3))
    apart = replace(
        s,
        x=s.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        weights=[w.detach().t().contiguous().t().requires_grad_() for w in s.weights],
        biases=[torch.stack([b.detach()] * 2, 1)[:, 0].requires_grad_() for b in s.biases],
    )
    got, want = run(apart, variant, memory, FUSED), run(s, variant, memory, FUSED)
    assert all(map(torch.equal, got, want))
    assert [g.stride() for g in got[2:5]] == [t.stride() for t in (apart.x, *apart.weights)]


@each_way
def test_some_gradients_alone(variant: str, memory: str) -> None:
    s = made((6, 5, 4, 3), (8,))
    want = run(s, variant, memory, FUSED, wanted=s.weights[1:])
    for t in (s.x, s.weights[0], s.biases[2]):
        t.requires_grad_(False)
    assert all(map(torch.equal, run(s, variant, memory, FUSED, wanted=s.weights[1:]), want))


@each_way
def test_one_result_of_the_two(variant: str, memory: str) -> None:
    s = made((6, 5, 4), (8,))
    for pick in (0, 1):
        found, policy = [], {"last": s.last, "variant": variant, "memory": memory}
        for backend in (FUSED, "reference"):
            ran = rk.tied_chain(s.x, s.layers, s.weights, s.biases, **policy, backend=backend)
            found.append(torch.autograd.grad(ran[pick].sum(), s.tensors()))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@each_way
def test_the_graph_may_be_used_twice(variant: str, memory: str) -> None:
    s = made((6, 5, 4), (8,))
    out, losses = rk.tied_chain(
        s.x, s.layers, s.weights, s.biases, last=s.last, variant=variant, memory=memory, backend=FUSED
    )
    first, second = (torch.autograd.grad(total(out, losses), s.tensors(), retain_graph=k) for k in (True, False))
    assert all(map(torch.equal, first, second))


# ------------------------------------------------------------------------------------------- who is asked


# what a chain of one layer launches -> the row that `bench.linear_layers` has of it
RUNS = {
    "tied_fwd_kernel": "tied", "linear_fwd_kernel": "output", "reverse_fwd_kernel": "forward",
    "grad_source_kernel": "source", "grad_weight_kernel": "both", "grad_input_kernel": "input",
}  # fmt: skip


def test_the_table_decides(monkeypatch: pytest.MonkeyPatch, launched) -> None:
    s = made((7, 4), (5,))
    for backend in ("triton", "triton:library"):
        run(s, "local", backend=backend)
        assert "tied_fwd_kernel" not in launched
    kind = chooser.linear_kind(s.x)
    for variant, passes in chooser.CHAIN_PASSES.items():
        won = frozenset(chooser.linear_class(pass_, kind, (4, 7)) for pass_ in passes)
        monkeypatch.setattr(chooser, "MEASURED", {device.of(s.x).architecture: won})
        for backend, wanted in (("triton", set(passes)), ("triton:library", set())):
            launched.clear()
            run(s, variant, backend=backend)
            assert {RUNS[name] for name in launched if name in RUNS} == wanted
        for pass_ in passes:
            left = won - {chooser.linear_class(pass_, kind, (4, 7))}
            monkeypatch.setattr(chooser, "MEASURED", {device.of(s.x).architecture: left})
            reason = linear_chain.why_not(s.chain(variant, "triton"), s.x, s.weights)
            assert f"a layer of (4, 7) was not measured to be faster ({pass_})" in str(reason)


@each_way
@pytest.mark.parametrize("backend", ["triton", FUSED])
def test_a_backward_is_computed_as_its_forward_was(
    variant: str, memory: str, backend: str, precision_of, monkeypatch: pytest.MonkeyPatch, unrecorded: None
) -> None:
    """The same engine, at the same precision, whatever PyTorch's was set to in between."""
    s, told = made((7, 4, 3), (5,)), []
    passes = chooser.CHAIN_PASSES[variant]
    names = {chooser.linear_class(pass_, "tf32", size) for pass_ in passes for size in ((4, 7), (3, 4))}
    monkeypatch.setattr(chooser, "MEASURED", {device.of(s.x).architecture: frozenset(names)})
    product = linear_chain.Backward.__init__

    def noted(self: Any, *given: Any) -> None:
        product(self, *given)
        told.append(self.tf32)

    monkeypatch.setattr(linear_chain.Backward, "__init__", noted)
    for before, after in (("tf32", "ieee"), ("ieee", "tf32")):
        precision_of("matrices", before)
        want = run(s, variant, memory, backend)
        out, losses = rk.tied_chain(
            s.x, s.layers, s.weights, s.biases, last=s.last, variant=variant, memory=memory, backend=backend
        )
        precision_of("matrices", after)
        got = torch.autograd.grad(total(out, losses), s.tensors())
        same = backend == FUSED or before == "tf32"  # else layer by layer, as PyTorch is set
        assert all(map(torch.equal, got, want[2:])) if same else all(g.isfinite().all() for g in got)
    assert told == ([True] * 2 if backend == "triton" else [True] * 2 + [False] * 2)


@pytest.mark.parametrize(
    ("layers", "last", "widths", "dtype", "backend", "reason"),
    [
        (lambda own: own, (Activation("gelu", ("none",)),), (7, 4), torch.float32, FUSED, "from its output"),
        (lambda own: own, (Norm("layer", 1e-5, shape=(2,)),), (7, 4), torch.float32, FUSED, "from its output"),
        (lambda own: own, (), (3, 2), torch.float64, FUSED, "float64"),
        (lambda own: own, (), (3, 2), torch.float32, "triton:library", "'triton:library' was asked for"),
        (lambda own: [replace(own[0], pre=(Upsample((2,)),))], (), (3, 2), torch.float32, FUSED, "not all .* linear"),
        (lambda own: [replace(own[0], compare=False)], (), (3, 2), torch.float32, FUSED, "no layer is compared"),
    ],
)
def test_what_is_not_served(layers, last, widths, dtype, backend: str, reason: str) -> None:
    s = made(widths, (4,), dtype=dtype)
    chain = Chain(tuple(layers(s.layers)), last, backend=backend)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(linear_chain.why_not(chain, s.x, s.weights))


def test_sizes_that_are_not_served() -> None:
    s = made((7, 4), (5,))
    for x in (s.x[:0], s.x[:1].expand(2**31, 7)):
        assert "1 to 2147418112 rows" in str(linear_chain.why_not(s.chain("full", FUSED), x, s.weights))


@pytest.mark.skipif(DEVICE == "cuda", reason="is the default there")
def test_on_a_cpu_it_has_to_be_asked_for() -> None:
    s = make((7, 4), (5,)).to(torch.float32)
    assert "got tensors on cpu" in str(linear_chain.why_not(s.chain(), s.x, s.weights))


# ------------------------------------------------------------------------------------------- operator and compiler


@each_way
def test_opcheck(variant: str, memory: str) -> None:
    s = made((5, 4, 3), (2, 6), without=(1,))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.racecar.tied_chain, (*flat(s), str(s.chain(variant, FUSED)), memory))


@pytest.mark.parametrize(("variant", "memory"), WAYS[:4])
def test_compiles_into_one_graph_for_any_batch(variant: str, memory: str) -> None:
    s = made((6, 5, 4), (17,))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return rk.tied_chain(
            x, s.layers, s.weights, s.biases, last=s.last, variant=variant, memory=memory, backend=FUSED
        )

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend=COMPILED)
    for rows in (17, 33):
        other = replace(s, x=torch.randn(rows, 6, device=DEVICE, requires_grad=True))
        torch._dynamo.mark_dynamic(other.x, 0)
        out, losses = compiled(other.x)
        got = [out.detach(), losses.detach(), *torch.autograd.grad(total(out, losses), other.tensors())]
        for a, b in zip(got, run(other, variant, memory, FUSED), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- wrapped networks


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(m for a, b in pairwise((7, 5, 18, 3)) for m in (nn.Linear(a, b, bias=b != 18), nn.Tanh()))
    ).to(DEVICE, dtype)


def gradients(backend: str, dtype: torch.dtype, seed: int, **policy: str) -> list[Tensor]:
    """Of the wrapped network's input and parameters."""
    net = racecar.wrap(network(dtype), 0.1, backend=backend, **policy)
    x = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_()
    (net(x).square().sum() + net.reverse_loss).backward()
    return [t.grad for t in (x, *net.parameters())]


@to_measure
def test_a_wrapped_network_against_float64(variant: str, memory: str, launched) -> None:
    errors = []
    policy = {"variant": variant, "memory": memory}
    for seed in range(7):
        want = gradients("reference", torch.float64, seed, **policy)
        found = (gradients(backend, torch.float32, seed, **policy) for backend in (FUSED, "reference"))
        errors.append([oracle.error(got, want) for got in found])
    ours, plain = map(statistics.median, zip(*errors, strict=True))
    assert ours <= 2 * plain
    assert launched.count("grad_weight_kernel") == 7 * 3


def test_the_plan_shows_it() -> None:
    for backend, way in ((FUSED, "fused tied, forward, source, weight"), ("triton", "library")):
        assert str(racecar.wrap(network(), 0.1, backend=backend).plan).count(f"{backend}, {way}") == 3


@pytest.mark.parametrize(("variant", "memory"), [("full", "store"), ("local", "deferred")])
def test_a_step_is_captured_repeats_itself_and_waits_for_nothing(variant: str, memory: str) -> None:
    found, x = [], torch.randn(9, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for capture in (captured, merely_warm, merely_warm):
        net = racecar.wrap(network(), 0.1, backend=FUSED, variant=variant, memory=memory)
        step = trainer(net, x)
        replay = capture(step, WARM)
        for lam in (0.1, 0.4):
            net.lam = lam
            replay()
        found.append([t.clone() for t in net.state_dict().values()])
        if capture is merely_warm:
            with no_synchronisation():
                step()
    assert all(torch.equal(a, b) for a, b in zip(*found[1:], strict=True))
    for got, want in zip(*found[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- a reverse layer by itself

EVERY = {"reverse_fwd_kernel", "grad_source_kernel", "grad_weight_kernel"}


def reverse_gradients(seed: int, act: Any, shape: tuple[int, ...], backend: str, dtype: torch.dtype) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    sizes = [(*shape, 5), (*shape, 7), (5, 7), (5,)]
    tensors = [
        torch.randn(size, generator=gen, dtype=torch.float64).to(DEVICE, dtype).requires_grad_() for size in sizes
    ]
    y, target, weight, bias = tensors
    own = [] if act is None else [act()]
    a, loss = rk.reverse_layer(y, target, weight, bias, latent=own, backend=backend)
    return [a.detach(), loss.detach(), *torch.autograd.grad((a * a).sum() + 0.3 * loss, tensors)]


@pytest.mark.parametrize("shape", [(18,), (2, 9)], ids=str)
@pytest.mark.parametrize("act", [None, nn.Tanh, nn.ReLU], ids=str)
def test_a_reverse_layer_against_float64(act: Any, shape: tuple[int, ...], launched) -> None:
    ours, plain = [], []
    for seed in range(7):
        want = reverse_gradients(seed, act, shape, "reference", torch.float64)
        for errors, backend in ((ours, FUSED), (plain, "reference")):
            got = reverse_gradients(seed, act, shape, backend, torch.float32)
            errors.append(errors_of(got, want))
    at_most_twice(ours, plain)
    assert set(launched) >= EVERY and launched.count("reverse_fwd_kernel") == 7


def test_a_norm_between_layers_is_left_to_the_pointwise_kernels(launched) -> None:
    """The products are fused where what they read is in memory, the norm's own passes stay."""
    net, plain = (
        racecar.wrap(
            nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).to(DEVICE), 0.1,
            backend=backend,
        )
        for backend in (FUSED, "reference")
    )  # fmt: skip
    plain.load_state_dict(net.state_dict())
    x, found = torch.randn(8, 6, device=DEVICE), []
    for own in (net, plain):
        found.append(torch.autograd.grad(own(x).square().sum() + own.reverse_loss, list(own.parameters())))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert set(launched) >= EVERY and "tied_fwd_kernel" not in launched
