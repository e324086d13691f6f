"""What the report shows of the networks that phase I left: reconstructions, first-layer patterns, reversibility."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from torch import Tensor, nn

from racecar_kernels import describe

from ..analysis import (
    LayerReversibility,
    MutualInformationPlane,
    data_modes,
    layer_modes,
    reconstructions,
    reversibility,
)
from ..experiments.contestants import chosen
from ..experiments.jobs import Job
from .results import LayerError, Pictures, Reconstruction, Results
from .workplace import Workplace

SHOWN = 10  # images and patterns per row of a picture


def examine(place: Workplace, results: Results, pictures: Pictures, seeds: int) -> None:
    """Adds what can be seen of the networks after phase I: pictures of seed 0, layers of all seeds."""
    x = place.tasks["A"].test_x
    examples = first_images(place)
    pictures["input"] = x[examples].numpy()
    pictures["blurred"] = place.tasks["B"].test_x[examples].numpy()
    best = data_modes(x, SHOWN)
    pictures["modes data"] = best.images
    results.energy["data"] = best.energy(x)
    for contestant in chosen(place.settings.models):
        name = contestant.name
        networks = [Job(place, contestant, seed).load() for seed in range(seeds)]
        back = reconstructions(networks[0], x)
        pictures[f"reconstruction {name}"] = back.images[-1][examples]
        results.reconstructions[name] = Reconstruction(
            *(float(own[-1]) for own in (back.gain, back.error, back.error_with_gain))
        )
        results.depths[name] = dict(zip(back.names, back.error_with_gain.tolist(), strict=True))
        modes = layer_modes(first_layer(networks[0]), place.image_shape, SHOWN)
        pictures[f"modes {name}"] = modes.images
        results.energy[name] = modes.energy(x)
        results.reversibility[name] = mean_errors([reversibility(network, x) for network in networks])
        results.information[name] = mean_information(networks, x, place.tasks["A"].test_y)


def first_images(place: Workplace) -> list[int]:
    """Index of the first test image of each class, up to ten; nothing is picked by hand."""
    y = place.tasks["A"].test_y
    return [int((y == label).nonzero()[0]) for label in range(place.classes)][:SHOWN]


def mean_errors(found: Sequence[Sequence[LayerReversibility]]) -> dict[str, LayerError]:
    """Errors of every layer, mean over the networks."""
    return {
        layers[0].name: LayerError(
            local=statistics.fmean(layer.local for layer in layers),
            full=statistics.fmean(layer.full for layer in layers),
        )
        for layers in zip(*found, strict=True)
    }


def mean_information(networks: Sequence[nn.Module], x: Tensor, y: Tensor) -> dict[str, list[float]]:
    """[I(X; D), I(D; Y)] of what every layer receives, and of what the last one gives; mean over the networks."""
    plane = MutualInformationPlane(x, y)
    for number, network in enumerate(networks):
        plane.record(network, number)  # every network in its place of an epoch
    found = plane.result
    means = zip(found.names, found.about_x.mean(0).tolist(), found.about_y.mean(0).tolist(), strict=True)
    return {name: [about_x, about_y] for name, about_x, about_y in means}


def first_layer(network: nn.Module) -> nn.Module:
    """The first tied operation of a chain."""
    return next(module for module in network.modules() if describe.is_a(module, describe.TIED))
