"""`racecar run RECIPE`: options, progress, errors in one line."""

# no `from __future__ import annotations`: typer reads those of a function that is made for every recipe

import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from .registry import RECIPES, Recipe

TABLE = "table.md"

app = typer.Typer(
    help="The papers' learning experiments, figures beside theirs.", no_args_is_help=True, rich_markup_mode="rich"
)


class Speed(ProgressColumn):
    """How fast it goes, from the last seconds."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self.unit}/s")


def progress_bar(console: Console, unit: str) -> Progress:
    """What is being done, how much is done of how much, speed, time left; not started yet."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Speed(unit),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
    )


def run_in_terminal(recipe: Recipe, settings: Any, folder: Any, console: Console, **options: Any) -> None:
    """Runs a recipe under a progress bar and prints its table."""
    listener = recipe.part("Listener")
    progress = progress_bar(console, recipe.unit)
    bar = progress.add_task("", total=None)

    def plan(epochs: int, done: int) -> None:
        if options["resume"] and not done:
            console.print("Nothing is kept from before; it begins anew.", highlight=False)
        if done:
            console.print(f"{done} of {epochs} {recipe.unit} are kept from before.", highlight=False)
        progress.update(bar, total=epochs - done)
        progress.start()

    told = listener(
        plan=plan,
        stage=lambda words: progress.update(bar, description=words),
        advance=lambda epochs: progress.advance(bar, epochs),
    )
    try:
        recipe.run(settings, folder, listener=told, **options)
    finally:
        if progress.live.is_started:
            progress.stop()
    table = (folder.path / TABLE).read_text(encoding="utf-8")
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Results: {escape(str(folder.path))}", highlight=False, soft_wrap=True)


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with one line on stderr."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


def add(recipe: Recipe) -> None:
    """Adds the command of a recipe."""
    presets = ", ".join(name for name in recipe.presets if name != "quick")
    default = next(iter(recipe.presets))

    def command(
        context: typer.Context,
        out: Annotated[
            Path | None,
            typer.Option(help=f"Folder for results, table, figures, checkpoint. \\[default: racecar-{recipe.name}]"),
        ] = None,
        preset: Annotated[str, typer.Option(help=f"One of {presets}: docs/recipes.md says what each is.")] = default,
        seeds: Annotated[int | None, typer.Option(help="How many seeds. \\[default: the preset's, 5]")] = None,
        data: Annotated[Path | None, typer.Option(help=recipe.data)] = None,
        validate: Annotated[
            bool,
            typer.Option("--validate", help="Test on a part of the training data instead: for choosing settings."),
        ] = False,
        threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
        save_every_s: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 10.0,
        accelerator: Annotated[
            str, typer.Option(help="cpu, gpu, or auto: the GPU where there is one. For recipes on images.")
        ] = "auto",
        resume: Annotated[
            bool, typer.Option("--resume", help="Go on with the run in --out that was broken off, with its settings.")
        ] = False,
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Begin anew even where --out holds a run of this recipe.")
        ] = False,
        quick: Annotated[bool, typer.Option("--quick", help="A few epochs: only to see that it runs.")] = False,
    ) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if resume and overwrite:
            fail("--resume goes on with a run, --overwrite begins anew; give one of them", code=2)
        if quick and given(context, "preset"):
            fail("--quick is a preset of its own; leave out --preset", code=2)
        options = {
            "seeds": seeds,
            "validate": validate,
            "threads": threads,
            "save_every_s": save_every_s,
            "accelerator": accelerator,
        }
        options = {name: value for name, value in options.items() if given(context, name)}
        chosen = "quick" if quick else preset if given(context, "preset") else None
        run(recipe, out or Path(f"racecar-{recipe.name}"), data, chosen, options, resume=resume, overwrite=overwrite)

    command.__doc__ = f"{recipe.shows}\n\n{recipe.paper}."
    app.command(name=recipe.name, help=command.__doc__, short_help=recipe.shows)(command)


def given(context: typer.Context, option: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM, which batch systems send before they kill, ends a run as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check(settings: Any) -> None:
    """Raises SettingsError for options of all recipes that no run could follow."""
    from ..experiments.folder import SettingsError

    cores = os.cpu_count() or 1
    if settings.threads > cores:
        raise SettingsError(f"threads must be at most {cores}, as many as there are cores, got {settings.threads}")
    if not (math.isfinite(settings.save_every_s) and settings.save_every_s >= 0):
        raise SettingsError(f"save_every_s must be a number, 0 or larger, got {settings.save_every_s}")


def without_folders(word: str) -> str:
    """An absolute path's last name: results are shown to others. Other words stay."""
    return Path(word).name if Path(word).is_absolute() else word


def run(
    recipe: Recipe,
    out: Path,
    data: Path | None,
    preset: str | None,
    options: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Runs a recipe; every foreseeable error ends the command with one line that says what is kept."""
    try:
        from ..data import DataError
        from ..experiments.folder import SettingsError
        from ..experiments.workers import WorkerDiedError
        from .folder import CHECKPOINT, RunFolder
    except ModuleNotFoundError as error:
        fail(f"recipes need {error.name}, which is not installed: pip install 'racecar-kernels[demo]'", code=1)

    folder = RunFolder(out, recipe.name)

    def kept() -> str:
        there = (out / CHECKPOINT).is_file()
        return f"what was computed is kept in {out}: --resume goes on with it" if there else "nothing had been computed"

    try:
        if "accelerator" in options and not hasattr(recipe.part("Settings"), "accelerator"):
            raise SettingsError(f"{recipe.name} trains tiny networks on the CPU; leave out --accelerator")
        if resume:
            before = folder.settings_to_resume()
            options = {**(dict(recipe.presets.get(preset, {}), preset=preset) if preset else {}), **options}
            settings = recipe.part("Settings")(**{**before, **options})
            data = data or folder.data
        else:
            settings = recipe.settings(preset or next(iter(recipe.presets)), **options)
        check(settings)
        command = shlex.join(["racecar", *map(without_folders, sys.argv[1:])])
        with sigterm_as_interrupt():
            run_in_terminal(
                recipe, settings, folder, Console(), data=data, command=command, resume=resume, overwrite=overwrite
            )
    except ModuleNotFoundError as error:
        fail(f"this recipe needs {error.name}, which is not installed: pip install 'racecar-kernels[demo]'", code=1)
    except (DataError, SettingsError) as error:
        fail(str(error), code=2)
    except OSError as error:
        fail(f"cannot write {error.filename or f'into {out}'}: {error.strerror or error}; {kept()}", code=1)
    except WorkerDiedError as error:
        fail(f"{error}; {kept()}", code=1)
    except KeyboardInterrupt:
        Console(stderr=True).print(f"[bold red]stopped[/] before the end; {escape(kept())}", soft_wrap=True)
        raise typer.Exit(130) from None


for _recipe in RECIPES.values():
    add(_recipe)
