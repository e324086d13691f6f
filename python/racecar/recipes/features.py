"""What the recipes `peak` and `mnist-svd` share: are a first layer's right singular vectors what the classes look like?

Xie & Thuerey 2020, section 3: a reverse pass through a linear layer, d' = Wᵀ W d, gives d back where d lies in the span
of W's right singular vectors with singular values of 1. So training with it embeds the data's dominant features there.
Measured is how near the image of a class comes to one of these vectors, |cos|, and to the span of the first ten.

The protocol is that of the authors' published example: raw grey levels, Glorot's uniform weights, one batch of all
images, and a softmax in front of the one that the cross-entropy has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import racecar

from ..analysis.modes import layer_modes
from ..analysis.pictures import Row, draw_rows, grey_levels, signed_levels
from ..baselines import srip
from ..bench.machine import facts
from ..experiments.folder import SettingsError
from ..experiments.threads import cpu_threads
from ..training.history import replace_text
from .folder import RESULTS, TABLE, RunFolder
from .listener import Listener
from .networks import glorot_
from .tables import comparison

KINDS = ("Std", "Ort", "RR")
VECTORS = 10
FIGURE = "vectors.png"
FORMAT = 1
COLUMNS = ("cosine, class 0", "cosine, class 1", "in the span")


@dataclass(frozen=True)
class Settings:
    """Options of a run; the defaults are the published protocol.

    Attributes:
        preset: where they are from.
        seeds: how many; they are 0 .. seeds − 1, and draw the weights, and the images where these are drawn.
        epochs: steps, since a step sees all images.
        lam: λ of every layer of RR, of half the sum of squares.
        ort: factor of Ort's penalty (SRIP).
        learning_rate: of Adam.
        twice: softmax once more in front of the cross-entropy.
        validate: refused; nothing is chosen here by what comes out.
        threads: CPU threads.
        save_every_s: unused; a checkpoint is written after every network, of which each takes well under a minute.
    """

    preset: str = "paper"
    seeds: int = 5
    epochs: int = 1000
    lam: float = 1e-5
    ort: float = 0.1
    learning_rate: float = 1e-4
    twice: bool = True
    validate: bool = False
    threads: int = 1
    save_every_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "threads"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.validate:
            raise SettingsError("this recipe has nothing to choose by validation; leave out --validate")


@dataclass(frozen=True, eq=False)
class Images:
    """What one seed trains and tests on.

    Attributes:
        train_x: (images, pixels) in 0 .. 255. train_y: (images,). test_x, test_y: the same.
        side: height and width.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    side: int

    def classes(self) -> Tensor:
        """Mean image of each of the two classes, (2, pixels)."""
        return torch.stack([self.train_x[self.train_y == label].mean(0) for label in (0, 1)])


@dataclass(frozen=True)
class Problem:
    """One of the two recipes.

    Attributes:
        name: of the recipe.
        images: the seed -> its images.
        network: pixels -> the network with PyTorch's own initial weights; its first module is the layer looked at.
        source: where the images are from, in words. fingerprint: tells other data apart.
        paper: model -> column of `COLUMNS` -> what the authors' published code gives.
    """

    name: str
    images: Callable[[int], Images]
    network: Callable[[int], nn.Sequential]
    source: str
    fingerprint: int
    paper: Mapping[str, Mapping[str, float]]


def trained(
    kind: str, network: nn.Sequential, images: Images, settings: Settings, advance: Callable[[int], None]
) -> nn.Sequential:
    """Trains in place, as one of `KINDS`; plain again afterwards, in eval mode."""
    if kind == "RR":
        racecar.wrap(network, settings.lam, variant="full")
    net: Any = network
    optimizer = torch.optim.Adam(network.parameters(), settings.learning_rate)
    for _ in range(settings.epochs):
        optimizer.zero_grad()
        out = net(images.train_x)
        loss = F.cross_entropy(out.softmax(1) if settings.twice else out, images.train_y)
        if kind == "RR":
            loss = loss + net.reverse_loss
        elif kind == "Ort":
            loss = loss + settings.ort * srip(network, side="smaller")
        loss.backward()
        optimizer.step()
        advance(1)
    if kind == "RR":
        net.unwrap()
    return network.eval()


