"""What the demo found out, and how it is kept: `results.json` and `pictures.npz` are enough to redraw the report."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..training.history import replace_text

FORMAT = 2
PHASES = ("I", "A→A", "A→B")
PHASE_TITLES = {
    "I": "phase I: task A, with the reverse loss where the model has one",
    "A→A": "phase II: fine-tuned on task A, plain",
    "A→B": "phase II: transferred to task B, plain",
}


class ResultsError(ValueError):
    """A folder whose results cannot be read back."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        model, seed, phase: which.
        task_loss, reverse_loss: one value per epoch. The reverse loss has its λ in it.
        layer_losses: layer -> one value per epoch, without λ: its reverse loss, or its autoencoder's.
        accuracy: on the test images, or with --validate on those set aside, at evenly spaced epochs; the last is the
            result. Empty without labels.
        seconds: wall-clock time of the run, tests included.
    """

    model: str
    seed: int
    phase: str
    task_loss: list[float]
    reverse_loss: list[float]
    layer_losses: dict[str, list[float]]
    accuracy: list[float]
    seconds: float


@dataclass(frozen=True)
class Cost:
    """What a step of phase I costs; of layer-wise pretraining: one step of every layer's autoencoder.

    Attributes:
        milliseconds, p20, p80: median and percentiles of one step (forward, backward, optimiser).
        time_ratio: median over rounds of the ratio to the first model's step in the same round.
        kept: bytes that autograd keeps for the backward pass.
        kept_ratio: the same, as a ratio to the first model's.
        peak, peak_ratio: the most bytes that a step holds at once, beyond what it begins with.
    """

    milliseconds: float
    p20: float
    p80: float
    time_ratio: float
    kept: int
    kept_ratio: float
    peak: int
    peak_ratio: float


@dataclass(frozen=True)
class Reconstruction:
    """How well a model's full reverse pass gives back its input after phase I, over the test set, first seed.

    Attributes:
        gain: the number g that makes ‖d − g·d'‖ smallest; 1 where the scale is right.
        error: ‖d − d'‖ / ‖d‖ as it comes back.
        error_with_gain: the same after multiplication with the gain; at most 1.
    """

    gain: float
    error: float
    error_with_gain: float


@dataclass(frozen=True)
class LayerError:
    """‖d_m − g·d'_m‖ / ‖d_m‖ of one layer over the test set, with the best gain g; at most 1.

    Attributes:
        local: when it is reversed from its own output.
        full: when what comes back from the network's output reaches it.
    """

    local: float
    full: float


@dataclass
class Results:
    """Everything the table and the report show, but for the pictures.

    Attributes:
        models: name -> title, in the order of the table; ratios refer to the first.
        runs: every training run.
        costs, reconstructions: by model.
        reversibility: model -> layer -> how well it comes back after phase I, mean over the seeds.
        information: model -> D1, D2, ... -> [I(X; D), I(D; Y)] in bits after phase I, mean over the seeds.
        depths: model -> layer -> error, with gain, of the image that comes back when the reverse starts behind that
            layer; first seed. Empty in results of older versions.
        energy: share of the data's energy in its first-layer patterns, by model; "data": the best there is.
        data, settings, versions: name -> value, as the report prints them.
        command: the command line that began the demo.
        started: local time, ISO 8601. seconds: how long it took.
        resumed: whether it went on with an earlier demo's runs, which the seconds do not hold.
    """

    models: dict[str, str]
    data: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    command: str = ""
    started: str = ""
    seconds: float = 0.0
    resumed: bool = False
    runs: list[Run] = field(default_factory=list)
    costs: dict[str, Cost] = field(default_factory=dict)
    reconstructions: dict[str, Reconstruction] = field(default_factory=dict)
    reversibility: dict[str, dict[str, LayerError]] = field(default_factory=dict)
    depths: dict[str, dict[str, float]] = field(default_factory=dict)
    information: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)

    def select(self, model: str, phase: str) -> list[Run]:
        """The runs of one model in one phase, by seed."""
        return sorted((r for r in self.runs if (r.model, r.phase) == (model, phase)), key=lambda r: r.seed)

    def last_accuracies(self, model: str, phase: str) -> list[float]:
        """The accuracy at the end of every run of one model in one phase, by seed; empty where there are no labels."""
        return [run.accuracy[-1] for run in self.select(model, phase) if run.accuracy]

    def accuracy(self, model: str, phase: str) -> tuple[float, float | None] | None:
        """Mean and sample standard deviation over the seeds of the last accuracy.

        The deviation is None for a single seed, the whole None for a phase without labels.
        """
        last = self.last_accuracies(model, phase)
        if not last:
            return None
        return statistics.fmean(last), statistics.stdev(last) if len(last) > 1 else None


Pictures = dict[str, NDArray[np.float32]]
"""Name -> images (count, channels, height, width): "input", "blurred", "modes data", and, by model, "reconstruction
NAME" (gain not applied) and "modes NAME"."""


def save_results(results: Results, pictures: Pictures, folder: Path) -> None:
    """Writes `results.json` and `pictures.npz` into the folder."""
    partial = folder / "pictures.npz.partial"
    with partial.open("wb") as file:
        np.savez_compressed(file, **pictures)  # type: ignore[arg-type]
    os.replace(partial, folder / "pictures.npz")
    content = json.dumps({"format": FORMAT, **asdict(results)}, indent=1, ensure_ascii=False)
    replace_text(folder / "results.json", content + "\n")


def load_results(folder: Path) -> tuple[Results, Pictures]:
    """Reads back what `save_results` wrote.

    Raises:
        ResultsError: one of the two files is missing, damaged or of another format.
    """
    try:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        with np.load(folder / "pictures.npz", allow_pickle=False) as archive:
            pictures = {name: archive[name] for name in archive.files}
        found = content.pop("format")
        if found != FORMAT:
            raise ResultsError(f"{folder}: results of format {found}; this version reads format {FORMAT}")
        content["runs"] = [Run(**run) for run in content["runs"]]
        content["costs"] = {name: Cost(**cost) for name, cost in content["costs"].items()}
        made = content["reconstructions"]
        content["reconstructions"] = {name: Reconstruction(**values) for name, values in made.items()}
        content["reversibility"] = {
            name: {layer: LayerError(**values) for layer, values in layers.items()}
            for name, layers in content["reversibility"].items()
        }
        return Results(**content), pictures
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{folder}: holds no results of a demo ({error})") from error
    except ValueError as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(f"{folder}: damaged results ({error})") from error
