"""The `racecar` command. PyTorch, Lightning and matplotlib are imported by the commands that need them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    name="racecar",
    help="Pretrain networks together with their own reverse pass (racecar training).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


@app.callback()
def main() -> None:
    """Pretrain networks together with their own reverse pass (racecar training)."""


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with one line on stderr."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


@app.command()
def demo(
    data: Annotated[
        str,
        typer.Option(
            help="'digits' (scikit-learn's), or a path: a folder with the official MNIST files, a folder of class "
            "folders (optionally below train/ and test/), a zip of one, or an .npz (x_train, y_train, x_test, y_test)."
        ),
    ] = "digits",
    seeds: Annotated[int | None, typer.Option(help="How many seeds. \\[default: 3; 2 with --quick]")] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of every phase. \\[default: 40 on the digits, 5 on other data; 2 with --quick]"),
    ] = None,
    lam: Annotated[float, typer.Option(help="λ of the reverse loss in phase I (mean reduction).")] = 0.1,
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
            help="At most so many training images, and half as many test images, drawn class by class. "
            "\\[default: all digits, 3000 of other data; 1000 with --quick]"
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Crop and resize image files to size×size, at most 256. \\[default: a side above 32 is shrunk to 32]"
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads, at most one per CPU.")] = 1,
    accelerator: Annotated[str, typer.Option(help="Where to train: cpu, gpu or auto.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for report.html, results.json, pictures and checkpoints.")] = Path(
        "racecar-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds, two epochs: only to see that it runs.")] = False,
) -> None:
    """Compare plain training (Std) with reverse-pass pretraining (RR), in about a minute on one CPU core.

    Task A is to name the class of an image, task B the same with motion-blurred images. Phase I trains on A, RR with
    the reverse loss; phase II goes on without it, once on A (A→A) and once on B (A→B). With --data it may take about
    three minutes.
    """
    try:
        from .data import DataError
        from .demo.settings import Settings, SettingsError
        from .demo.terminal import run_in_terminal
    except ModuleNotFoundError as error:
        fail(f"the demo needs {error.name}, which is not installed: pip install 'racecar-kernels[demo]'", code=1)

    try:
        settings = Settings(
            data=data,
            seeds=seeds,
            epochs=epochs,
            lam=lam,
            batch_size=batch_size,
            learning_rate=learning_rate,
            blur=blur,
            angle=angle,
            limit=limit,
            size=size,
            accelerator=accelerator,
            threads=threads,
            quick=quick,
        )
        run_in_terminal(settings, out, command=shlex.join(["racecar", *sys.argv[1:]]), console=Console())
    except (DataError, SettingsError) as error:
        fail(str(error), code=2)
    except KeyboardInterrupt:
        Console(stderr=True).print("[bold red]stopped[/] before the end; no report was written", soft_wrap=True)
        raise typer.Exit(130) from None
