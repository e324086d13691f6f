"""Stacked perceptrons: losses and gradients network by network against racecar.wrap and racecar.baselines."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import racecar
from racecar.baselines import autoencoder_stages, srip
from racecar.recipes import stacked
from racecar.recipes.stacked import Decoders, Stack, perceptron
from racecar.recipes.stacked_training import Samples, StackTraining, Terms, accuracies

WIDTHS = (12, 10, 7, 5, 4, 3, 2)
COUNT = 3


@pytest.fixture
def networks() -> list[nn.Sequential]:
    """In float64, with biases that are not 0: those of the initial weights would hide what is subtracted."""
    found = [perceptron(WIDTHS, seed).double() for seed in range(COUNT)]
    generator = torch.Generator().manual_seed(7)
    for network in found:
        for layer in network[::2]:
            nn.init.uniform_(layer.bias, -0.5, 0.5, generator=generator)
    return found


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """x of every network, (N, inputs, batch), and labels −1 and 1."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randint(0, 2, (COUNT, WIDTHS[0], 20), generator=generator).double()
    return x, torch.randint(0, 2, (COUNT, 20), generator=generator).double() * 2 - 1


def check_gradients(
    stack: Stack, loss: torch.Tensor, networks: list[nn.Sequential], losses: list[torch.Tensor]
) -> None:
    """Every network's loss, and its gradient, which must not depend on the others."""
    torch.testing.assert_close(loss, torch.stack(losses), rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(loss.sum(), stack.parameters, allow_unused=True)
    for row, (network, own) in enumerate(zip(networks, losses, strict=True)):
        expected = torch.autograd.grad(own, list(network.parameters()), allow_unused=True)
        for p, ours, theirs in zip(network.parameters(), found, expected, strict=True):
            want = torch.zeros_like(p) if theirs is None else theirs
            got = torch.zeros_like(p) if ours is None else ours[row].reshape(p.shape)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("variant", "layers"), [("full", None), ("full", 1), ("local", None)])
@pytest.mark.parametrize("input_tanh", [False, True])
def test_losses_and_gradients_are_those_of_wrap(networks, batch, variant, layers, input_tanh):
    x, labels = batch
    lam = torch.full((COUNT, len(WIDTHS) - 1), 0.3, dtype=torch.float64)
    if layers is not None:
        lam[:, layers:] = 0
    everybody = (0, COUNT)
    rows = {"full": everybody} if variant == "full" else {"local": everybody}
    stack = Stack.of(networks)
    loss = Terms(**rows, lam=lam, input_tanh=input_tanh).loss(stack, x, labels, torch.Generator())
    losses = []
    for network, own_x, own_labels in zip(networks, x, labels, strict=True):
        activation = nn.Tanh() if input_tanh else None
        net = racecar.wrap(network, lam=0.3, variant=variant, layers=layers, input_activation=activation)
        task = F.cross_entropy(net(own_x.T), (own_labels > 0).long())
        losses.append(task + net.reverse_loss.double())
    # wrap reports its losses in float32 or wider: float64 here
    check_gradients(stack, loss, networks, losses)


def test_reverse_losses_are_those_that_wrap_reports(networks, batch):
    x, _ = batch
    stack = Stack.of(networks)
    d = stacked.states(stack, x)
    found = stacked.reverse_losses(d, stacked.reconstructed(stack, d, full=True, input_tanh=False))
    for network, own_x, own in zip(networks, x, found, strict=True):
        net = racecar.wrap(network, lam=1.0)
        net(own_x.T)
        torch.testing.assert_close(own, torch.stack(list(net.reverse_losses.values())).double(), rtol=1e-9, atol=0)


def test_orthogonality_is_that_of_srip(networks):
    stack, layers = Stack.of(networks), len(WIDTHS) - 1
    v = torch.zeros(COUNT, layers, max(WIDTHS[1:]), 1, dtype=torch.float64)
    losses = []
    for row, network in enumerate(networks):
        generator = torch.Generator().manual_seed(row)
        for m, outputs in enumerate(WIDTHS[1:]):  # as srip draws them, layer by layer
            v[row, m, :outputs] = torch.randn((1, outputs, 1), generator=generator, dtype=torch.float64)[0]
        losses.append(srip(network, generator=torch.Generator().manual_seed(row)))
    check_gradients(stack, stacked.srip(stack, v), networks, losses)


def test_start_vectors_are_zero_where_a_layer_has_no_output(networks):
    v = stacked.start_vectors(Stack.of(networks), torch.Generator().manual_seed(0))
    assert v.shape == (COUNT, 6, 10, 1)
    assert [(own != 0).sum().item() for own in v.transpose(0, 1)] == [COUNT * n for n in WIDTHS[1:]]


@pytest.mark.parametrize("m", range(len(WIDTHS) - 1))
def test_greedy_pretraining_is_that_of_the_autoencoders(networks, batch, m):
    x, _ = batch
    stack = Stack.of(networks)
    stages = [autoencoder_stages(n, x[0].T, seed=row)[m] for row, n in enumerate(networks)]
    ops = [stage.decoder.op for stage in stages]
    decoders = Decoders(
        torch.stack([op.weight.detach() for op in ops]).requires_grad_(),
        torch.stack([op.bias.detach() for op in ops])[..., None].requires_grad_(),
    )
    loss = stacked.autoencoder_loss(stack, m, decoders, x)
    losses = [stage.loss(own_x.T) for stage, own_x in zip(stages, x, strict=True)]
    check_gradients(stack, loss, networks, losses)
    again = stacked.autoencoder_loss(stack, m, decoders, x).sum()
    found = torch.autograd.grad(again, [decoders.weight, decoders.bias])
    for row, (stage, op) in enumerate(zip(stages, ops, strict=True)):
        expected = torch.autograd.grad(stage.loss(x[row].T), [op.weight, op.bias])
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[row].reshape(theirs.shape), theirs, rtol=1e-9, atol=1e-12)


