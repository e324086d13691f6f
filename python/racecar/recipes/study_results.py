"""What a study found: the JSON, the table beside the paper's, the curves; and the run as a whole."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.optional import optional
from ..bench.machine import facts
from ..experiments.threads import cpu_threads
from ..experiments.workers import run_jobs
from ..training.history import replace_text
from .folder import RESULTS, TABLE, RunFolder
from .listener import Listener
from .registry import RECIPES
from .study import TEST_BATCH, Settings, Site, Study, jobs_of, measured_ratios
from .tables import comparison

FORMAT = 1
FIGURE = "curves.png"
RUNS = "runs"


def run_study(
    study: Study, settings: Settings, folder: RunFolder, *, data: Path | None = None, command: str = "",
    resume: bool = False, overwrite: bool = False, listener: Listener | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains every contestant with every seed that is not done yet, then writes results, table and figure.

    Args:
        study: which. settings: what to do. folder: where to; every leg's weights and curves lie below `runs/`.
        data: the user's; None: the study's own. command: the command line, for the results.
        resume: go on with the run in the folder. overwrite: begin anew even where there is one.
        listener: is told what happens; its unit is a training step.

    Returns:
        What `results.json` holds.

    Raises:
        DataError, SettingsError: bad data, or a folder that holds something else; before anything is computed.
        OSError: the disk is full or gone. WorkerDiedError: a process was killed. KeyboardInterrupt: Ctrl-C. Finished
            legs, and of the others what was saved last, stay for `resume`.
    """
    listener = listener or Listener()
    began = time.perf_counter()
    tasks = study.tasks(settings, data)
    if settings.validate:
        tasks = tasks.validated()
    with folder.held(), cpu_threads(settings.threads):
        folder.begin(settings, data, tasks.fingerprint, command, resume=resume, overwrite=overwrite)
        state = folder.load() if resume else None
        if state is None:
            shutil.rmtree(folder.path / RUNS, ignore_errors=True)
            slower = measured_ratios(Site(study, settings, tasks, folder.path / RUNS))
            started = datetime.now().astimezone().isoformat(timespec="seconds")
            state = {"started": started, "seconds": 0.0, "slower": slower}
            folder.save(state)
        site = Site(study, settings, tasks, folder.path / RUNS, state["slower"])
        try:
            train_all(site, listener)
        finally:
            state["seconds"] += time.perf_counter() - began
            folder.save(state)
        listener.stage("results")
        content = results_of(site, folder, state)
        lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in content.items()]
        replace_text(folder.path / RESULTS, ",\n".join([f'{{"format": {FORMAT}', *lines]) + "}\n")
        replace_text(folder.path / TABLE, table_page(study, content))
        draw(content["curves"]).savefig(folder.path / FIGURE, dpi=110)
        folder.finish()
    return content


def train_all(site: Site, listener: Listener) -> None:
    """Runs what is not finished yet."""
    jobs = jobs_of(site)
    steps = [(job.steps(leg.name), job.finished(leg.name)) for job in jobs for leg in job.legs]
    done = sum(count for count, finished in steps if finished)
    listener.plan(sum(count for count, _ in steps), done)
    left = [done]

    def advance(count: int) -> None:
        known = min(left[0], count)  # a finished leg reports its steps once more
        left[0] -= known
        if count > known:
            listener.advance(count - known)

    run_jobs(
        jobs,
        workers=site.settings.processes,
        threads=site.settings.threads,
        stage=listener.stage,
        advance=advance,
    )


def results_of(site: Site, folder: RunFolder, state: Mapping[str, Any]) -> dict[str, Any]:
    """Ready for JSON, from the finished legs."""
    study, settings = site.study, site.settings
    accuracy: dict[str, dict[str, list[float]]] = {contestant.name: {} for contestant in study.models}
    curves: dict[str, dict[str, list[list[float]]]] = {study.columns[leg.name]: {} for leg in study.legs}
    trained = 0.0
    for job in jobs_of(site):
        own = accuracy[job.contestant.name]
        for leg in job.legs:
            history = job.history(leg.name)
            trained += history.seconds
            curve = history.values("validation/accuracy")
            if curve:  # greedy pretraining sees no labels
                own.setdefault(study.columns[leg.name], []).append(curve[-1])
                curves[study.columns[leg.name]].setdefault(job.contestant.name, []).append(curve)
        for column, (leg_name, x, y) in site.tasks.further.items():
            if any(leg.name == leg_name for leg in job.legs):
                own.setdefault(column, []).append(accuracy_of(job.load(leg_name), x, y, settings.device))
    return {
        "recipe": study.recipe,
        "command": folder.command,
        "settings": asdict(settings),
        "data": site.tasks.source,
        "notes": list(site.tasks.notes),
        "machine": facts(settings.device),
        "started": state["started"],
        "seconds": state["seconds"],
        "training seconds": trained,
        "step time over Std's": state["slower"],
        "paper": study.paper if site.tasks.as_published else {},
        "accuracy": accuracy,
        "curves": curves,
    }


