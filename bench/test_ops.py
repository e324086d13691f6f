"""`make bench-ops`: single reverse layers and whole chains, forward and backward, by pytest-benchmark.

The cases are those of the tests (`tests/cases.py`, `tests/chains.py`) and the networks of `racecar bench`. One group
per case: plain PyTorch where it serves the case, and every backend that does. Before a time is taken, the gradients are
held in float64 against the definition in `tests/oracle.py`. ARGS="-k MNIST" takes some of the cases.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import chains
import oracle
import pytest
import torch
from cases import CASES, REALISTIC, Case, Sample, make
from torch import Tensor, nn

import racecar_kernels as rk
from racecar.bench import plain
from racecar.bench.networks import NETWORKS
from racecar.plan import plan_chain
from racecar_kernels import describe

PLAIN = "plain PyTorch"
EXACT = 1e-9
NAMES = [name for name, network in NETWORKS.items() if "full" in network.variants]
POLICIES = [("full", "store"), ("full", "recompute"), ("local", "store"), ("local", "recompute"), ("local", "deferred")]

Run = Callable[[], tuple[Tensor, Tensor]]


def backward(run: Run, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """One forward and backward pass; the gradient reaches the result as well as the loss."""

    def both() -> list[Tensor]:
        a, loss = run()
        return list(torch.autograd.grad(loss + 0.5 * a.square().sum(), tensors))

    return both


# ------------------------------------------------------------------------------------------- one reverse layer


def plain_layer(sample: Sample) -> Run:
    """`reverse_layer` as an expert writes it in plain PyTorch."""
    seen = oracle.shapes_through(sample.pre, sample.target.shape)
    given = sample.op(torch.zeros(seen[-1], dtype=sample.target.dtype)).shape
    above = oracle.shapes_through(sample.undo, given)
    layers = [plain.Layer(nn.Identity(), latent=sample.latent), plain.Layer(sample.op, pre=sample.pre)]

    def run() -> tuple[Tensor, Tensor]:
        y = plain.undo(sample.undo, sample.y, above)
        a = plain.run_back(layers, 1, y, seen, None)
        return a, plain.l2(plain.undo(sample.pre, a, seen), sample.target)

    return run


def our_layer(sample: Sample, backend: str) -> Run:
    op = sample.op
    return lambda: rk.reverse_layer(
        sample.y, sample.target, op.weight, op.bias, backend=backend, **sample.settings
    )  # fmt: skip


def prepared(case: Case, who: str, dtype: torch.dtype) -> tuple[Run, Sample]:
    sample = make(case, dtype, layout=torch.channels_last if len(case.shape) == 4 else None)
    if who == PLAIN:
        return plain_layer(sample), sample
    latent = [describe.latent_of(module) for module in sample.latent]
    pre = describe.steps_of(sample.pre, describe.tied_of(sample.op).dims)
    layer = rk.Layer(describe.tied_of(sample.op), pre, tuple(step for step in latent if step is not None))
    reason = rk.why_not(who, rk.Query(layer, "cpu", dtype))
    if reason is not None:
        pytest.skip(reason)
    return our_layer(sample, who), sample


@pytest.mark.parametrize("who", [PLAIN, *rk.backends()])
@pytest.mark.parametrize("case", [*CASES, *REALISTIC], ids=lambda c: c.name)
def test_reverse_layer(benchmark: Any, case: Case, who: str) -> None:
    try:
        run, sample = prepared(case, who, torch.float64)
        got = backward(run, sample.tensors)()
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    want = backward(lambda: oracle.reverse_layer(sample), sample.tensors)()
    assert oracle.error(got, want) < EXACT, f"{who} is wrong; no time is taken"
    run, sample = prepared(case, who, torch.float32)
    benchmark.group = f"reverse layer: {case.name}"
    benchmark(backward(run, sample.tensors))


# ------------------------------------------------------------------------------------------- a whole chain


def built(name: str, dtype: torch.dtype) -> tuple[nn.Sequential, Tensor]:
    """One of the tests' chains, or a network of `racecar bench` with its own batch."""
    torch.manual_seed(0)
    if name in chains.CHAINS:
        sample = chains.make(name, dtype, last=True)
        return sample.modules, sample.x
    network = NETWORKS[name]
    net, x = network.model(), network.inputs(network.batch)
    assert isinstance(net, nn.Sequential)
    return net.to(dtype), x.to(dtype).requires_grad_()


def our_chain(modules: nn.Sequential, x: Tensor, variant: str, memory: str, backend: str) -> Callable[[], list[Tensor]]:
    sample = chains.describe_chain(modules, x)
    tensors = [x, *modules.parameters()]

    def run() -> list[Tensor]:
        settings = dict(last=sample.last, variant=variant, memory=memory, backend=backend)
        out, losses = rk.tied_chain(*sample.arguments, **settings)
        return list(torch.autograd.grad(0.5 * out.square().sum() + losses.sum() / 2, tensors))

    return run


def plain_chain(modules: nn.Sequential, x: Tensor, variant: str) -> Callable[[], list[Tensor]]:
    tensors = [x, *modules.parameters()]

    def run() -> list[Tensor]:
        out, losses = plain.forward_and_losses(modules, x, variant)
        return list(torch.autograd.grad(0.5 * out.square().sum() + torch.stack(losses).sum(), tensors))

    return run


def true_chain(modules: nn.Sequential, x: Tensor, variant: str) -> list[Tensor]:
    """By the definition."""
    plan = plan_chain(modules)
    last = plan.order[plan.order.index(plan.layers[-1].op) + 1 :]
    latents = [*(list(layer.latent) for layer in plan.layers[1:]), last]
    layers = [(list(layer.pre), layer.op, own) for layer, own in zip(plan.layers, latents, strict=True)]
    losses = oracle.chain_losses(layers, x, variant=variant)
    total = 0.5 * modules(x).square().sum() + torch.stack(losses).sum()
    return list(torch.autograd.grad(total, [x, *modules.parameters()]))


def runners(variant: str, memory: str | None) -> Iterator[tuple[str, Callable[..., Callable[[], list[Tensor]]]]]:
    if memory is None:
        yield PLAIN, lambda modules, x: plain_chain(modules, x, variant)
        return
    for backend in rk.backends():
        yield f"{memory}, {backend}", lambda modules, x, b=backend: our_chain(modules, x, variant, memory, b)


CHAIN_RUNS = [
    pytest.param(variant, prepare, id=f"{variant}, {who}")
    for variant, memory in [("full", None), ("local", None), *POLICIES]
    for who, prepare in runners(variant, memory)
]


@pytest.mark.parametrize(("variant", "prepare"), CHAIN_RUNS)
@pytest.mark.parametrize("name", [*chains.CHAINS, *NAMES])
def test_chain(benchmark: Any, name: str, variant: str, prepare: Callable[..., Callable[[], list[Tensor]]]) -> None:
    # the truth at a size where float64 is quick; a chain of the tests is small as it is
    modules, x = built(name, torch.float64)
    if name in NETWORKS:
        modules = NETWORKS[name].model(narrow=True).double()
        x = NETWORKS[name].inputs(4, tiny=True).double().requires_grad_()
    want = true_chain(copy.deepcopy(modules), x, variant)
    try:
        got = prepare(copy.deepcopy(modules), x)()
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    except ValueError as reason:
        if "cannot serve" not in str(reason):
            raise
        pytest.skip(str(reason))
    assert oracle.error(got, want) < EXACT, "wrong; no time is taken"
    benchmark.group = f"chain: {name}, {variant}"
    benchmark(prepare(*built(name, torch.float32)))
