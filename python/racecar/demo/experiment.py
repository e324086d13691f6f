"""The demo itself: every contestant and seed through phase I, A→A and A→B, then costs, pictures, results."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch

import racecar

from ..data import ImageData, load_images
from ..experiments.contestants import chosen
from ..experiments.folder import SettingsError, locked, prepare
from ..experiments.jobs import Job
from ..experiments.tasks import fingerprint
from ..experiments.threads import cpu_threads
from ..experiments.workers import run_jobs
from .costs import measure_costs
from .examine import examine
from .folder import RUNS, begin, end
from .results import PHASES, Pictures, Results, save_results
from .settings import Settings
from .tasks import tasks_of
from .workplace import Workplace, result_of

MAX_SIDE = 32  # a longer side is shrunk to it: what two CPU cores finish in a few minutes
LARGE = 64  # from a longer side above this on, what comes before the first training step is announced
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


def run_demo(
    settings: Settings,
    out: Path,
    *,
    command: str = "",
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Results:
    """Runs everything and writes `results.json`, `pictures.npz` and `runs/` into a folder.

    Args:
        settings: what to do.
        out: where to write; created, and tried out before anything is computed.
        command: the command line, for the report.
        resume: keep the runs that the folder holds, and go on with those that were broken off.
        overwrite: begin anew even where a demo was broken off.
        listener: is told what happens.

    Returns:
        The results, as `load_results` would read them back.

    Raises:
        DataError, SettingsError: bad input, a folder that cannot be written, or one that holds another demo; before
            anything is computed.
        OSError: the disk is full or gone. WorkerDiedError: a process was killed. KeyboardInterrupt: Ctrl-C. Whatever
            was finished stays in the folder, for `resume`.
    """
    listener = listener or Listener()
    device_of(settings.accelerator)
    chosen(settings.models)
    prepare(out, RUNS)
    with locked(out, "demo"):
        return run_locked(settings, out, command=command, resume=resume, overwrite=overwrite, listener=listener)


def run_locked(
    settings: Settings, out: Path, *, command: str, resume: bool, overwrite: bool, listener: Listener
) -> Results:
    """`run_demo` in a folder that is its own."""
    started, began = time.perf_counter(), datetime.now().astimezone().isoformat(timespec="seconds")
    device = device_of(settings.accelerator)
    listener.stage("reading images")
    limit, test_limit = settings.image_limits
    data = load_images(settings.data, limit=limit, test_limit=test_limit, size=settings.size, max_side=MAX_SIDE)
    settings = settings.filled(data)
    listener.say(data.describe())
    for note in data.notes:
        listener.say(note)
    if max(data.image_shape[1:]) > LARGE:
        listener.say(size_note(data))
    with cpu_threads(settings.threads):
        listener.stage("blurring images")
        tasks = tasks_of(data, settings)
        place = Workplace(tasks, len(data.classes), settings, out / RUNS)
        mark = fingerprint(tasks)
        command = begin(out, settings, mark, command, resume=resume, overwrite=overwrite)
        train_all(place, listener)
        results, pictures = gather(place, data, device, listener)
    results.command = command
    results.started = began
    results.seconds, results.resumed = time.perf_counter() - started, resume
    save_results(results, pictures, out)
    end(out, settings, mark, command)
    return results


def jobs_of(place: Workplace) -> list[Job]:
    """Every contestant with every seed; seeds in the outer loop, so that a broken demo has compared something."""
    seeds = range(place.settings.seeds or 1)
    return [Job(place, contestant, seed) for seed in seeds for contestant in chosen(place.settings.models)]


def train_all(place: Workplace, listener: Listener) -> None:
    """Runs what is not finished yet."""
    jobs = jobs_of(place)
    listener.plan(sum(job.steps(phase) for job in jobs for phase in PHASES))
    done = [(job, phase) for job in jobs for phase in PHASES if job.finished(phase)]
    if done:
        listener.say(f"{len(done)} of {len(jobs) * len(PHASES)} runs are finished already and are kept.")
    run_jobs(
        jobs,
        workers=place.settings.workers or 1,
        threads=place.settings.threads,
        stage=listener.stage,
        advance=listener.advance,
    )


def gather(place: Workplace, data: ImageData, device: torch.device, listener: Listener) -> tuple[Results, Pictures]:
    """Results from the finished runs, and what is measured when they are done."""
    settings = place.settings
    results = Results(
        models={contestant.name: contestant.title for contestant in chosen(settings.models)},
        data=describe_data(data, place),
        settings=asdict(settings),
        versions=describe_versions(device),
        runs=[result_of(job, phase) for job in jobs_of(place) for phase in PHASES],
    )
    pictures: Pictures = {}
    listener.stage("reconstructions, patterns, layers")
    examine(place, results, pictures, settings.seeds or 1)
    rounds = 5 if settings.quick else 60
    listener.stage("measuring costs")
    results.costs = measure_costs(
        place.tasks["A"],
        place.network,
        settings,
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


def device_of(accelerator: str) -> torch.device:
    """The device that Lightning's name stands for here.

    Raises:
        SettingsError: a GPU is asked for and there is none.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise SettingsError("accelerator is gpu, but this PyTorch sees no CUDA GPU; give cpu or auto")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def describe_data(data: ImageData, place: Workplace) -> dict[str, object]:
    """What the report says about the data."""
    a = place.tasks["A"]
    return {
        "name": data.name,
        "description": data.describe(),
        "classes": list(data.classes),
        "found": list(data.found),
        "used": [len(a.train_y), len(a.test_y)],
        "labelled": len(place.task("A→B", 0).train_y),
        "validated": place.settings.validate,
        "image_shape": list(data.image_shape),
        "notes": list(data.notes),
    }


def describe_versions(device: torch.device) -> dict[str, str]:
    """What has to be the same for the same figures to come out."""
    versions = {"racecar": racecar.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    return versions | {"device": where, "system": f"{platform.system()} {platform.machine()}"}
