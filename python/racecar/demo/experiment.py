"""The demo itself: every contestant and seed through phase I, A→A and A→B, then costs, pictures, report."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor, nn

import racecar

from ..data import ImageData, load_images, motion_blur
from .checkpoints import save_checkpoint
from .contestants import CONTESTANTS, Contestant, fresh_network
from .costs import measure_costs
from .results import PHASES, Pictures, Reconstruction, Results, Run, save_results
from .settings import Settings, SettingsError
from .singular_vectors import data_modes, first_layer_modes
from .training import Task, train

MAX_SIDE = 32  # a longer side is shrunk to it: what two CPU cores finish in about three minutes
LARGE = 64  # from a longer side above this on, what comes before the first training step is announced
SHOWN = 10  # images and patterns per row of a picture
VERSIONS_OF = ("torch", "lightning", "numpy", "safetensors")


@dataclass(frozen=True)
class Listener:
    """How the demo tells what it does; every function may do nothing.

    Attributes:
        say: one line of text.
        plan: the number of training steps to come.
        stage: what is being done now, in a few words; before `plan` as well.
        advance: so many steps are done.
    """

    say: Callable[[str], None] = lambda line: None
    plan: Callable[[int], None] = lambda steps: None
    stage: Callable[[str], None] = lambda words: None
    advance: Callable[[int], None] = lambda steps: None


def run_demo(settings: Settings, out: Path, *, command: str = "", listener: Listener | None = None) -> Results:
    """Runs everything and writes `results.json`, `pictures.npz` and `checkpoints/` into a folder.

    Args:
        settings: what to do.
        out: where to write; created, and tried out before anything is computed.
        command: the command line, for the report.
        listener: is told what happens.

    Returns:
        The results, as `load_results` would read them back.

    Raises:
        DataError, SettingsError: bad input or a folder that cannot be written; before anything is computed.
    """
    listener = listener or Listener()
    started = time.perf_counter()
    results_at = datetime.now().astimezone().isoformat(timespec="seconds")
    prepare_folder(out)
    device = device_of(settings.accelerator)
    listener.stage("reading images")
    data = load_images(settings.data, limit=settings.image_limit, size=settings.size, max_side=MAX_SIDE)
    settings = settings.filled(data)
    listener.say(data.describe())
    for note in data.notes:
        listener.say(note)
    if max(data.image_shape[1:]) > LARGE:
        listener.say(size_note(data))
    with cpu_threads(settings.threads):
        results, pictures = compute(data, settings, out, device, listener)
    results.command, results.started = command, results_at
    results.seconds = time.perf_counter() - started
    save_results(results, pictures, out)
    return results


def compute(
    data: ImageData, settings: Settings, out: Path, device: torch.device, listener: Listener
) -> tuple[Results, Pictures]:
    """Everything between reading the data and saving the results."""
    listener.stage("blurring images")
    tasks = tasks_of(data, settings)
    results = Results(
        models={contestant.name: contestant.title for contestant in CONTESTANTS},
        data=describe_data(data),
        settings=asdict(settings),
        versions=describe_versions(device),
    )
    examples = first_of_each_class(data)
    pictures: Pictures = {
        "input": tasks["A"].test_x[examples].numpy(),
        "blurred": tasks["B"].test_x[examples].numpy(),
    }
    seeds, epochs = settings.seeds or 1, settings.epochs or 1
    steps = -(-len(data.train_y) // settings.batch_size) * epochs
    listener.plan(steps * len(PHASES) * len(CONTESTANTS) * seeds)
    for seed in range(seeds):
        for contestant in CONTESTANTS:
            network = run_phases(contestant, seed, tasks, data, settings, out, results, listener)
            if seed == 0:
                listener.stage(f"{contestant.name}, reconstructions and first-layer patterns")
                examine(contestant, network, data, examples, results, pictures)
    rounds = 5 if settings.quick else 60
    listener.stage("measuring costs")
    results.costs = measure_costs(
        tasks["A"],
        data.image_shape,
        lam=settings.lam,
        batch_size=settings.batch_size,
        device=device,
        rounds=rounds,
        progress=lambda done: listener.stage(f"measuring costs, round {done} of {rounds}"),
    )
    return results, pictures


def size_note(data: ImageData) -> str:
    """What large images mean for the time it takes, in one line."""
    _, height, width = data.image_shape
    return (
        f"Large images: {height}×{width} is {height * width / MAX_SIDE**2:.0f} times the work of "
        f"{MAX_SIDE}×{MAX_SIDE} in every step; blurring them comes first."
    )


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """PyTorch's number of CPU threads inside; what it was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare_folder(out: Path) -> None:
    """Creates the output folder and writes a file into it for a try, so that a full training is never lost.

    Raises:
        SettingsError: it cannot be created or written.
    """
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        why = error.strerror or error
        raise SettingsError(f"out: cannot write into {out} ({why}); give a folder that can be written") from error


