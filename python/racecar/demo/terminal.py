"""The demo on a terminal: one progress bar for everything, the table, where the files are."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from .experiment import Listener, run_demo
from .report import write_report
from .results import PHASES, Results
from .settings import Settings
from .text import accuracy_text, phase_label


def run_in_terminal(settings: Settings, out: Path, *, command: str, console: Console) -> Results:
    """Runs the demo under a progress bar, writes the report and prints the table.

    Args:
        settings: what to do.
        out: folder for all files.
        command: the command line, for the report.
        console: where to print.

    Raises:
        DataError, SettingsError: bad input, before anything is computed.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,  # drawing shares the cores with the training
    )
    bar = progress.add_task("", total=None)

    def begin(steps: int) -> None:
        progress.update(bar, total=steps)
        progress.start()  # not before: an error in the data should stand alone

    listener = Listener(
        say=lambda line: console.print(escape(line), highlight=False, soft_wrap=True),
        plan=begin,
        stage=lambda words: progress.update(bar, description=words),
        advance=lambda steps: progress.advance(bar, steps),
    )
    try:
        results = run_demo(settings, out, command=command, listener=listener)
        progress.update(bar, description="writing report")
        report = write_report(out)
        progress.update(bar, description="done")
    finally:
        if progress.live.is_started:
            progress.stop()
    console.print(results_table(results))
    console.print(f"{results.seconds:.0f} s. Report: {escape(str(report))}", highlight=False, soft_wrap=True)
    return results


def results_table(results: Results) -> Table:
    """Accuracy (mean ± standard deviation over the seeds) and the costs of a phase-I step, as ratios to the first."""
    seeds = len({run.seed for run in results.runs})
    table = Table(
        title=f"{results.data['name']}: test accuracy after each phase, {seeds} seed{'s' if seeds > 1 else ''}",
        caption=f"step time and kept bytes of a phase-I step, as ratios to {next(iter(results.models))}",
    )
    table.add_column("model")
    for column in (*(phase_label(phase) for phase in PHASES), "step time", "kept bytes"):
        table.add_column(column, justify="right")
    for model in results.models:
        cost = results.costs[model]
        accuracies = [accuracy_text(*results.accuracy(model, phase)) for phase in PHASES]
        table.add_row(model, *accuracies, f"{cost.time_ratio:.2f} ×", f"{cost.kept_ratio:.2f} ×")
    return table
