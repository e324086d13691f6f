"""The report's look inside the networks: what comes back, layer by layer, and what the first layer looks at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from html import escape

from ..analysis.pictures import Row, grey_levels, signed_levels
from .page import model_label, note, picture_grid, table
from .results import LayerError, Pictures, Results
from .text import figure_text, first_images_text, joined, tested_on


def reconstruction_rows(results: Results, pictures: Pictures) -> list[Row]:
    """The input, then every model's reconstruction, multiplied with its gain."""
    rows = [Row("input", pictures["input"], grey_levels)]
    for name, made in results.reconstructions.items():
        details = (f"× {figure_text(made.gain)}", f"error {figure_text(made.error_with_gain)}")
        images = pictures[f"reconstruction {name}"] * made.gain
        rows.append(Row(name, images, grey_levels, details))
    return rows


def reconstruction_section(results: Results, pictures: Pictures) -> Iterable[str]:
    """Inputs, what each model gives back, and what the figure means."""
    yield picture_grid(reconstruction_rows(results, pictures), what="reconstructed image")
    unscaled = ", ".join(f"{escape(name)} {figure_text(made.error)}" for name, made in results.reconstructions.items())
    yield note(
        f"{escape(first_images_text(results))} goes through the convolutions as phase I left them (seed 0) and all the "
        f"way back through the same weights, transposed; no decoder takes part. It may come back at another scale: "
        f"each row is multiplied with the one number that fits all {tested_on(results)} best. Error: ‖d − d′‖ / ‖d‖ "
        f"over all {tested_on(results)}, 0 where they come back exactly. Without that number it is: {unscaled}."
    )
    yield from depth_table(results)


def depth_table(results: Results) -> Iterable[str]:
    """Every model's error of the image by the layer behind which the reverse starts; nothing where it is not known."""
    layers = list(next(iter(results.depths.values()), {}))
    if not layers:
        return
    numbers = layer_numbers(results)
    rows = [
        (model_label(results, name), [heat(errors[layer]) for layer in layers])
        for name, errors in results.depths.items()
    ]
    title = "Error of the image, by depth"
    yield f"<h3>{title}</h3>{table(title, [f'from layer {numbers[layer]}' for layer in layers], rows)}"
    yield note(
        "The same error, with the best number for each entry, when the way back starts not at the end but behind the "
        "first layer, the second, and so on: where it grows, something of the image is lost."
    )


def layer_numbers(results: Results) -> dict[str, int]:
    """A layer's name in the network -> its number, counted from the input."""
    found = [layer for errors in results.reversibility.values() for layer in errors]
    found += [layer for run in results.runs for layer in run.layer_losses]
    return {layer: number for number, layer in enumerate(dict.fromkeys(found), 1)}


def reversibility_section(results: Results) -> Iterable[str]:
    """Every layer's error by model, reversed from its own output and from the network's."""
    layers = list(next(iter(results.reversibility.values()), {}))
    if not layers:
        return
    ways: dict[str, Callable[[LayerError], float]] = {
        "From its own output (local)": lambda error: error.local,
        "From the network's output (full)": lambda error: error.full,
    }
    numbers = layer_numbers(results)
    tables = []
    for title, of in ways.items():
        rows = []
        for name, errors in results.reversibility.items():
            cells = [heat(of(errors[layer])) for layer in layers]
            rows.append((model_label(results, name), cells))
        head = [f"layer {numbers[layer]}" for layer in layers]
        tables.append(f"<div><h3>{escape(title)}</h3>{table(title, head, rows)}</div>")
    yield f'<div class="pair">{"".join(tables)}</div>'
    modules = joined([escape(layer) for layer in layers])
    yield note(
        f"Relative error ‖d − g·d′‖ / ‖d‖ between what a layer receives, d, and what comes back to it, d′, with the "
        f"best gain g, over the {tested_on(results)} after phase I, mean over the seeds: 0 where it comes back but for "
        f"its scale, 1 where nothing of it does; the stronger the tint, the better. Own output: the layer is reversed "
        f"by itself. Network's output: what has come back through all layers above it. Layers are counted from the "
        f"input (in the network: {modules})."
    )


def information_section(results: Results) -> Iterable[str]:
    """Every model's place in the mutual-information plane, layer by layer; and what that can tell here."""
    layers = list(next(iter(results.information.values()), {}))
    if not layers:
        return
    bound = math.log2(results.data["used"][1])
    rows = [
        (model_label(results, name), [f"{own[layer][0]:.2f}, {own[layer][1]:.2f}" for layer in layers])
        for name, own in results.information.items()
    ]
    title = "I(X; D), I(D; Y), in bits"
    yield table(title, layers, rows)
    everywhere = [own[layer][0] for own in results.information.values() for layer in layers]
    saturated = "" if min(everywhere) < 0.99 * bound else (
        " Here every layer of every model lies at that bound, so that the plane says nothing of them; the recipe "
        "<code>racecar run mi</code> draws it for a network of few units."
    )  # fmt: skip
    yield note(
        f"What each layer receives (D1 is the image; the last, what comes out of the convolutions) tells about which "
        f"image it is, X, and about its class, Y, with 30 bins for every unit, after phase I, mean over the seeds. "
        f"I(X; D) is at most log₂ of the number of images, {bound:.2f} bits, and is there as soon as a layer tells "
        f"them all apart, whatever it has learned.{saturated}"
    )


def heat(error: float) -> str:
    """A figure with a tint, the stronger the smaller the error."""
    strength = min(1.0, max(0.0, 1 - error)) if math.isfinite(error) else 0.0
    return f'<span class="heat" style="--h:{strength:.3f}">{error:.2f}</span>'


def modes_section(results: Results, pictures: Pictures) -> Iterable[str]:
    """First-layer right singular vectors of every model beside those of the data."""
    names = ["data", *results.models]
    rows = [
        Row(name, pictures[f"modes {name}"], signed_levels, (f"holds {results.energy[name]:.0%}",)) for name in names
    ]
    yield picture_grid(rows, what="pattern")
    count, channels = pictures["modes data"].shape[:2]
    colours = "Red positive, blue negative" if channels == 1 else "Grey is zero, other colours are departures from it"
    yield note(
        f"The {count} directions in which the first layer responds most, strongest first: right singular vectors of "
        f"its matrix on the whole image (seed 0, after phase I). In the first row those of the data (the "
        f"{tested_on(results)} as rows of a matrix, mean not removed). {colours}, each scaled to its largest entry."
    ) + note(
        f"Holds: share of the data's energy, the sum of squares, in the span of the row's directions; "
        f"{count} random ones hold {count / pictures['modes data'][0].size:.0%}, no {count} hold more than the "
        f"data's own.",
        "A convolution treats all places alike, so its directions are oscillations across the image whatever it was "
        "trained on; training chooses which.",
    )
