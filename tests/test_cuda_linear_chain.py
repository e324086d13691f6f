"""The CUDA kernels for chains of linear layers against float64: on a GPU, and their source on the CPU."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import cuda_chain
import pytest
import torch
from cuda_host import ALONE, LAST_FIRST, threads
from test_linear_chain import (
    ACTS,
    MLP,
    WAYS,
    Sample,
    assert_finite_alike,
    infinite_where_nothing_is_compared,
    make,
    run,
    total,
)
from torch import Tensor

import racecar_kernels as rk
from racecar_kernels import Activation, Chain, chain_engines
from racecar_kernels.cuda import linear_chain
from racecar_kernels.layer import Norm, Upsample

pytestmark = pytest.mark.usefixtures("poisoned")
ON_CPU = pytest.mark.parametrize("device", ["cpu"], indirect=True)
EVERYWHERE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
each_way = pytest.mark.parametrize(("variant", "memory"), WAYS)
SEEDS = range(7)
FLOOR = 2.0**-24  # one rounding of a float32 number: plain PyTorch's error counts as no less, by luck, in a loss
CASES: dict[str, dict[str, Any]] = {
    "one layer": dict(widths=(3, 1), shape=(1,)),
    "vector": dict(widths=(3, 2), shape=()),
    "two rows": dict(widths=(1, 7, 3), shape=(2,), acts=(("softsign", ()),)),
    "tokens": dict(widths=(7, 4, 6, 3), shape=(3, 2, 5), without=(0,)),
    "no bias": dict(widths=(12, 1, 5), shape=(9,), without=(0, 1)),
    "four layers": dict(widths=(12, 7, 64, 3, 1), shape=(65,), acts=(("tanh", ()), None, ("elu", (0.8,)))),
    "five layers": dict(widths=(4, 8, 12, 16, 4, 8), shape=(64,), entry=("sigmoid", ())),
    "mlp": dict(shape=(512,)),
    "RR^2": dict(shape=(65,), compared=2, entry=("tanh", ())),
    "wide": dict(widths=(64, 33, 64), shape=(65,)),
}


@pytest.fixture
def host() -> cuda_chain.Host:
    return cuda_chain.Host()


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, host: cuda_chain.Host) -> Iterator[str]:
    linear_chain._compiled.cache_clear()
    if request.param == "cpu":
        monkeypatch.setattr(linear_chain, "DEVICES", ["cuda", "cpu"])
        monkeypatch.setattr(linear_chain, "_module", lambda: host)
    else:
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    yield request.param
    linear_chain._compiled.cache_clear()


def ours(s: Sample, variant: str = "full", memory: str = "store", **how: Any) -> list[Tensor]:
    assert chain_engines.serving(s.chain(variant, "cuda"), s.x, s.weights) is linear_chain
    return run(s, variant, memory, "cuda", **how)


def made(device: str, *shape: Any, dtype: torch.dtype = torch.float32, **how: Any) -> Sample:
    return make(*shape, **how).to(dtype).to(device)


def errors(got: list[Tensor], want: list[Tensor], layers: int) -> list[float]:
    """Of the output, the losses, and the gradients of x, of all weights and of all biases; norm-wise."""
    assert all(torch.isfinite(g).all() for g in got), "not everything was written"
    parts = [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 3 + layers), slice(3 + layers, None)]
    found = []
    for part in parts:
        off = sum(float((a.double() - b).square().sum()) for a, b in zip(got[part], want[part], strict=True))
        size = sum(float(b.square().sum()) for b in want[part])
        found.append((off / size) ** 0.5 if size else off**0.5)
    return found


def check(device: str, variant: str, memory: str, dtype: torch.dtype, **sample: Any) -> None:
    """At most twice plain PyTorch's own error against float64, in the median of seeds."""
    both: tuple[list[list[float]], list[list[float]]] = ([], [])
    for seed in SEEDS:
        s = made(device, **sample, seed=seed, dtype=dtype)
        exact = run(s.to(torch.float64), variant, memory, "reference")
        for column, got in zip(both, (ours(s, variant, memory), run(s, variant, memory, "reference")), strict=True):
            assert [(g.shape, g.dtype, g.stride()) for g in got[2:]] == [
                (t.shape, t.dtype, t.stride()) for t in s.tensors()
            ]
            column.append(errors(got, exact, len(s.weights)))
    medians = [list(map(median, zip(*column, strict=True))) for column in both]
    for own, other in zip(*medians, strict=True):
        assert own <= 2 * max(other, FLOOR), medians


