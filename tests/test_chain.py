"""The tied chain against its definition: the plain forward, then reverse layers one by one."""

from __future__ import annotations

import statistics

import oracle
import pytest
import torch
from cases import BACKENDS
from chains import CHAINS, Sample, describe_chain, make

import racecar_kernels as rk
from racecar_kernels import chain_backward
from racecar_kernels.layer import Chain, Segment, parse_chain

each_chain = pytest.mark.parametrize("name", CHAINS)
each_way = pytest.mark.parametrize(
    ("variant", "memory"),
    [("full", "store"), ("full", "recompute"), ("local", "store"), ("local", "recompute"), ("local", "deferred")],
)


def by_definition(sample: Sample, variant: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and losses from the model's own forward and `reverse_layers`."""
    from racecar.plan import plan_chain

    plan = plan_chain(sample.modules)
    starts = {layer.d: m for m, layer in enumerate(plan.layers)}
    inputs, h = [], sample.x
    for at, module in enumerate(plan.order):
        if at in starts:
            inputs.append(h)
        h = module(h)
    own, at = [[]], 0
    for layer in sample.layers[1:]:
        own.append(sample.params[at : at + layer.tensors])
        at += layer.tensors
    y, losses = h, []
    for m in reversed(range(len(sample.layers))):
        above = sample.layers[m + 1].pre if variant == "full" and m + 1 < len(sample.layers) else ()
        source = y if variant == "full" or m + 1 == len(sample.layers) else inputs[m + 1]
        segment = Segment((sample.layers[m],), above, "reference")
        y, loss = rk.reverse_layers(segment, source, [inputs[m]], [sample.weights[m]], [sample.biases[m]], own[m])
        losses.append(loss[0])
    return h, torch.stack(losses[::-1])


def total(out: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """A scalar that reaches everything, with another weight for each part."""
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(out.shape, dtype=out.dtype, generator=generator)
    return (out * g).sum() + (losses * torch.linspace(0.3, 0.9, len(losses), dtype=losses.dtype)).sum()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", BACKENDS)
@each_way
@each_chain
def test_equals_its_definition(name, variant, memory, backend, last):
    sample = make(name, last=last)
    want_out, want_losses = by_definition(sample, variant)
    want = torch.autograd.grad(total(want_out, want_losses), sample.tensors)
    sample = make(name, last=last)
    report = rk.ChainReport()
    settings = dict(variant=variant, memory=memory, backend=backend)
    out, losses = rk.tied_chain(*sample.arguments, last=sample.last, report=report, **settings)
    torch.testing.assert_close(out, want_out)
    assert out.stride() == want_out.stride()
    got = torch.autograd.grad(total(out, losses), sample.tensors)
    torch.testing.assert_close(report.losses if memory == "deferred" else losses, want_losses)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("variant", "memory"), [("full", "store"), ("local", "deferred")])
@pytest.mark.parametrize("name", ["mlp", "pooled", "batch norm", "strided", "group norm", "wide, few pixels"])
def test_at_most_twice_the_error_of_plain_pytorch(name, variant, memory, dtype):
    """Against float64, norm-wise over all gradients, the median of seven seeds."""
    errors = {"ours": [], "plain": []}
    for seed in range(7):
        want, *_ = everything(make(name, seed=seed, last=True), variant)
        _, plain, ours = everything(make(name, seed=seed, last=True), variant, dtype, memory)
        errors["plain"].append(oracle.error(plain, want))
        errors["ours"].append(oracle.error(ours, want))
    assert statistics.median(errors["ours"]) <= 2 * statistics.median(errors["plain"])


def everything(sample: Sample, variant: str, dtype: torch.dtype = torch.float64, memory: str | None = None):
    """Gradients in float64; with `memory` in `dtype` as well, of plain PyTorch and of the chain."""
    want = torch.autograd.grad(total(*by_definition(sample, variant)), sample.tensors)
    if memory is None:
        return (want,)
    low = describe_chain(sample.modules.to(dtype), sample.x.detach().to(dtype).requires_grad_())
    plain = torch.autograd.grad(total(*by_definition(low, variant)), low.tensors)
    out, losses = rk.tied_chain(*low.arguments, last=low.last, variant=variant, memory=memory)
    return want, plain, torch.autograd.grad(total(out, losses), low.tensors)


@each_way
@pytest.mark.parametrize("name", ["pooled", "batch norm", "strided", "tokens"])
def test_parts_of_the_batch_give_the_same(name, variant, memory, monkeypatch):
    """Where x needs no gradient, the first layer goes through its backward a few samples at a time."""
    results = []
    for part in (1 << 21, 1):
        monkeypatch.setattr(chain_backward, "PART", part)
        sample = make(name)
        x = sample.x.detach()
        out, losses = rk.tied_chain(x, *sample.arguments[1:], last=sample.last, variant=variant, memory=memory)
        results.append(torch.autograd.grad(total(out, losses), sample.tensors[1:]))
    for parts, whole in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


@each_way
def test_gradcheck(variant, memory):
    if memory == "deferred":
        pytest.skip("a deferred loss reads 0, so it has no finite difference")
    sample = make("batch norm")
    x = sample.x.detach().clone().requires_grad_()

    def run(x, *weights):
        return rk.tied_chain(
            x, sample.layers, weights, sample.biases, sample.params, last=sample.last, variant=variant, memory=memory
        )

    weights = [w.detach().clone().requires_grad_() for w in sample.weights]
    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("name", ["mlp", "pooled, odd", "batch norm", "circular"])
@pytest.mark.parametrize(("variant", "memory"), [("full", "store"), ("local", "recompute"), ("local", "deferred")])
def test_opcheck(name, variant, memory):
    sample = make(name)
    chain = str(Chain(tuple(sample.layers), tuple(sample.last), variant == "full"))
    x, _, weights, biases, params = sample.arguments
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.racecar.tied_chain,
            (x.detach(), [w.detach() for w in weights], [None if b is None else b.detach() for b in biases],
             [None if p is None else p.detach() for p in params], chain, memory),
        )  # fmt: skip


