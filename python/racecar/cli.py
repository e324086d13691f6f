"""The `racecar` command. PyTorch, Lightning and matplotlib are imported by the commands that need them."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from .recipes.command import app as recipes

app = typer.Typer(
    name="racecar",
    help="Pretrain networks together with their own reverse pass (racecar training).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


app.add_typer(recipes, name="run")


@app.callback()
def main() -> None:
    """Pretrain networks together with their own reverse pass (racecar training)."""


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with one line on stderr."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


def was_given(context: typer.Context, option: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


@app.command()
def demo(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help="'digits' (scikit-learn's), or a path: a folder with the official MNIST or CIFAR files, a folder of "
            "class folders (optionally below train/ and test/), a zip of one, or an .npz (x_train, y_train, x_test, "
            "y_test)."
        ),
    ] = "digits",
    models: Annotated[
        str, typer.Option(help="Which to compare with Std: some of Ort,Pre,RR1,RR,RRlocal. \\[default: all]")
    ] = "",
    seeds: Annotated[int | None, typer.Option(help="How many seeds. \\[default: 5; 2 with --quick]")] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Epochs of phase I and of A→A. \\[default: 40 on the digits, 20 on other data; 2 with --quick]"
        ),
    ] = None,
    transfer_epochs: Annotated[int | None, typer.Option(help="Epochs of A→B. \\[default: 40; 2 with --quick]")] = None,
    labels: Annotated[
        int, typer.Option(help="Labelled images of every class in task B, drawn by the seed; 0: all.")
    ] = 30,
    lam: Annotated[float, typer.Option(help="λ of every reverse loss in phase I (mean reduction).")] = 1.0,
    ort: Annotated[float, typer.Option(help="Factor of Ort's penalty in phase I.")] = 0.01,
    batch_size: Annotated[int, typer.Option(help="Images per training step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Adam, in every phase.")] = 1e-3,
    blur: Annotated[
        float | None,
        typer.Option(
            help="Length of task B's motion blur in pixels, at most the image's longer side. "
            "\\[default: 3/8 of its width]"
        ),
    ] = None,
    angle: Annotated[float, typer.Option(help="Direction of the blur in degrees from horizontal.")] = 15.0,
    limit: Annotated[
        int | None,
        typer.Option(
            help="At most so many training images, and as many test images, drawn class by class. "
            "\\[default: all digits, 1000 of other data]"
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Crop and resize image files to size×size, at most 256. \\[default: a side above 32 is shrunk to 32]"
        ),
    ] = None,
    validate: Annotated[
        bool,
        typer.Option(
            "--validate", help="Test on a third of the training images, not on the test images: to choose settings."
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes that train side by side. \\[default: one per CPU, at most 8]")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of each, at most one per CPU.")] = 1,
    accelerator: Annotated[str, typer.Option(help="Where to train: cpu, gpu or auto.")] = "cpu",
    save_every_s: Annotated[
        float, typer.Option(help="Seconds between saves inside a run, for --resume; finished runs are always kept.")
    ] = 10.0,
    out: Annotated[Path, typer.Option(help="Folder for report.html, results.json, pictures and all runs.")] = Path(
        "racecar-demo"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the demo in --out that was broken off, with its settings.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew even where --out holds a demo that was broken off.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds, two epochs: only to see that it runs.")] = False,
) -> None:
    """Compare reverse-pass pretraining with its rivals, in about three minutes on two CPU cores (digits).

    Task A is to name the class of an image, task B the same with motion-blurred images, few of them labelled. Phase I
    trains on A: plainly (Std), with orthogonal kernels (Ort), by layer-wise autoencoders (Pre), or with a reverse pass
    (RR¹, RR, RR local). Phase II goes on without any of it, once on A (A→A) and once on B (A→B).
    """
    # PyTorch's profiler, which measures the peak, remarks on memory that is older than itself.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        from .data import DataError
        from .demo.folder import settings_to_resume
        from .demo.settings import Settings
        from .demo.terminal import run_in_terminal
        from .experiments.folder import SettingsError
        from .experiments.workers import WorkerDiedError
        from .training import CheckpointError, HistoryError, TrainingError
    except ModuleNotFoundError as error:
        fail(f"the demo needs {error.name}, which is not installed: pip install 'racecar-kernels[demo]'", code=1)

    if resume and overwrite:
        fail("--resume goes on with a demo, --overwrite begins anew; give one of them", code=2)
    options = {k: v for k, v in context.params.items() if k not in ("context", "out", "resume", "overwrite")}
    given = {k: v for k, v in options.items() if was_given(context, k)}
    command = shlex.join(["racecar", *sys.argv[1:]])

    def kept() -> str:
        there = (out / "demo.json").is_file()
        return f"what was finished is kept in {out}: --resume goes on with it" if there else "nothing had been computed"

    try:
        settings = settings_to_resume(out, given) if resume else Settings(**options)
        run_in_terminal(settings, out, command=command, resume=resume, overwrite=overwrite, console=Console())
    except (DataError, SettingsError, TrainingError) as error:
        fail(str(error), code=2)
    except (CheckpointError, HistoryError) as error:
        fail(f"{error}; remove that run's folder and give --resume, or begin anew with --overwrite", code=1)
    except WorkerDiedError as error:
        fail(f"{error}; {kept()}", code=1)
    except OSError as error:
        fail(f"cannot write {error.filename or f'into {out}'}: {error.strerror or error}; {kept()}", code=1)
    except KeyboardInterrupt:
        Console(stderr=True).print(f"[bold red]stopped[/] before the end; {escape(kept())}", soft_wrap=True)
        raise typer.Exit(130) from None


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What `racecar demo --out` wrote to.")],
) -> None:
    """Draw the report of a finished demo again, from its saved results."""
    try:
        from .demo.report import write_report
        from .demo.results import ResultsError, load_results
        from .demo.terminal import accuracy_table, cost_table
    except ModuleNotFoundError as error:
        fail(f"the report needs {error.name}, which is not installed: pip install 'racecar-kernels[demo]'", code=1)

    console = Console()
    try:
        path = write_report(folder)
        results, _ = load_results(folder)
        console.print(accuracy_table(results))
        console.print(cost_table(results))
    except ResultsError as error:
        fail(str(error), code=2)
    except OSError as error:
        fail(f"cannot write {error.filename or f'into {folder}'}: {error.strerror or error}", code=1)
    console.print(f"Report: {escape(str(path))}", highlight=False, soft_wrap=True)


def _named_as_given(context: typer.Context) -> list[str]:
    """What stands on the command line, by the names it has there: `networks`, `--json` ..."""
    given = [p for p in context.command.params if p.name is not None and was_given(context, p.name)]
    return [p.opts[0] for p in given]


@app.command()
def bench(
    context: typer.Context,
    networks: Annotated[
        list[str] | None, typer.Argument(metavar="[NETWORK]...", help="Which to measure; see --list. \\[default: all]")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="'cpu' or 'gpu': the networks that have targets, and the table of targets.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --suite gpu: float32 (as TF32) or bfloat16. \\[default: bfloat16]")
    ] = None,
    contestants: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only those whose name contains TEXT, and Std.")
    ] = None,
    backends: Annotated[
        str | None, typer.Option(help="Ours once more with these backends forced: 'all', or names with commas.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Samples per step. \\[default: the network's own]")] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of each contestant.")] = 15,
    threads: Annotated[int | None, typer.Option(help="PyTorch's threads. \\[default: PyTorch's choice]")] = None,
    compile_: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="The plain reverse pass under torch.compile too: minutes."),
    ] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny inputs, 2 rounds: does it run, not how fast.")] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Machine, versions and figures, written after every network.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out the networks whose figures --json already holds.")
    ] = False,
    markdown: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Put the ratios between <!-- measured:begin ... --> and <!-- measured:end -->."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the ratios as .png or .svg.")] = None,
    where: Annotated[
        bool,
        typer.Option(
            "--where",
            help="Measure nothing but which layer keeps what for the backward pass; --markdown then fills in between "
            "<!-- where:begin ... --> and <!-- where:end -->.",
        ),
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help="Two files of results against each other.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Networks, suites, contestants and backends.")] = False,
) -> None:
    """Measure step time, kept and peak bytes against plain training, on this machine's CPU, or GPU with --suite gpu.

    Everybody trains in one process, in turns; ratios are medians over rounds of the ratio within a round. Gradients are
    held against float64 before any figure. How: docs/benchmarking.md.
    """
    # PyTorch's profiler, which measures the bytes, remarks on memory that is older than itself.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from .bench import terminal
    from .bench.gradients import WrongGradientError
    from .bench.results import ResultsError
    from .bench.tables import MarksError

    console = Console()
    try:
        terminal.check_mode(_named_as_given(context))
        if list_:
            terminal.listing(console)
        elif compare is not None:
            terminal.compare(*compare, console)
        else:
            options = terminal.Options(
                tuple(networks or ()), suite, dtype, contestants, backends, batch, rounds, threads, compile_, quick,
                json, resume, markdown, plot,
            )  # fmt: skip
            (terminal.where if where else terminal.run)(options, console)
    except ModuleNotFoundError as error:
        fail(f"this needs {error.name}, which is not installed: pip install 'racecar-kernels[demo]'", code=1)
    except (terminal.OptionsError, ResultsError, MarksError) as error:
        fail(str(error), code=2)
    except WrongGradientError as error:
        fail(str(error), code=1)
    except OSError as error:
        fail(f"cannot write {error.filename or 'the results'}: {error.strerror or error}", code=1)
    except KeyboardInterrupt:
        kept = f"{json} holds what was finished; --resume goes on with it" if json else "nothing is kept without --json"
        Console(stderr=True).print(f"[bold red]stopped[/] before the end; {escape(kept)}", soft_wrap=True)
        raise typer.Exit(130) from None


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what is installed, which backends and compiled kernels are in use or why not, and whether they are right.

    Every backend that serves here runs a small layer forward and backward, held against float64. Ends with status 1
    where one gives a wrong result.
    """
    try:
        from . import doctor as doctor_
    except ModuleNotFoundError as error:
        fail(f"this needs {error.name}, which is not installed: pip install 'racecar-kernels[demo]'", code=1)
    from json import dumps

    found = doctor_.examine()
    if json:
        print(dumps(found, indent=2, allow_nan=False))
    else:
        doctor_.show(found, Console())
    if found["wrong"]:
        fail(f"wrong results: {', '.join(found['wrong'])}", code=1)