@torch.no_grad()
def measured(network: nn.Sequential, images: Images) -> dict[str, Any]:
    """Accuracies, and how the first layer's right singular vectors lie to the classes; vectors with the images' signs.

    The singular vectors have no sign of their own: each is turned so that it points to where the classes lie.
    """
    modes = layer_modes(network[0], tuple(images.train_x.shape[1:]), VECTORS)
    vectors = torch.from_numpy(np.asarray(modes.images, np.float64)).flatten(1)
    vectors = F.normalize(vectors, dim=1)
    cosines = vectors @ F.normalize(images.classes().double(), dim=1).T
    signs = torch.where(cosines.sum(1, keepdim=True) < 0, -1.0, 1.0)
    return {
        "train accuracy": accuracy(network, images.train_x, images.train_y),
        "test accuracy": accuracy(network, images.test_x, images.test_y),
        "cosines": cosines.abs().tolist(),
        "singular values": [float(value) for value in modes.singular_values],
        "span": cosines.norm(dim=0).tolist(),
        "vectors": (vectors * signs).float(),
    }


def perceptual_metric() -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str]:
    """LPIPS (Zhang et al. 2018) with AlexNet's features; or None and why: package and weights are the user's."""
    try:
        import lpips  # type: ignore[import-not-found]

        return lpips.LPIPS(net="alex", verbose=False).eval(), ""
    except Exception as error:  # weights that cannot be read or fetched raise anything
        missing = isinstance(error, ModuleNotFoundError)
        return None, "not installed" if missing else f"{type(error).__name__}: {error}".splitlines()[0]


@torch.no_grad()
def perceptual_distances(metric: Callable[[Tensor, Tensor], Tensor], vectors: Tensor, images: Images) -> list[float]:
    """LPIPS between either class and the vector that is nearest by it; both scaled to −1 .. 1, and to 64×64."""

    def pictures(x: Tensor) -> Tensor:
        square = (x / x.abs().amax(1, keepdim=True).clamp_min(1e-12)).reshape(-1, 1, images.side, images.side)
        return F.interpolate(square, size=64, mode="bilinear").expand(-1, 3, -1, -1)

    shown = pictures(vectors)
    return [float(metric(shown, one.expand_as(shown)).min()) for one in pictures(images.classes() / 127.5 - 1)]


def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images whose class is named."""
    return float((network(x).argmax(1) == y).double().mean())


def run_problem(
    problem: Problem, settings: Settings, folder: RunFolder, data: Path | None, command: str, listener: Listener,
    *, resume: bool, overwrite: bool,
) -> dict[str, Any]:  # fmt: skip
    """Trains every kind with every seed that is not done yet, then writes results, table and figure.

    Returns:
        What `results.json` holds.

    Raises:
        SettingsError: a folder that holds something else, before anything is computed.
        OSError: the disk is full or gone. KeyboardInterrupt: Ctrl-C. What was finished stays, for `resume`.
    """
    with folder.held():
        folder.begin(settings, data, problem.fingerprint, command, resume=resume, overwrite=overwrite)
        state = folder.load() or {"started": datetime.now().astimezone().isoformat(timespec="seconds"), "runs": {}}
        with cpu_threads(settings.threads):
            train_all(problem, settings, folder, state, listener)
        content = results_of(problem, settings, folder, state)
        metric, content["no LPIPS"] = perceptual_metric()
        if metric is not None:
            for name, run in content["runs"].items():
                images = problem.images(int(name.rpartition("seed")[2]))
                run["LPIPS"] = perceptual_distances(metric, state["runs"][name]["vectors"], images)
        replace_text(folder.path / RESULTS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        replace_text(folder.path / TABLE, table_page(problem, settings, content))
        draw(problem, state).savefig(folder.path / FIGURE, dpi=110, bbox_inches="tight")
        folder.finish()
    return content


def train_all(
    problem: Problem, settings: Settings, folder: RunFolder, state: dict[str, Any], listener: Listener
) -> None:
    """Every kind with every seed, seeds in the outer loop; each is kept as soon as it is finished."""
    jobs = [(kind, seed) for seed in range(settings.seeds) for kind in KINDS]
    left = [job for job in jobs if key(*job) not in state["runs"]]
    listener.plan(len(jobs) * settings.epochs, (len(jobs) - len(left)) * settings.epochs)
    for kind, seed in left:
        listener.stage(f"{kind}, seed {seed}")
        images, began = problem.images(seed), time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = problem.network(images.train_x.shape[1])
            glorot_(network)
            trained(kind, network, images, settings, listener.advance)
        state["runs"][key(kind, seed)] = {**measured(network, images), "seconds": time.perf_counter() - began}
        folder.save(state)


def key(kind: str, seed: int) -> str:
    return f"{kind}-seed{seed}"


def results_of(problem: Problem, settings: Settings, folder: RunFolder, state: dict[str, Any]) -> dict[str, Any]:
    """Ready for JSON; without the vectors, which the figure shows."""
    runs = {name: {what: v for what, v in run.items() if what != "vectors"} for name, run in state["runs"].items()}
    return {
        "format": FORMAT,
        "recipe": problem.name,
        "command": folder.command,
        "settings": asdict(settings),
        "data": problem.source,
        "machine": facts(),
        "started": state["started"],
        "seconds": sum(run["seconds"] for run in runs.values()),
        "published": problem.paper,
        "runs": runs,
    }


def columns_of(runs: Mapping[str, Any], seeds: int) -> dict[str, dict[str, list[float]]]:
    """Model -> column -> one value for every seed: the nearest vector of either class, the lesser share in the span."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind in KINDS:
        own = [runs[key(kind, seed)] for seed in range(seeds)]
        nearest = [np.max(run["cosines"], axis=0).tolist() for run in own]
        columns = [[n[0] for n in nearest], [n[1] for n in nearest], [min(run["span"]) for run in own]]
        found[kind] = dict(zip(COLUMNS, columns, strict=True))
    return found


