"""A wrapped model among what people do with models: compile, autocast, in-place modules, inference mode, memory."""

from __future__ import annotations

import copy
import gc
import statistics
import weakref

import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import racecar
from racecar_kernels.activations import TABLE

POLICIES = [("full", "store"), ("full", "recompute"), ("local", "store"), ("local", "recompute"), ("local", "deferred")]
each_policy = pytest.mark.parametrize(("variant", "memory"), POLICIES)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())


def gradients(net: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    params = list(net.parameters())
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


@each_policy
def test_a_new_lambda_does_not_recompile(variant: str, memory: str) -> None:
    torch.compiler.reset()  # all policies compile the same function of this file
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    net, x = racecar.wrap(small(), 1e-3, variant=variant, memory=memory), torch.randn(4, 5)
    step = torch.compile(lambda x: net(x).sum() + net.reverse_loss, fullgraph=True, backend=backend)
    plain = racecar.wrap(small(), 1e-3, variant=variant)  # knows the loss of every policy after the forward
    for value in (0.1, 0.3, [0.5, 0.2], 0.7, 0.9):
        net.lam = plain.lam = value
        torch.testing.assert_close(step(x), plain(x).sum() + plain.reverse_loss)
    assert len(compiled) == 1
    net.lam = 0.0
    torch.testing.assert_close(step(x), plain(x).sum())
    assert len(compiled) == 2


def test_deferred_under_compile_is_known_after_the_forward() -> None:
    """The compiler decides what to keep and what to compute again; nothing is left to wait for the backward pass."""
    net, x = racecar.wrap(small(), 0.3, variant="local", memory="deferred"), torch.randn(4, 5)
    loss = net(x).sum() + net.reverse_loss
    want = gradients(net, loss)
    known = net.reverse_loss.detach()
    step = torch.compile(lambda x: (net(x).sum(), net.reverse_loss), fullgraph=True, backend="aot_eager")
    out, reverse = step(x)
    torch.testing.assert_close(reverse, known)
    torch.testing.assert_close(gradients(net, out + reverse), want)
    torch.testing.assert_close(net.reverse_loss, known)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_inductor_agrees_about_every_stride(layout: torch.memory_format) -> None:
    """Layers of one channel, a 1x1 kernel, a padding mode and a folded pooling, each of which has its own layout."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1, padding_mode="reflect"), nn.GELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.GELU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1), nn.ReLU(),
    ).double().to(memory_format=layout)  # fmt: skip
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=layout)
    net = racecar.wrap(net, 0.1, variant="full")
    want = gradients(net, net(x).sum() + net.reverse_loss)
    got = gradients(net, torch.compile(lambda x: net(x).sum() + net.reverse_loss, fullgraph=True)(x))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


SETTINGS = {"threshold": (0.1, 0.2), "prelu": (4,)}
NORMS = [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm((4, 6, 6)), nn.InstanceNorm2d(4, affine=True)]


def with_latent(name: str, seed: int) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(seed)
    latent = TABLE[name].module(*SETTINGS.get(name, ())) if name in TABLE else copy.deepcopy(NORMS[int(name)])
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), latent, nn.Conv2d(4, 3, 3, padding=1))
    return net, torch.randn(3, 2, 6, 6)


@pytest.mark.parametrize("variant", ["full", "local"])
@pytest.mark.parametrize("name", [*TABLE, *map(str, range(len(NORMS)))])
def test_autocast_takes_every_latent(name: str, variant: str) -> None:
    """Norm-wise error of the gradients against float64, median of nine seeds: at most twice plain PyTorch's."""

    def plain(net: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        return sum(oracle.chain_losses([([], net[0], [net[1]]), ([], net[2], [])], x, variant=variant))

    our_errors, plain_errors = [], []
    for seed in range(9):
        net, x = with_latent(name, seed)
        exact = copy.deepcopy(net).double()
        want = gradients(exact, plain(exact, x.double()))
        with torch.autocast("cpu", torch.bfloat16):
            loss = plain(net, x)
        plain_errors.append(oracle.error(gradients(net, loss), want))
        net = racecar.wrap(net, 1.0, variant=variant)
        with torch.autocast("cpu", torch.bfloat16):
            net(x)
        got = gradients(net, net.reverse_loss)
        assert net.reverse_loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in got)
        our_errors.append(oracle.error(got, want))
    assert statistics.median(our_errors) <= 2 * statistics.median(plain_errors)


def test_deferred_reports_frozen_layers_too() -> None:
    """Fine-tuning: no backward reaches the first layer, and the others' losses are known all the same."""
    x, found = torch.randn(4, 5), []
    for memory in ("store", "deferred"):
        net = small()
        net[0].requires_grad_(False)
        net = racecar.wrap(net, 0.5, variant="local", memory=memory)
        loss = net(x).sum() + net.reverse_loss
        if memory == "deferred":
            assert net.reverse_loss.item() == 0 and net.reverse_losses == {}
        loss.backward()
        found.append((net.reverse_loss.detach(), list(net.reverse_losses.values()), net[2].weight.grad))
    torch.testing.assert_close(*found)


def test_deferred_losses_are_detached_under_create_graph() -> None:
    net = racecar.wrap(small(), 0.5, variant="local", memory="deferred")
    (net(torch.randn(4, 5)).sum() + net.reverse_loss).backward(create_graph=True)
    assert all(value.grad_fn is None for value in net.reverse_losses.values())


class Changes(nn.Module):
    """A part of a model whose first operation works in place on what it receives."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x) * 1.0


@pytest.mark.parametrize("what", ["dropout behind identity", "view behind the chain", "inside a block"])
@each_policy
def test_in_place_modules_anywhere(what: str, variant: str, memory: str) -> None:
    def build(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        tail = {
            "dropout behind identity": [nn.Identity(), nn.Dropout(0.5, inplace), nn.Linear(6, 3)],
            "view behind the chain": [nn.Flatten(), nn.Identity(), nn.ReLU(inplace)],
            "inside a block": [Changes(inplace)],
        }[what]
        conv = [nn.Conv1d(1, 2, 3)] if what == "view behind the chain" else [nn.Linear(5, 6)]
        return nn.Sequential(*conv, *tail).double()

    x, found = torch.randn(4, 1, 5, dtype=torch.float64), []
    for inplace in (False, True):
        net = racecar.wrap(build(inplace), 0.3, variant=variant, memory=memory)
        torch.manual_seed(5)
        loss = net(x).square().sum() + net.reverse_loss
        found.append(gradients(net, loss))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variant", ["full", "local"])
def test_what_a_user_changes_in_place_is_noticed(variant: str) -> None:
    class Spoils(nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    net = racecar.wrap(nn.Sequential(nn.Linear(5, 6), nn.Identity(), nn.Linear(6, 3)), 0.3, variant=variant)
    net[1].register_forward_hook(lambda module, args, y: y.mul_(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        net(torch.randn(4, 5))


def test_a_parametrised_weight_is_computed_once() -> None:
    """Spectral norm takes a step of its power iteration at every look at the weight."""
    torch.manual_seed(0)
    plain = nn.Sequential(parametrizations.spectral_norm(nn.Linear(20, 30)), nn.Tanh(), nn.Linear(30, 4))
    net = racecar.wrap(copy.deepcopy(plain), 1e-2)
    str(net.plan)
    x = torch.randn(8, 20)
    for _ in range(3):
        torch.testing.assert_close(net(x), plain(x))
        net.reverse_loss.backward()
    for (name, a), (_, b) in zip(plain.named_buffers(), net.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_inference_mode_leaves_training_as_it_was() -> None:
    net, x = racecar.wrap(small(), 0.5), torch.randn(4, 5)
    with torch.inference_mode():
        net(x)
        net.lam = 0.25
    (net(x).sum() + net.reverse_loss).backward()
    assert net[0].weight.grad is not None


def test_a_module_in_the_head_does_not_make_it_local() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.LazyLinear(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), Head())
    assert racecar.wrap(net, 1.0).plan.variant == "full"


def test_a_class_changed_after_wrapping_is_not_thrown_away() -> None:
    net = racecar.wrap(small(), 1.0)
    net.__class__ = type("Other", (type(net),), {})
    with pytest.raises(RuntimeError, match="changed to Other after wrapping"):
        net.unwrap()
    net(torch.randn(4, 5))
    assert net.reverse_loss.item() > 0  # its hooks are still there


def test_a_model_is_freed_with_its_last_name() -> None:
    gc.disable()
    try:
        net, seen = racecar.wrap(small(), 1.0), []
        net[1].register_forward_hook(lambda module, args, y: seen.append(weakref.ref(y)))
        net(torch.randn(4, 5))
        assert seen[0]() is not None  # `reverse_loss` can still be differentiated
        net.lam = 0.0
        net(torch.randn(4, 5))  # lets go of the last forward's graph
        assert seen[0]() is None
        weight = weakref.ref(net[0].weight)
        del net
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("variant", ["full", "local"])
def test_running_norm_reads_the_statistics_after_this_forward(variant: str) -> None:
    torch.manual_seed(0)
    conv, bn, act, last = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=0.4), nn.ReLU(), nn.Conv2d(4, 3, 3)
    net, x = nn.Sequential(conv, bn, act, last).double(), torch.randn(5, 2, 8, 8, dtype=torch.float64)
    net = racecar.wrap(net, 1.0, variant=variant, norm="running")
    net(x)
    layers = [([], conv, [bn, act]), ([], last, [])]
    wanted = oracle.chain_losses(layers, x, variant=variant, norm="running")  # the statistics are now those after it
    torch.testing.assert_close(torch.stack(list(net.reverse_losses.values())), torch.stack(wanted).detach())


def test_lambda_as_a_tensor_or_array() -> None:
    net = racecar.wrap(small(), torch.tensor([0.5, 0.25]))
    assert net.lam == [0.5, 0.25]
    net.lam = torch.tensor(0.75)
    assert net.lam == [0.75, 0.75]
    with pytest.raises(ValueError, match="finite"):
        net.lam = 10**400


def test_complex_models_are_refused_when_wrapped() -> None:
    with pytest.raises(TypeError, match=r"layer '0' has torch.complex64 weights"):
        racecar.wrap(nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64)), 1.0)