def test_the_cross_entropy_twice_is_that_of_the_authors_code(batch):
    _, labels = batch
    logits = torch.randn(COUNT, 2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    once, twice = (stacked.cross_entropy(logits, labels, twice=twice) for twice in (False, True))
    for row in range(COUNT):
        own, target = logits[row].T, (labels[row] > 0).long()
        torch.testing.assert_close(once[row], F.cross_entropy(own, target))
        torch.testing.assert_close(twice[row], F.cross_entropy(own.softmax(1), target))


def test_training_a_stack_is_training_each_network_with_its_own_adam(networks, batch):
    x, labels = batch
    samples = Samples(x.mT.contiguous(), labels)
    stack = Stack.of(networks)
    lam = torch.zeros(COUNT, 6, dtype=torch.float64)
    lam[2] = 0.05
    terms = Terms(full=(2, 3), lam=lam, input_tanh=True)

    def objective(own_x, own_labels, generator):
        return terms.loss(stack, own_x, own_labels, generator)

    training = StackTraining(
        objective, stack.parameters, samples, batch_size=8, learning_rate=1e-2, seed=0, shuffle=False
    )
    for _ in range(3):
        training.epoch()
    for row, network in enumerate(networks):
        net = racecar.wrap(network, lam=0.05, input_activation=nn.Tanh()) if row == 2 else network
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(3):
            for own_x, own_labels in zip(x[row].T.split(8), labels[row].split(8), strict=True):
                loss = F.cross_entropy(net(own_x), (own_labels > 0).long())
                loss = loss + net.reverse_loss if row == 2 else loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for ours, theirs in zip(stack.network(row).double().parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # `network` gives float32


def test_kinds_of_a_seed_see_the_same_batches_and_labels_may_be_swapped():
    x = torch.arange(2 * 5 * 3).reshape(2, 5, 3).float()
    samples = Samples(x, torch.tensor([[1.0, 1, -1, -1, 1], [1, -1, 1, -1, -1]]))
    seen = []

    def objective(own_x, own_labels, generator):
        seen.append((own_x.clone(), own_labels.clone()))
        return parameter.sum(1) * 0

    parameter = torch.zeros(4, 1, requires_grad=True)
    swap = torch.tensor([1.0, 1, -1, -1])
    StackTraining(objective, [parameter], samples, batch_size=2, learning_rate=1, seed=3, labels=swap).epoch()
    assert [own.shape[2] for own, _ in seen] == [2, 2, 1]
    together = torch.cat([own for own, _ in seen], 2)
    labels = torch.cat([own for _, own in seen], 1)
    assert torch.equal(together[:2], together[2:]) and torch.equal(labels[:2], -labels[2:])
    for seed in range(2):
        order = [x[seed].tolist().index(column.tolist()) for column in together[seed].T]
        assert sorted(order) == list(range(5))
        assert labels[seed].tolist() == samples.labels[seed][order].tolist()


def test_a_training_goes_on_where_it_was(batch):
    x, labels = batch
    samples = Samples(x.mT.contiguous().float(), labels.float())

    def begin():
        stack = Stack.of([perceptron(WIDTHS, seed) for seed in range(COUNT)])
        terms = Terms(orthogonal=(0, 2), factor=0.1)  # draws from the generator
        return stack, StackTraining(
            lambda *batch: terms.loss(stack, *batch),
            stack.parameters,
            samples,
            batch_size=8,
            learning_rate=1e-2,
            seed=0,
        )

    whole, training = begin()
    for _ in range(4):
        training.epoch()
    _, first = begin()
    first.epoch(), first.epoch()
    kept = first.state_dict()
    first.epoch()  # must not change what was kept
    halves, second = begin()
    second.load_state_dict(kept)
    second.epoch(), second.epoch()
    assert second.epochs == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, halves.parameters, strict=True))


def test_accuracies(networks, batch):
    x, labels = batch
    stack = Stack.of(networks)
    found = accuracies(stack, Samples(x.mT, labels))
    swapped = accuracies(stack, Samples(x.mT, labels), -torch.ones(COUNT))
    for row, network in enumerate(networks):
        right = (network(x[row].T).argmax(1) == (labels[row] > 0)).double().mean()
        assert found[row].item() == pytest.approx(right.item()) and swapped[row].item() == pytest.approx(
            1 - right.item()
        )


def test_initial_weights_are_cut_normal_and_the_seed_is_their_own():
    state = torch.random.get_rng_state()
    first, again, other = perceptron((400, 300), 1), perceptron((400, 300), 1), perceptron((400, 300), 2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first[0].weight, again[0].weight) and not torch.equal(first[0].weight, other[0].weight)
    assert first[0].weight.abs().max() <= 0.1 + 1e-6
    assert first[0].weight.std().item() == pytest.approx(0.05 * 0.8796, rel=0.02)  # of a normal one cut at ±2σ
    assert not first[0].bias.any()
