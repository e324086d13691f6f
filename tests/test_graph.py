"""`racecar.wrap` on models that are no chain: layers, losses and gradients against brute force; chains inside."""

from __future__ import annotations

import copy
import pickle

import graph_oracle
import graphs
import pytest
import torch
from torch import nn

import racecar
from racecar.wrapping import wrapped_parts

each_model = pytest.mark.parametrize("name", graphs.MODELS)
each_memory = pytest.mark.parametrize("memory", ["store", "recompute", "deferred"])


def gradients(net: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    params = list(net.parameters())
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


@pytest.mark.parametrize("how", ["traced", "run"])
@each_memory
@each_model
def test_losses_and_gradients(name: str, memory: str, how: str) -> None:
    net, x = graphs.made(name)
    twin = copy.deepcopy(net)
    y, wanted = graph_oracle.losses(twin, x)
    lam = {layer: 0.3 + 0.1 * i for i, layer in enumerate(wanted)}
    want = gradients(twin, y.square().sum() + sum(w * wanted[n] for n, w in lam.items()))

    wrapped = racecar.wrap(net, lam, variant="local", memory=memory, example=x if how == "run" else None)
    assert wrapped.plan.names == list(wanted)
    for _ in range(2):  # the first forward also learns what is changed in place
        net.load_state_dict(twin.state_dict())
        out = wrapped(x)
        got = gradients(net, out.square().sum() + wrapped.reverse_loss)
        torch.testing.assert_close(out, y)
        for n, value in wrapped.reverse_losses.items():
            torch.testing.assert_close(value, wanted[n].detach(), msg=lambda m, n=n: f"{n}: {m}")
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)


@each_model
def test_eval_mode_and_lambda_zero_are_the_plain_model(name: str) -> None:
    net, x = graphs.made(name)
    twin = copy.deepcopy(net)
    wrapped = racecar.wrap(net, 0.0)
    assert torch.equal(wrapped(x), twin(x)) and wrapped.reverse_loss == 0
    wrapped.lam = 0.1
    net.eval()
    twin.eval()
    assert torch.equal(wrapped(x), twin(x)) and wrapped.reverse_loss == 0
    assert type(wrapped.unwrap()) is type(twin)


@each_model
def test_the_output_is_the_models_own(name: str) -> None:
    """Batch statistics and running ones included."""
    net, x = graphs.made(name)
    twin = copy.deepcopy(net)
    wrapped = racecar.wrap(net, 0.1)
    for _ in range(3):
        assert torch.equal(wrapped(x), twin(x))
    for key, value in twin.state_dict().items():
        assert torch.equal(net.state_dict()[key], value), key


# ------------------------------------------------------------------------------------------ a chain as functions


def as_modules(net: graphs.Functional) -> nn.Sequential:
    return nn.Sequential(
        net.conv1, net.norm, nn.ReLU(), nn.MaxPool2d(2), net.conv2, nn.Tanh(), nn.Dropout(0.0), net.conv3, nn.ReLU(),
        nn.Flatten(), net.head,
    )  # fmt: skip


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("reduction", ["l2", "sum", "mean"])
@pytest.mark.parametrize(("variant", "memory"), [("full", "store"), ("full", "recompute"), ("local", "deferred")])
def test_a_functional_chain_is_the_same_as_its_modules(
    variant: str, memory: str, reduction: str, layers: int | None
) -> None:
    net, x = graphs.made("functional")
    found = []
    for model in (net, as_modules(net)):
        given = dict(variant=variant, memory=memory, reduction=reduction, input_activation=nn.Tanh(), layers=layers)
        if variant == "local" and model is net and layers is None:
            given["layers"] = 3  # the head is a layer of the graph, but not of the chain
        wrapped = racecar.wrap(model, 0.2, **given)
        y = wrapped(x)
        found.append((gradients(net, y.sum() + wrapped.reverse_loss), [*wrapped.reverse_losses.values()]))
        wrapped.unwrap()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_functional_chain_is_full_and_reconstructs() -> None:
    net, x = graphs.made("functional")
    wrapped = racecar.wrap(net, 0.2)
    assert wrapped.plan.variant == "full" and wrapped.plan.names == ["conv1", "conv2", "conv3"]
    assert dict(wrapped.plan.left_out)["head"] == "behind 'conv3', where the chain from the input ends"
    before = {k: v.clone() for k, v in net.state_dict().items()}
    back = wrapped.reconstruct(x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    wrapped.unwrap()
    torch.testing.assert_close(back, racecar.wrap(as_modules(net), 0.2).reconstruct(x))


def test_a_fork_is_named() -> None:
    net, x = graphs.made("residual")
    with pytest.raises(
        ValueError, match=r"unique path.*the output of 'stem.3' behind 'stem.0' goes to 'one.conv1' and"
    ):
        racecar.wrap(net, 1.0, variant="full")
    wrapped = racecar.wrap(net, 1.0)
    with pytest.raises(ValueError, match="unique path from output to input, but the output of 'stem.3'"):
        wrapped.reconstruct(x)


# ------------------------------------------------------------------------------------------ a chain inside


class Classifier(nn.Module):
    """As VGG: a chain of modules, and a head behind a flatten that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, 1, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3, 1, 1),
            nn.ReLU(True),
        )  # fmt: skip
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(self.features(x * 2), 1), 1))


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_a_chain_inside_runs_as_one_node(memory: str) -> None:
    torch.manual_seed(0)
    net, x = Classifier().double(), graphs.images()
    twin = copy.deepcopy(net)
    wrapped = racecar.wrap(net, [0.1, 0.2], memory=memory)
    assert wrapped.plan.names == ["features.0", "features.4"] and wrapped.plan.variant == "full"
    assert "head" in dict(wrapped.plan.left_out) and str(wrapped.plan).endswith("forward and reverse run as one node")
    part = racecar.wrap(twin.features, [0.1, 0.2], memory=memory)
    for _ in range(3):  # the third is replayed
        want = gradients(twin, twin(x).sum() + part.reverse_loss)
        got = gradients(net, wrapped(x).sum() + wrapped.reverse_loss)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert [*wrapped.reverse_losses] == wrapped.plan.names
    assert torch.equal(wrapped.reconstruct(x), part.reconstruct(2 * x))
    wrapped.lam = 0.0
    assert wrapped(x).requires_grad and wrapped.reverse_loss == 0
    wrapped.lam = 0.3
    assert wrapped.lam == [0.3, 0.3]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(wrapped)))
    copied(x)
    wrapped(x)
    assert torch.equal(copied.reverse_loss, wrapped.reverse_loss)
    assert [*wrapped_parts(wrapped)] == [""]
    assert type(wrapped.unwrap()) is Classifier and type(net.features) is nn.Sequential
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_chain_inside_compiles() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    net, x = racecar.wrap(Classifier().double(), 0.1), graphs.images()
    net.features[1].momentum = 0.0
    want = gradients(net, net(x).sum() + net.reverse_loss)
    step = torch.compile(lambda x: net(x).sum() + net.reverse_loss, fullgraph=True, backend="aot_eager")
    for g, w in zip(gradients(net, step(x)), want, strict=True):
        torch.testing.assert_close(g, w)
