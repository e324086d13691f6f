"""What people do with models that are planned as graphs: compile, copy, autocast, checkpoints, control flow, cells."""

from __future__ import annotations

import copy
import pickle
import weakref

import graphs
import pytest
import torch
from torch import nn

import racecar
from racecar.graph import calls
from racecar.graph.modes import CallMode
from racecar_kernels import describe

each_model = pytest.mark.parametrize("name", graphs.MODELS)


def gradients(net: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    params = list(net.parameters())
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


# ------------------------------------------------------------------------------------------ what people do


@pytest.mark.parametrize("memory", ["store", "recompute"])
@each_model
def test_compiles_without_a_break_and_once(name: str, memory: str) -> None:
    torch.compiler.reset()
    net, x = graphs.made(name)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    wrapped = racecar.wrap(net, 0.1, memory=memory)
    step = torch.compile(lambda x: wrapped(x).square().sum() + wrapped.reverse_loss, fullgraph=True, backend=backend)
    state = copy.deepcopy(net.state_dict())
    for lam in (0.1, 0.3, 0.7):
        wrapped.lam = lam
        got = gradients(net, step(x))
        net.load_state_dict(state)
        want = gradients(net, wrapped(x).square().sum() + wrapped.reverse_loss)
        net.load_state_dict(state)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
    assert len(compiled) == 1


def test_functions_that_compile_does_not_show_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.two(nn.functional.hardswish(self.one(x)))

    net = racecar.wrap(Net(), 0.1)
    net(torch.randn(2, 4))
    with pytest.raises(Exception, match=r"does not show calls of F.hardswish.*use nn.Hardswish"):
        torch.compile(net, fullgraph=True, backend="eager")(torch.randn(2, 4))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_trains_by_itself(how: str) -> None:
    net, x = graphs.made("residual")
    wrapped = racecar.wrap(net, 0.1)
    twin = copy.deepcopy(wrapped) if how == "deepcopy" else pickle.loads(pickle.dumps(wrapped))
    loss = wrapped(x).sum() + wrapped.reverse_loss
    theirs = twin(x).sum() + twin.reverse_loss
    torch.testing.assert_close(theirs, loss)
    theirs.backward()
    assert all(p.grad is None for p in net.parameters()) and all(p.grad is not None for p in twin.parameters())
    assert type(twin.unwrap()) is graphs.Residual


def test_functional_call_uses_the_weights_that_it_is_given() -> None:
    net, x = graphs.made("pre-activated")
    other, _ = graphs.made("pre-activated")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.3)
    wrapped = racecar.wrap(net, 0.1)

    def loss(params):
        return torch.func.functional_call(wrapped, params, (x,)).sum() + wrapped.reverse_loss

    params = {k: v.detach().clone().requires_grad_() for k, v in other.named_parameters()}
    got = torch.autograd.grad(loss(params), list(params.values()))
    theirs = racecar.wrap(other, 0.1)
    want = gradients(other, theirs(x).sum() + theirs.reverse_loss)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_parametrised_weights() -> None:
    net, x = graphs.made("residual")
    nn.utils.parametrizations.weight_norm(net.one.conv2)
    wrapped = racecar.wrap(net, 0.1)
    assert "one.conv2" in wrapped.plan.names
    (wrapped(x).sum() + wrapped.reverse_loss).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert wrapped.reverse_losses["one.conv2"] > 0