@EVERYWHERE
@each_way
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, variant: str, memory: str, device: str) -> None:
    check(device, variant, memory, torch.float32, **CASES[name])


@EVERYWHERE
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_every_activation(act: Any, device: str) -> None:
    for variant, memory in (("full", "store"), ("local", "deferred")):
        check(device, variant, memory, torch.float32, widths=(5, 4, 3), shape=(9,), acts=(act,), entry=act)


@EVERYWHERE
@each_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, variant: str, memory: str, device: str) -> None:
    check(device, variant, memory, dtype, widths=(21, 17, 5), shape=(65,), entry=("tanh", ()))


@EVERYWHERE
@pytest.mark.parametrize("act", [("hardtanh", (-0.3, 0.7)), ("relu6", ()), ("selu", ())], ids=str)
def test_bounds_in_half_precision(act: Any, device: str) -> None:
    """A clamp's bounds are rounded as its results are: the derivative compares them."""
    check(device, "full", "store", torch.bfloat16, widths=(9, 8, 7), shape=(33,), acts=(act,), entry=act)


@EVERYWHERE
@pytest.mark.parametrize("variant", ["full", "local"])
def test_what_runs_again_is_the_same(variant: str, device: str) -> None:
    s = made(device, shape=(70,), entry=("tanh", ()))
    assert all(map(torch.equal, ours(s, variant, "recompute"), ours(s, variant, "store")))


@EVERYWHERE
@pytest.mark.parametrize("variant", ["full", "local"])
def test_several_tiles_for_a_block_and_a_ragged_last_one(variant: str, device: str, host: cuda_chain.Host) -> None:
    """More rows than the largest tiles (64) of as many blocks as run at a time (4 on a multiprocessor) have."""
    on_gpu = device == "cuda" and torch.cuda.get_device_properties(0).multi_processor_count
    rows = 64 * 4 * (on_gpu or host.multiprocessors) + 5
    s = made(device, (6, 5, 3), (rows,), entry=("tanh", ()))
    first = ours(s, variant, "recompute")
    assert all(map(torch.equal, ours(s, variant, "store"), first)) and all(torch.isfinite(t).all() for t in first)
    assert all(each > 1 and rows % tile for tile, _, each in host.cuts)


@EVERYWHERE
@each_way
def test_some_gradients_alone(variant: str, memory: str, device: str) -> None:
    s = made(device, shape=(30,))
    wanted = [s.weights[1], s.weights[4], s.biases[3]]
    want = ours(s, variant, memory, wanted=wanted)
    for t in s.tensors():
        t.requires_grad_(any(t is w for w in wanted))
    assert all(map(torch.equal, ours(s, variant, memory, wanted=wanted), want))


@EVERYWHERE
@each_way
def test_one_result_of_the_two(variant: str, memory: str, device: str) -> None:
    s = made(device, (6, 5, 4), (18,))
    for pick in (0, 1):
        found, policy = [], {"last": s.last, "variant": variant, "memory": memory}
        for backend in ("cuda", "reference"):
            ran = rk.tied_chain(s.x, s.layers, s.weights, s.biases, **policy, backend=backend)
            found.append(torch.autograd.grad(ran[pick].sum(), s.tensors()))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@EVERYWHERE
@each_way
def test_memory_layouts(variant: str, memory: str, device: str) -> None:
    s = made(device, (6, 5, 4), (8, 3))
    apart = replace(
        s,
        x=s.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        weights=[w.detach().t().contiguous().t().requires_grad_() for w in s.weights],
        biases=[torch.stack([b.detach()] * 2, 1)[:, 0].requires_grad_() for b in s.biases],
    )
    got, want = ours(apart, variant, memory), ours(s, variant, memory)
    assert all(map(torch.equal, got, want))
    assert [g.stride() for g in got[2:5]] == [t.stride() for t in (apart.x, *apart.weights)]