@pytest.mark.parametrize(("variant", "memory"), [("full", "store"), ("local", "recompute")])
def test_compiles_into_one_graph(variant, memory):
    sample = make("batch norm")

    def run(x):
        rest = (sample.layers, sample.weights, sample.biases, sample.params)
        return rk.tied_chain(x, *rest, last=sample.last, variant=variant, memory=memory)

    want = torch.autograd.grad(total(*run(sample.x)), sample.tensors)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(torch.autograd.grad(total(*compiled(sample.x)), sample.tensors), want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_statistics_of_the_batch_are_reported():
    sample = make("batch norm")
    report = rk.ChainReport()
    rk.tied_chain(*sample.arguments, last=sample.last, report=report)
    conv, norm = sample.modules[0], sample.modules[1]
    c = conv(sample.x)
    assert len(report.stats) == 4
    torch.testing.assert_close(report.stats[0], c.mean((0, 2, 3)).detach())
    variance = c.var((0, 2, 3), unbiased=False).detach()
    torch.testing.assert_close(report.stats[1], (variance + norm.eps).rsqrt())


def test_without_gradient_nothing_is_kept_and_losses_are_known_at_once():
    sample = make("pooled")
    with torch.no_grad():
        want = rk.tied_chain(*sample.arguments, last=sample.last, variant="local")
        report = rk.ChainReport()
        out, losses = rk.tied_chain(
            *sample.arguments, last=sample.last, variant="local", memory="deferred", report=report
        )
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(losses, want[1])
    assert report.losses is not None


def test_second_derivatives_are_refused():
    sample = make("mlp")
    out, losses = rk.tied_chain(*sample.arguments, last=sample.last)
    (g,) = torch.autograd.grad(total(out, losses), [sample.x], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        g.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(layers=[]), "a chain needs at least one layer"),
        (dict(weights=[]), "3 layers need 3 weights and biases each, got 0 and 3"),
        (dict(params=[None]), "take 0 tensors .*got 1"),
        (dict(variant="both"), "variant must be one of 'full', 'local', got 'both'"),
        (dict(memory="deferred"), "memory='deferred' needs variant='local'"),
        (dict(x=torch.zeros(0, 6, dtype=torch.float64)), "x is empty"),
        (dict(x=torch.zeros(3, 5, dtype=torch.float64)), "layer 1: weight expects 6 input features, but x has 5"),
        (dict(x=torch.zeros(3, 6, dtype=torch.int64)), "real floating-point"),
        (dict(x=[1.0]), "x must be a tensor, got list"),
        (dict(layers=[torch.nn.Linear(6, 5)]), "layers holds Layer of racecar_kernels, got Linear; racecar.wrap takes"),
        (dict(layers=None), "layers must be a sequence, got NoneType"),
        (dict(last=[rk.Activation("Tanh")]), "no activation is named 'Tanh'; there are relu, "),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    sample = make("mlp")
    arguments = dict(
        x=sample.x, layers=sample.layers, weights=sample.weights, biases=sample.biases, params=sample.params,
        last=sample.last,
    )  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        rk.tied_chain(**{**arguments, **change})


def test_description_survives_as_text():
    sample = make("pooled, odd")
    chain = Chain(tuple(sample.layers), tuple(sample.last), False, "reference")
    assert parse_chain(str(chain)) == chain
    with pytest.raises(ValueError, match="not a description of a chain"):
        parse_chain('["Pool"]'.replace("Pool", "x"))