@torch.no_grad()
def accuracy_of(network: nn.Module, x: Tensor, y: Tensor, device: torch.device) -> float:
    """Share of images whose class is named; in batches, in eval mode."""
    network.to(device).eval()
    right = [
        (network(a.to(device)).argmax(1).cpu() == b).sum()
        for a, b in zip(x.split(TEST_BATCH), y.split(TEST_BATCH), strict=True)
    ]
    return float(torch.stack(right).sum()) / len(y)


def table_page(study: Study, content: Mapping[str, Any]) -> str:
    """The table and how it came about, as a Markdown page."""
    machine, settings = content["machine"], content["settings"]
    seeds = settings["seeds"]
    columns = [*content["curves"], *(c for c in next(iter(content["accuracy"].values())) if c not in content["curves"])]
    where = machine.get("gpu", {}).get("name", machine["processor"])
    follows = f"; what follows: {counted(settings['transfer_epochs'], 'epoch')} of plain training"
    follows = follows if len(study.legs) > 1 else ""
    longer = [f"{name} {ratio:.2f}" for name, ratio in content["step time over Std's"].items() if ratio != 1]
    return "\n".join(
        [
            f"# {study.recipe}: {study.title}, {'validation' if settings['validate'] else 'test'} accuracy, "
            f"{counted(seeds, 'seed')}, preset {settings['preset']}",
            "",
            comparison(content["paper"], content["accuracy"], columns),
            "",
            f"Paper: {RECIPES[study.recipe].paper}; – where it has no figure. Here: mean ± standard deviation over the "
            "seeds; differences paired over the seeds, p of a t-test after Holm's correction.",
            "",
            study.explained,
            "",
            f"- phase I: {counted(settings['epochs'], 'epoch')}, with the pretraining{follows}",
            *([f"- step time over Std's, measured before the run: {', '.join(longer)}"] if longer else []),
            f"- command: `{content['command']}`",
            f"- data: {content['data']}",
            *(f"- {note}" for note in content["notes"]),
            f"- machine: {where}, {machine['cores']} cores, PyTorch {machine['torch']}, commit {machine['commit']}",
            f"- took {content['seconds']:.0f} s, begun {content['started']}",
            "",
        ]
    )


def counted(count: int, what: str) -> str:
    """1 epoch, 2 epochs."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def draw(curves: Mapping[str, Mapping[str, list[list[float]]]]) -> Any:
    """Accuracy over training, a panel for every column: mean over the seeds, and their range.

    Args:
        curves: column -> model -> a curve for every seed, evenly spread over the epochs.

    Returns:
        A figure.
    """
    shown = {column: models for column, models in curves.items() if models}
    figure = optional("matplotlib.figure", "drawing").Figure(
        figsize=(4.2 * len(shown) + 1.4, 3.6), layout="constrained"
    )
    names = list(dict.fromkeys(name for models in shown.values() for name in models))
    lines: dict[str, Any] = {}  # a panel need not show every model
    for ax, (column, models) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        for name, seeds in models.items():
            rows = list(zip(*seeds, strict=True))
            share = [(i + 1) / len(rows) for i in range(len(rows))]
            colour = f"C{names.index(name)}"
            marker = "o" if len(rows) == 1 else None
            (lines[name],) = ax.plot(share, [statistics.fmean(row) for row in rows], color=colour, marker=marker)
            ax.fill_between(share, [min(row) for row in rows], [max(row) for row in rows], color=colour, alpha=0.12)
        ax.set_title(column)
        ax.set_xlabel("share of the epochs")
    figure.axes[0].set_ylabel("accuracy")
    figure.legend([lines[name] for name in names], names, loc="outside right upper", fontsize="small")
    return figure