@EVERYWHERE
@each_way
def test_the_graph_may_be_used_twice(variant: str, memory: str, device: str) -> None:
    s = made(device, (6, 5, 4), (8,))
    out, losses = rk.tied_chain(
        s.x, s.layers, s.weights, s.biases, last=s.last, variant=variant, memory=memory, backend="cuda"
    )
    first, second = (torch.autograd.grad(total(out, losses), s.tensors(), retain_graph=k) for k in (True, False))
    assert all(map(torch.equal, first, second))


@EVERYWHERE
@each_way
def test_what_is_kept(variant: str, memory: str, device: str) -> None:
    s = made(device, (7, 4, 6, 5), (2, 9), compared=2)
    chain, weights = s.chain(variant, "cuda"), [w.detach() for w in s.weights]
    *_, d, a = linear_chain.forward(str(chain), s.x.detach(), weights, [b.detach() for b in s.biases], memory)
    told = linear_chain.fake_kept(chain, s.x, weights, memory)
    sizes = [[tuple(t.shape) for t in part] for part in (d, a)]
    a_features = 17 if variant == "full" else 11
    assert sizes == [[tuple(t.shape) for t in part] for part in told]
    assert sizes == ([[(18, 10)], [(18, a_features)]] if memory == "store" else [[], []])


@EVERYWHERE
def test_nan_and_infinity_stay_in_their_row(device: str) -> None:
    s = made(device, (6, 5, 4), (20,))
    want = ours(s)[0]
    with torch.no_grad():
        s.x[3, 1], s.x[7, 2] = float("nan"), float("inf")
    ran = run(s, backend="reference")[0]
    got, rest = ours(s)[0], [r for r in range(20) if r not in (3, 7)]
    assert torch.equal(got[rest], want[rest])
    assert got[3].isnan().all() and torch.equal(got[7].isnan(), ran[7].isnan())


@EVERYWHERE
@each_way
def test_a_layer_without_a_loss_spreads_no_infinity(variant: str, memory: str, device: str) -> None:
    s = infinite_where_nothing_is_compared().to(torch.float32).to(device)
    assert_finite_alike(ours(s, variant, memory), run(s, variant, memory, "reference"))


# ------------------------------------------------------------------------------------------- how a launch is cut


def test_both_sides_lay_the_parameters_out_alike() -> None:
    assert cuda_chain.library().size_of_parameters() == ctypes.sizeof(cuda_chain.Params) <= 4096


@ON_CPU
@pytest.mark.parametrize(
    ("multiprocessors", "cut"), [(132, (8, 64, 1)), (20, (16, 32, 1)), (8, (64, 8, 1)), (1, (64, 1, 8))]
)
def test_rows_are_spread_before_tiles_grow(
    multiprocessors: int, cut: tuple[int, int, int], device: str, host: cuda_chain.Host
) -> None:
    """The paper's MLP at its batch of 512; however it is cut, what comes out is right."""
    host.multiprocessors = multiprocessors
    host.limit = 70 * 1024  # one such block at a time
    check(device, "full", "store", torch.float32, **CASES["mlp"])
    assert set(host.cuts) == {cut}


@ON_CPU
@each_way
def test_one_block_does_all_where_there_is_no_memory_for_more(
    variant: str, memory: str, device: str, host: cuda_chain.Host
) -> None:
    host.one_block = True
    check(device, variant, memory, torch.float32, **CASES["RR^2"])
    check(device, variant, memory, torch.float32, **CASES["mlp"])
    assert {blocks for _, blocks, _ in host.cuts} == {1} and max(host.cuts)[2] > 1


@ON_CPU
@each_way
@pytest.mark.parametrize(
    ("name", "order"), [("tokens", ALONE), ("RR^2", ALONE), ("four layers", LAST_FIRST), ("mlp", LAST_FIRST)]
)
def test_no_thread_waits_for_another_within_a_step(
    name: str, order: int, variant: str, memory: str, device: str
) -> None:
    s = made(device, **CASES[name])
    first = ours(s, variant, memory)
    with threads(cuda_chain.library(), order):
        assert all(map(torch.equal, ours(s, variant, memory), first))