def device_of(accelerator: str) -> torch.device:
    """The device that Lightning's name stands for here.

    Raises:
        SettingsError: a GPU is asked for and there is none.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise SettingsError("accelerator is gpu, but this PyTorch sees no CUDA GPU; give cpu or auto")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def tasks_of(data: ImageData, settings: Settings) -> dict[str, Task]:
    """Task A, the images as they are, and task B, the same images motion-blurred."""
    length = settings.blur if settings.blur is not None else 1.0

    def blurred(x: Tensor) -> Tensor:
        return motion_blur(x, length, settings.angle)

    return {
        "A": Task(data.train_x, data.train_y, data.test_x, data.test_y),
        "B": Task(blurred(data.train_x), data.train_y, blurred(data.test_x), data.test_y),
    }


def run_phases(
    contestant: Contestant,
    seed: int,
    tasks: dict[str, Task],
    data: ImageData,
    settings: Settings,
    out: Path,
    results: Results,
    listener: Listener,
) -> nn.Sequential:
    """All three runs of one contestant and seed; phase II starts twice from the same weights, head included.

    Returns:
        The plain network as phase I left it.
    """
    network = fresh_network(data.image_shape, len(data.classes), seed)

    def run(model: nn.Module, phase: str) -> None:
        listener.stage(f"{contestant.name}, seed {seed}, {phase}")
        begin = time.perf_counter()
        curve = train(
            model,
            tasks["B" if phase == "A→B" else "A"],
            epochs=settings.epochs or 1,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            reverse=contestant.reverse and phase == "I",
            seed=seed,
            accelerator=settings.accelerator,
            advance=listener.advance,
        )
        results.runs.append(Run(contestant.name, seed, phase, **asdict(curve), seconds=time.perf_counter() - begin))
        about = {"model": contestant.name, "seed": str(seed), "phase": phase}
        save_checkpoint(model, out / "checkpoints" / checkpoint_name(contestant.name, seed, phase), about)

    run(contestant.prepare(network, settings.lam), "I")
    contestant.release(network)
    for phase in PHASES[1:]:
        run(copy.deepcopy(network), phase)
    return network


def checkpoint_name(model: str, seed: int, phase: str) -> str:
    """File name of a run's checkpoint, in plain ASCII: RR-seed0-AB.safetensors."""
    return f"{model}-seed{seed}-{phase.replace('→', '')}.safetensors"


def first_of_each_class(data: ImageData) -> list[int]:
    """Index of the first test image of each class, up to ten; nothing is picked by hand."""
    firsts = [int((data.test_y == label).nonzero()[0]) for label in range(len(data.classes))]
    return firsts[:SHOWN]


def examine(
    contestant: Contestant,
    network: nn.Sequential,
    data: ImageData,
    examples: list[int],
    results: Results,
    pictures: Pictures,
) -> None:
    """Adds a network's reconstructions and first-layer patterns, as phase I left it."""
    back = reconstruct(network, data.test_x)
    pictures[f"reconstruction {contestant.name}"] = back[examples].numpy()
    results.reconstructions[contestant.name] = compare(data.test_x, back)
    modes = first_layer_modes(network, data.image_shape, SHOWN)
    pictures[f"modes {contestant.name}"] = modes.images.numpy()
    results.energy[contestant.name] = modes.energy(data.test_x)
    if "modes data" not in pictures:
        best = data_modes(data.test_x, SHOWN)
        pictures["modes data"] = best.images.numpy()
        results.energy["data"] = best.energy(data.test_x)


def reconstruct(network: nn.Sequential, x: Tensor, batch_size: int = 256) -> Tensor:
    """What comes back from a plain network when x runs through it and all the way back; the network stays plain."""
    network.eval()
    wrapped = racecar.wrap(network, lam=0.0)
    try:
        return torch.cat([wrapped.reconstruct(batch) for batch in x.split(batch_size)])
    finally:
        wrapped.unwrap()
        network.train()


def compare(x: Tensor, back: Tensor) -> Reconstruction:
    """Relative errors of a reconstruction, as it is and after the best gain."""
    x, back = x.double(), back.double()
    power = float(back.square().sum())
    gain = float((x * back).sum()) / power if power > 0 else 1.0
    norm = float(x.norm())
    return Reconstruction(gain, float((x - back).norm()) / norm, float((x - gain * back).norm()) / norm)


def describe_data(data: ImageData) -> dict[str, object]:
    """What the report says about the data."""
    return {
        "name": data.name,
        "description": data.describe(),
        "classes": list(data.classes),
        "found": list(data.found),
        "used": [len(data.train_y), len(data.test_y)],
        "image_shape": list(data.image_shape),
        "notes": list(data.notes),
    }


def describe_versions(device: torch.device) -> dict[str, str]:
    """What has to be the same for the same figures to come out."""
    versions = {"racecar": racecar.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    return versions | {"device": where, "system": f"{platform.system()} {platform.machine()}"}