class Skipping(nn.Module):
    """Leaves layers out now and then, and does things that no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.skip = False

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        h = torch.tanh(self.first(x))
        if not self.skip and x.abs().sum() > 0:
            h = h + torch.tanh(self.second(h))
        return {"out": self.third(h) * scale, "features": h}


def test_control_flow() -> None:
    net = Skipping().double()
    x = torch.randn(4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cannot be followed without running it.*example=x"):
        racecar.wrap(net, 0.1)
    wrapped = racecar.wrap(net, [0.1, 0.2, 0.3], example={"x": x, "scale": 2.0})
    wrapped(x, scale=2.0)
    assert [*wrapped.reverse_losses] == ["first", "second", "third"] and wrapped.reverse_losses["second"] > 0
    wrapped(x)["out"].sum().backward()
    net.skip = True
    y = wrapped(x=x)
    assert wrapped.reverse_losses["second"] == 0 and wrapped.reverse_losses["third"] > 0
    (y["out"].sum() + wrapped.reverse_loss).backward()
    with pytest.raises(TypeError, match="unexpected keyword"):
        racecar.wrap(Skipping(), 0.1, example={"wrong": x})


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = cell(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("memory", ["store", "recompute", "deferred"])
@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_cells(cell: type[nn.Module], memory: str) -> None:
    torch.manual_seed(0)
    net, x = Recurrent(cell).double(), torch.randn(3, 2, 4, dtype=torch.float64)
    wrapped = racecar.wrap(net, 0.5, memory=memory, example=x)
    assert wrapped.plan.names == ["cell.weight_ih", "cell.weight_ih#2", "cell.weight_hh#2", "head"]
    assert "does not work on what comes from the input" in dict(wrapped.plan.left_out)["cell.weight_hh"]
    got = gradients(net, wrapped(x).sum() + wrapped.reverse_loss)

    losses = []
    state = None
    for t in range(2):
        own = net.cell
        h = torch.zeros(3, 6, dtype=torch.float64) if state is None else state[0] if isinstance(state, tuple) else state
        for d, w, b in ((x[:, t], own.weight_ih, own.bias_ih), (h, own.weight_hh, own.bias_hh)):
            y = d @ w.T + b
            losses.append(((d - (y - b) @ w) ** 2).sum() / 2)
        state = own(x[:, t], state)
    last = state[0] if isinstance(state, tuple) else state
    head = net.head
    y = head(last)
    losses.append(((last - (y - head.bias) @ head.weight) ** 2).sum() / 2)
    del losses[1]  # the first state is 0, whatever the input
    for g, w in zip(got, gradients(net, y.sum() + 0.5 * sum(losses)), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("how", ["traced", "run"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first: bool, how: str) -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    net, x = Net().double(), torch.randn(3, 4, 8, dtype=torch.float64)
    twin = copy.deepcopy(net)
    wrapped = racecar.wrap(net, 0.5, example=x if how == "run" else None)
    assert wrapped.plan.names == ["attention.in_proj_weight", "attention.out_proj"]
    y = wrapped(x)
    torch.testing.assert_close(y, twin(x))
    (y.sum() + wrapped.reverse_loss).backward()
    own = twin.attention
    q = x @ own.in_proj_weight.T
    want = ((x - q @ own.in_proj_weight) ** 2).sum() / 2
    torch.testing.assert_close(wrapped.reverse_losses["attention.in_proj_weight"], want.detach())
    d = (y - own.out_proj.bias) @ torch.linalg.inv(own.out_proj.weight).T  # what the projection received
    want = ((d - (y - own.out_proj.bias) @ own.out_proj.weight) ** 2).sum() / 2
    torch.testing.assert_close(wrapped.reverse_losses["attention.out_proj"], want.detach())


def test_shared_weights_and_frozen_ones() -> None:
    net, x = graphs.made("pre-activated")
    net.conv2.weight = net.conv1.weight
    net.stem.requires_grad_(False)
    wrapped = racecar.wrap(net, 0.5)
    assert wrapped.plan.names == ["stem", "conv1", "conv1#2"]
    (wrapped(x).sum() + wrapped.reverse_loss).backward()
    assert net.stem.weight.grad is None and net.conv1.weight.grad is not None


def test_every_module_calls_one_function_of_its_family() -> None:
    """What a trace takes for one call has to be one when the forward runs."""
    seen: list[object] = []

    class Mode(CallMode):
        def called(self, func, args, kwargs):
            if func in calls.FAMILIES:
                seen.append(calls.FAMILIES[func])
            return func(*args, **kwargs)

    arguments = {nn.GroupNorm: (2, 4), nn.LayerNorm: (6,), nn.Threshold: (0.1, 0.2), nn.Linear: (6, 3)}
    kinds = (*describe.TIED, *describe.PRE, *describe.NORMS, *describe.ACTIVATIONS, *describe.DROPOUTS)
    for kind in kinds:
        name = kind.__name__
        dims = next((int(c) for c in name if c.isdigit() and name.endswith("d")), 2)
        given = arguments.get(kind)
        if given is None:
            given = (4, 4, 1) if "Conv" in name else (4,) if "Norm" in name else (2,) if "Pool" in name else ()
        module = kind(*given, **({"scale_factor": 2} if "psampl" in name else {}))
        seen.clear()
        with Mode():
            module(torch.randn(2, 4, *[6] * dims))
        assert seen == [calls.family_of_module(module)], kind


@pytest.mark.parametrize("first", [graphs.Residual, graphs.Dense])
def test_wrapping_twice_and_unwrapping(first: type[nn.Module]) -> None:
    net = racecar.wrap(first(), 0.1)
    with pytest.raises(ValueError, match="wrapped already"):
        racecar.wrap(net, 0.1)
    racecar.wrap(net.unwrap(), 0.1)


def test_a_model_that_changed_is_refused() -> None:
    net, x = graphs.made("pre-activated")
    wrapped = racecar.wrap(net, 0.1)
    net.conv1 = nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, 1, 1)).double()
    net.stem.forward = lambda x: nn.functional.conv2d(torch.tanh(x), net.stem.weight, padding=1)
    wrapped(x)  # a layer that is not called does not count, and one that receives something else reverses that
    net.conv2.forward = lambda x: nn.functional.conv2d(torch.cos(x), net.conv2.weight, padding=1)
    with pytest.raises(RuntimeError, match="leads to layer 'conv2' is not what it was.*wrap again"):
        wrapped(x)


# ------------------------------------------------------------------------------------------ in a trainer


@pytest.mark.parametrize("memory", ["store", "deferred"])
def test_autocast_gives_the_loss_of_half_precision(memory: str) -> None:
    net, x = graphs.made("residual")
    net, x = net.float(), x.float()
    wrapped = racecar.wrap(net, 0.1, memory=memory)
    (wrapped(x).sum() + wrapped.reverse_loss).backward()
    want = wrapped.reverse_losses
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = wrapped(x).float().sum() + wrapped.reverse_loss
    loss.backward()
    assert wrapped.reverse_loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    for name, value in wrapped.reverse_losses.items():
        torch.testing.assert_close(value, want[name], rtol=0.1, atol=0.1, msg=lambda m, name=name: f"{name}: {m}")


def test_a_checkpoint_around_it_has_the_same_gradients() -> None:
    net, x = graphs.made("pre-activated")
    wrapped = racecar.wrap(net, 0.1)
    state = copy.deepcopy(net.state_dict())
    want = gradients(net, wrapped(x).sum() + wrapped.reverse_loss)
    net.load_state_dict(state)
    y = torch.utils.checkpoint.checkpoint(wrapped, x, use_reentrant=False)
    for g, w in zip(gradients(net, y.sum() + wrapped.reverse_loss), want, strict=True):
        torch.testing.assert_close(g, w)


def test_channels_last_is_kept() -> None:
    net, x = graphs.made("residual")
    net.to(memory_format=torch.channels_last)
    seen = []
    net.two.conv2.register_forward_hook(
        lambda m, args, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
    )
    wrapped = racecar.wrap(net, 0.1)
    for _ in range(2):
        wrapped(x.to(memory_format=torch.channels_last))
    assert seen == [True, True]


def test_several_forwards_before_one_backward() -> None:
    net, x = graphs.made("dense")
    wrapped = racecar.wrap(net, 0.1)
    net.eval().train()
    singles = [gradients(net, wrapped(part).sum() + wrapped.reverse_loss) for part in (x, 2 * x)]
    total = 0
    for part in (x, 2 * x):
        total = total + wrapped(part).sum() + wrapped.reverse_loss
    for g, a, b in zip(gradients(net, total), *singles, strict=True):
        torch.testing.assert_close(g, a + b)


def test_nothing_of_a_forward_is_kept_alive() -> None:
    net, x = graphs.made("residual")
    wrapped = racecar.wrap(net, 0.1)
    for _ in range(2):
        inner = []
        handle = net.one.conv1.register_forward_hook(lambda m, args, y, inner=inner: inner.append(weakref.ref(y)))
        loss = wrapped(x).sum() + wrapped.reverse_loss
        loss.backward()
        del loss
        handle.remove()
        assert inner[0]() is None
