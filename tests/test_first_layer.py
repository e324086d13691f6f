"""The first layer's gradients where x needs none: the kernel that never writes d_2's gradient, against the definition.

That the kernel ran is counted, since everything here would be right without it too.
"""

from __future__ import annotations

import statistics

import oracle
import pytest
import torch
from chains import Sample, describe_chain
from test_chain import each_way, total
from torch import Tensor, nn

import racecar_kernels as rk
from racecar_kernels import extension, pointwise
from racecar_kernels.layer import Chain

pytestmark = pytest.mark.skipif(extension.load() is None, reason="the extension is not built")
each_width = pytest.mark.parametrize("c_out", [16, 32])
each_image = pytest.mark.parametrize("c_in", [1, 3])
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


@pytest.fixture
def runs(replaced, unrecorded):
    """For every call of the kernel since, whether it served it."""
    found: list[bool] = []

    def grad_weight(*given, **options):
        result = pointwise.grad_weight(*given, **options)
        if "sums" in options:  # the chain's first layer; others with few channels ask for the weight alone
            found.append(result is not None)
        return result

    replaced(grad_weight)
    return found


def make(c_in: int, c_out: int, *, bias: bool, seed: int = 0, size: tuple[int, int] = (9, 8)) -> Sample:
    """Two convolutions with pooling in between, in channels_last and float64; x without a gradient."""
    torch.manual_seed(seed)
    modules = nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(c_out, 3, 3, padding=1), nn.Tanh(),
    ).double().to(memory_format=torch.channels_last)  # fmt: skip
    x = torch.randn(3, c_in, *size, dtype=torch.float64)
    return describe_chain(modules, x.contiguous(memory_format=torch.channels_last))


def by_definition(sample: Sample, variant: str) -> tuple[Tensor, Tensor]:
    """Output and losses from the model's own forward and the oracle's reverse."""
    first, act, pool, second, last = sample.modules
    losses = oracle.chain_losses([([], first, [act]), ([pool], second, [last])], sample.x, variant=variant)
    return sample.modules(sample.x), 2 * torch.stack(losses)


def grads(out: Tensor, losses: Tensor, sample: Sample) -> list[Tensor]:
    return list(torch.autograd.grad(total(out, losses), list(sample.modules.parameters())))


def lower(sample: Sample, dtype: torch.dtype) -> Sample:
    """The same in another type; it is changed in place."""
    return describe_chain(sample.modules.to(dtype), sample.x.to(dtype))


@pytest.mark.usefixtures("poisoned")
@each_bias
@each_image
@each_width
@each_way
def test_float64_equals_the_definition(variant, memory, c_out, c_in, bias, runs):
    sample = make(c_in, c_out, bias=bias)
    want = grads(*by_definition(sample, variant), sample)
    got = grads(*rk.tied_chain(*sample.arguments, last=sample.last, variant=variant, memory=memory), sample)
    assert runs == [True]
    for ours, theirs, p in zip(got, want, sample.modules.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
        assert ours.stride() == p.stride()


@each_bias
@each_image
@each_width
@each_way
def test_float32_is_off_by_at_most_twice_what_plain_pytorch_is(variant, memory, c_out, c_in, bias, runs):
    """Norm-wise over all gradients, and over those of the first layer alone; the median of seven seeds."""
    errors = {"ours": [], "plain": [], "ours, first": [], "plain, first": []}
    own = 1 + bias
    for seed in range(7):
        sample = make(c_in, c_out, bias=bias, seed=seed, size=(12, 12))
        want = grads(*by_definition(sample, variant), sample)
        sample = lower(sample, torch.float32)
        plain = grads(*by_definition(sample, variant), sample)
        ours = grads(*rk.tied_chain(*sample.arguments, last=sample.last, variant=variant, memory=memory), sample)
        for name, got in (("plain", plain), ("ours", ours)):
            errors[name].append(oracle.error(got, want))
            errors[f"{name}, first"].append(oracle.error(got[:own], want[:own]))
    assert runs == [True] * 7
    median = {name: statistics.median(found) for name, found in errors.items()}
    assert median["ours"] <= 2 * median["plain"] and median["ours, first"] <= 2 * median["plain, first"], median


@pytest.mark.parametrize("reached", ["out", "losses", "first loss", "second loss"])
@each_way
def test_whatever_the_gradient_comes_from(variant, memory, reached, runs):
    def part(out, losses):
        return {"out": out.square(), "losses": losses, "first loss": losses[0], "second loss": losses[1]}[reached].sum()

    sample = make(3, 16, bias=True)
    parameters = list(sample.modules.parameters())
    want = torch.autograd.grad(part(*by_definition(sample, variant)), parameters)
    found = rk.tied_chain(*sample.arguments, last=sample.last, variant=variant, memory=memory)
    got = torch.autograd.grad(part(*found), parameters)
    assert runs == [True]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@each_way
def test_frozen_first_layers_leave_it_to_others(variant, memory, runs):
    """Without the weight's gradient the kernel has nothing to do; without the bias's it leaves that one out."""
    sample = make(1, 16, bias=True)
    first = sample.modules[0]
    for frozen, calls in ((first.weight, []), (first.bias, [True])):
        runs.clear()
        frozen.requires_grad_(False)
        asked = [p for p in sample.modules.parameters() if p.requires_grad]
        want = torch.autograd.grad(total(*by_definition(sample, variant)), asked)
        found = rk.tied_chain(*sample.arguments, last=sample.last, variant=variant, memory=memory)
        torch.testing.assert_close(torch.autograd.grad(total(*found), asked), want, rtol=1e-10, atol=1e-11)
        assert runs == calls
        frozen.requires_grad_(True)


def arguments(sample: Sample, variant: str, memory: str) -> tuple:
    """Of the operator itself."""
    x, layers, *tensors = sample.arguments
    chain = str(Chain(tuple(layers), tuple(sample.last), variant == "full"))
    return x, *([None if t is None else t.detach() for t in ts] for ts in tensors), chain, memory


@each_way
def test_what_is_kept_of_the_first_layer(variant, memory):
    """Of one channel nothing but what layer 2 received, where that is stored; of three c, which is longer to make."""
    for c_in, shape in ((1, (3, 16, 4, 4) if memory == "store" else (0,)), (3, (3, 16, 9, 8))):
        kept = torch.ops.racecar.tied_chain(*arguments(make(c_in, 16, bias=True), variant, memory))[3]
        assert tuple(kept[0].shape) == shape


@each_image
@each_way
def test_opcheck(variant, memory, c_in):
    """A trace comes to the shapes that a run comes to."""
    with torch.no_grad():
        torch.library.opcheck(torch.ops.racecar.tied_chain, arguments(make(c_in, 16, bias=True), variant, memory))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("kernel", [2, 3])
@each_way
def test_even_kernels_and_either_layout(variant, memory, kernel, layout):
    """With an even kernel `same` pads one side more; an image of one channel lies both ways."""
    torch.manual_seed(0)
    modules = nn.Sequential(
        nn.Conv2d(1, 16, kernel, padding="same"), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 3, 3, padding=1), nn.Tanh()
    ).double()
    sample = describe_chain(modules.to(memory_format=layout), torch.randn(2, 1, 9, 8, dtype=torch.float64))
    want = grads(*by_definition(sample, variant), sample)
    got = grads(*rk.tied_chain(*sample.arguments, last=sample.last, variant=variant, memory=memory), sample)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    kept = torch.ops.racecar.tied_chain(*arguments(sample, variant, memory))[3][0]
    again = layout == torch.channels_last
    assert (kept.numel() == 0 or kept.shape[2:] == (4, 4)) == again