def table_page(problem: Problem, settings: Settings, content: Mapping[str, Any]) -> str:
    """The table and how it came about, as a Markdown page."""
    machine, runs = content["machine"], content["runs"]
    tested = [
        f"{kind} {np.mean([runs[key(kind, seed)]['test accuracy'] for seed in range(settings.seeds)]):.2f}"
        for kind in KINDS
    ]
    return "\n".join(
        [
            f"# {problem.name}: singular vectors beside the classes, seeds: {settings.seeds}, preset {settings.preset}",
            "",
            comparison(problem.paper, columns_of(runs, settings.seeds), COLUMNS, digits=2, reference="published"),
            "",
            "Published: what the authors' code gives. Here: mean ± standard deviation over the seeds; differences "
            "paired over the seeds, p of a t-test after Holm's correction. Cosine: its size, between a class (the mean "
            f"of its images) and the nearest of the first {VECTORS} right singular vectors of the first layer. In the "
            "span: length of a class's projection onto these vectors, were it 1 long; the lesser of the two classes.",
            "",
            perceptual_line(runs, settings.seeds, content["no LPIPS"]),
            f"- {settings.epochs} steps with all images; test accuracy: {', '.join(tested)}",
            f"- command: `{content['command']}`",
            f"- data: {content['data']}",
            f"- machine: {machine['processor']}, {settings.threads} of {machine['cores']} cores, "
            f"PyTorch {machine['torch']}, commit {machine['commit']}",
            f"- training took {content['seconds']:.0f} s, begun {content['started']}",
            "",
        ]
    )  # fmt: skip


def perceptual_line(runs: Mapping[str, Any], seeds: int, why_not: str) -> str:
    """LPIPS of every kind, mean over classes and seeds, or why it is not there."""
    if why_not:
        return f"- LPIPS is not measured: it needs the package lpips and its weights ({why_not})"
    means = {kind: np.mean([runs[key(kind, seed)]["LPIPS"] for seed in range(seeds)]) for kind in KINDS}
    return "- LPIPS to the nearest vector, less is nearer: " + ", ".join(f"{k} {v:.2f}" for k, v in means.items())


def draw(problem: Problem, state: Mapping[str, Any]) -> Any:
    """The classes of the first seed, and below them the first vectors of every kind: a figure."""
    images = problem.images(0)
    shape = (-1, 1, images.side, images.side)

    def pictures(x: Tensor) -> NDArray[np.float32]:
        found: NDArray[np.float32] = x.reshape(shape).numpy().astype(np.float32)
        return found

    rows = [Row("classes", pictures(images.classes() / 255), grey_levels)]
    for kind in KINDS:
        run = state["runs"][key(kind, 0)]
        nearest: Sequence[float] = np.max(run["cosines"], axis=0).tolist()
        details = (f"cosine {nearest[0]:.2f}, {nearest[1]:.2f}",)
        rows.append(Row(kind, pictures(run["vectors"]), signed_levels, details))
    return draw_rows(rows)