# ------------------------------------------------------------------------------------------- who is served


@ON_CPU
@pytest.mark.parametrize(
    ("layers", "last", "widths", "dtype", "backend", "reason"),
    [
        (lambda own: own, (Activation("gelu", ("none",)),), (7, 4), torch.float32, "cuda", "from its output"),
        (lambda own: own, (Norm("layer", 1e-5, shape=(2,)),), (7, 4), torch.float32, "cuda", "from its output"),
        (lambda own: own, (), (3, 2), torch.float64, "cuda", "float64"),
        (lambda own: own, (), (3, 2), torch.float32, "triton", "'triton' was asked for"),
        (lambda own: own, (), (3, 513), torch.float32, "cuda", "1 to 512 features are served, got 4 and 3, 513"),
        (lambda own: own, (), (2,) * 18, torch.float32, "cuda", "1 to 16 layers are served, got 17"),
        (lambda own: own, (), (200, 200), torch.float32, "cuda", "need 2[0-9]{5} bytes .*, a block has 101376"),
        (lambda own: [replace(own[0], pre=(Upsample((2,)),))], (), (3, 2), torch.float32, "cuda", "not all .* linear"),
        (lambda own: [replace(own[0], compare=False)], (), (3, 2), torch.float32, "cuda", "no layer is compared"),
    ],
)
def test_what_is_not_served(layers, last, widths, dtype, backend: str, reason: str, device: str) -> None:
    s = made(device, widths, (4,), dtype=dtype)
    chain = Chain(tuple(layers(s.layers)), last, backend=backend)
    assert re.search(reason, str(linear_chain.why_not(chain, s.x, s.weights)))


@ON_CPU
def test_what_fits_depends_on_the_gpu(device: str, host: cuda_chain.Host) -> None:
    s = made(device, (64,) * 6, (4,))
    fits = {}
    for architecture, kilobytes in {"sm_86": 99, "sm_80": 163, "sm_90": 227}.items():
        host.limit = kilobytes * 1024
        fits[architecture] = linear_chain.why_not(s.chain("full", "cuda"), s.x, s.weights) is None
    assert fits == {"sm_86": False, "sm_80": True, "sm_90": True}


@ON_CPU
def test_it_is_not_chosen_before_it_was_measured(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    s = made(device, MLP, (4,))
    assert "not measured to be the fastest on sm_90" in str(linear_chain.why_not(s.chain(), s.x, s.weights))
    monkeypatch.setattr(linear_chain, "MEASURED", {(9, 0): 12})
    assert linear_chain.why_not(s.chain(), s.x, s.weights) is None
    monkeypatch.setattr(linear_chain, "MEASURED", {(9, 0): 11})
    assert "not measured" in str(linear_chain.why_not(s.chain(), s.x, s.weights))


def test_without_a_gpu() -> None:
    s = make((7, 4), (5,)).to(torch.float32)
    assert "run on NVIDIA GPUs, got tensors on cpu" in str(
        linear_chain.why_not(s.chain("full", "cuda"), s.x, s.weights)
    )


# ------------------------------------------------------------------------------------------- operator and compiler


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@each_way
def test_opcheck(variant: str, memory: str, device: str) -> None:
    s = made(device, (5, 4, 3), (2, 6), without=(1,))
    tensors = [w.detach() for w in s.weights], [b if b is None else b.detach() for b in s.biases], []
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.racecar.tied_chain, (s.x.detach(), *tensors, str(s.chain(variant, "cuda")), memory)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize(("variant", "memory"), WAYS[:4])
def test_compiles_into_one_graph(variant: str, memory: str, device: str) -> None:
    s = made(device, (6, 5, 4), (17,))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return rk.tied_chain(
            x, s.layers, s.weights, s.biases, last=s.last, variant=variant, memory=memory, backend="cuda"
        )

    torch._dynamo.reset()
    out, losses = torch.compile(forward, fullgraph=True)(s.x)
    got = [out.detach(), losses.detach(), *torch.autograd.grad(total(out, losses), s.tensors())]
    assert all(map(torch.equal, got, ours(s, variant, memory)))
