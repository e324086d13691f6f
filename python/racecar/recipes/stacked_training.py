"""The training loop of a stack of perceptrons: an epoch at a time, with everything that a resumed run needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import stacked
from .stacked import Stack

Rows = tuple[int, int]
"""First row, and the one behind the last."""


@dataclass(frozen=True)
class Terms:
    """What the networks of a stack minimise: the task's loss, and in some rows something beside it.

    Attributes:
        full, local: rows with a reverse pass, full or layer by layer.
        lam: λ of every network and layer, (N, n); read in the rows above.
        orthogonal: rows that are kept nearly orthogonal. factor: of that penalty.
        input_tanh: whether the reverse pass applies tanh to what comes back at the input.
        twice: see `stacked.cross_entropy`.
    """

    full: Rows = (0, 0)
    local: Rows = (0, 0)
    lam: Tensor | None = None
    orthogonal: Rows = (0, 0)
    factor: float = 0.0
    input_tanh: bool = True
    twice: bool = False

    def loss(self, stack: Stack, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Every network's loss on its own batch: (N,).

        Args:
            stack: the networks.
            x: (N, inputs, batch).
            labels: −1 or 1, (N, batch).
            generator: of the orthogonality penalty's random vectors.
        """
        d = stacked.states(stack, x)
        loss = stacked.cross_entropy(d[-1], labels, twice=self.twice)
        for (start, stop), full in ((self.full, True), (self.local, False)):
            rows = slice(start, stop)
            if stop > start and self.lam is not None:
                own, part = stack.rows(rows), [state[rows] for state in d]
                back = stacked.reconstructed(own, part, full=full, input_tanh=self.input_tanh)
                loss = _added(loss, rows, stacked.weighted_reverse(part, back, self.lam[rows]))
        rows = slice(*self.orthogonal)
        if rows.stop > rows.start:
            own = stack.rows(rows)
            penalty = stacked.srip(own, stacked.start_vectors(own, generator))
            loss = _added(loss, rows, self.factor * penalty)
        return loss


def _added(loss: Tensor, rows: slice, more: Tensor) -> Tensor:
    return torch.cat([loss[: rows.start], loss[rows] + more, loss[rows.stop :]])


Objective = Callable[[Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Samples:
    """What the networks learn from: a set of samples for every seed.

    Attributes:
        x: (seeds, samples, inputs). labels: −1 or 1, (seeds, samples).
    """

    x: Tensor
    labels: Tensor

    def in_order(self) -> tuple[Tensor, Tensor]:
        """All samples as they are: (seeds, inputs, samples) and (seeds, samples)."""
        return self.x.mT.contiguous(), self.labels

    def shuffled(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """All samples, in an order of its own for every seed: (seeds, inputs, samples) and (seeds, samples)."""
        seeds, count, _ = self.x.shape
        order = torch.stack([torch.randperm(count, generator=generator) for _ in range(seeds)])
        x = torch.take_along_dim(self.x, order[..., None], 1)
        return x.mT.contiguous(), self.labels.gather(1, order)


class StackTraining:
    """Adam on all networks of a stack together; it works element by element, so that each gets its own.

    Rows are ordered by kind first, then by seed: row = kind · seeds + seed. All kinds see the same batches.

    Args:
        objective: (x, labels, generator) -> every network's loss, (N,); x is (N, inputs, batch), labels (N, batch), and
            the generator is for what is drawn besides.
        parameters: leaves, (N, ...) each; trained in place.
        samples: of every seed.
        batch_size: samples per step.
        learning_rate: of Adam.
        seed: of the order of samples, and of all that is drawn.
        labels: factor of every network's labels, (N,): −1 swaps the classes. None: 1.
        shuffle: whether every epoch has an order of its own for every seed; False: that of the samples.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Sequence[Tensor],
        samples: Samples,
        *,
        batch_size: int,
        learning_rate: float,
        seed: int,
        labels: Tensor | None = None,
        shuffle: bool = True,
    ) -> None:
        self.objective, self.parameters = objective, list(parameters)
        self.samples, self.batch_size, self.shuffle = samples, batch_size, shuffle
        self.optimizer = torch.optim.Adam(self.parameters, learning_rate, fused=True)
        self.generator = torch.Generator().manual_seed(seed)
        count = len(self.parameters[0])
        self.kinds = count // len(samples.x)
        self.labels = torch.ones(count) if labels is None else labels
        self.epochs = 0

    def epoch(self) -> Tensor:
        """Trains once over the samples. Returns every network's mean loss over the batches: (N,)."""
        x, labels = self.samples.shuffled(self.generator) if self.shuffle else self.samples.in_order()
        total = torch.zeros(len(self.labels))
        batches = list(zip(x.split(self.batch_size, 2), labels.split(self.batch_size, 1), strict=True))
        for own_x, own_labels in batches:
            total += self.step(own_x.repeat(self.kinds, 1, 1), own_labels.repeat(self.kinds, 1) * self.labels[:, None])
        self.epochs += 1
        return total / len(batches)

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """One step of Adam. Returns every network's loss before it."""
        loss = self.objective(x, labels, self.generator)
        for p, grad in zip(self.parameters, torch.autograd.grad(loss.sum(), self.parameters), strict=True):
            p.grad = grad
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on."""
        return {
            "epochs": self.epochs,
            "parameters": [p.detach().clone() for p in self.parameters],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),  # it hands its own tensors out
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        with torch.no_grad():
            for p, kept in zip(self.parameters, state["parameters"], strict=True):
                p.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.epochs = state["epochs"]


@torch.no_grad()
def accuracies(stack: Stack, samples: Samples, labels: Tensor | None = None) -> Tensor:
    """Share of the samples that every network names rightly: (N,). Labels as in `StackTraining`."""
    kinds = len(stack) // len(samples.x)
    d = stacked.states(stack, samples.x.mT.repeat(kinds, 1, 1))
    own = samples.labels.repeat(kinds, 1)
    return stacked.accuracy(d[-1], own if labels is None else own * labels[:, None])
