"""`racecar bench` on a terminal: measures under a progress bar, prints and writes. Needs rich, a plot matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import racecar_kernels as rk

from . import comparison, machine, results, tables, targets
from .contestants import COMPILED, CONTESTANTS, STD, CannotRunError, Contestant, contestants
from .networks import NETWORKS, Network
from .results import Report
from .steps import Measured, measure_network
from .where import Row, kept_by_layer

MARKS, WHERE_MARKS = "measured", "where"
QUICK_COMPILES = "mlp"  # the one network that --quick compiles: the rest would take minutes
PICTURES = (".png", ".svg")
# What measures nothing, and what may stand beside it.
MODES = {
    "--list": (),
    "--compare": (),
    "--where": ("networks", "--contestants", "--backends", "--batch", "--quick", "--markdown", "--plot"),
}


class OptionsError(ValueError):
    """What was asked for cannot be done; the message is one sentence that says what can."""


def check_mode(given: Sequence[str]) -> None:
    """Raises OptionsError where one of `given`, the options on the command line, would be ignored."""
    for mode in (m for m in MODES if m in given):
        taken = MODES[mode]
        ignored = [name for name in given if name not in (mode, *taken)]
        if ignored:
            beside = f"takes {', '.join(taken[:-1])} and {taken[-1]} only" if taken else "takes no other options"
            raise OptionsError(f"{mode} {beside}, got {', '.join(ignored)}; leave {_them(ignored)} out")


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 and names[0] != "networks" else "them"


@dataclass(frozen=True)
class Options:
    """What to measure, and what to write; see `racecar bench --help`."""

    networks: tuple[str, ...] = ()
    suite: str | None = None
    dtype: str | None = None
    contestants: str | None = None
    backends: str | None = None
    batch: int | None = None
    rounds: int = 15
    threads: int | None = None
    compile: bool = True
    quick: bool = False
    json: Path | None = None
    resume: bool = False
    markdown: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.networks if name not in NETWORKS]
        if unknown:
            raise OptionsError(f"no network is named {', '.join(unknown)}; there are {', '.join(NETWORKS)}")
        if self.suite is not None and self.suite not in targets.SUITES:
            raise OptionsError(f"no suite is named {self.suite}; there are {', '.join(targets.SUITES)}")
        if self.dtype is not None and (self.suite is None or self.dtype not in self.chosen_suite.dtypes):
            allowed = f"{self.suite}: {', '.join(self.chosen_suite.dtypes)}" if self.suite else "gpu; say --suite gpu"
            raise OptionsError(f"--dtype is one of those of the suite {allowed}; got {self.dtype}")
        for name, value in (("batch", self.batch), ("rounds", self.rounds), ("threads", self.threads)):
            if value is not None and value < 1:
                raise OptionsError(f"--{name} is a whole number from 1, got {value}")
        if self.resume and self.json is None:
            raise OptionsError("--resume goes on with the results in a file; say which with --json FILE")
        if self.plot is not None and self.plot.suffix not in PICTURES:
            raise OptionsError(f"--plot writes {' or '.join(PICTURES)}, got {self.plot}")
        for name, path in (("json", self.json), ("plot", self.plot)):
            if path is not None and path.is_dir():
                raise OptionsError(f"--{name} is a file to write, {path} is a folder")
        if self.json is not None and self.json.exists() and not self.resume:
            try:
                results.read(self.json)
            except results.ResultsError as error:
                raise OptionsError(f"--json would replace what is no file of results: {error}") from None

    def check_files(self) -> None:
        """Raises OptionsError where a file could not be written in the end; leaves nothing behind."""
        for name, path in (("json", self.json), ("markdown", self.markdown), ("plot", self.plot)):
            reason = None if path is None else results.why_not_writable(path)
            if reason is not None:
                raise OptionsError(f"--{name}: {path} cannot be written, {reason}; name a file in another folder")

    def check_device(self) -> None:
        """Raises OptionsError where the suite is for a device that is not here."""
        if self.chosen_suite.device == "cuda" and not torch.cuda.is_available():
            raise OptionsError(
                f"--suite {self.suite} needs a CUDA device, and PyTorch {torch.__version__} sees none; on a machine "
                "with one, `make gpu OUT=dir` in a clone tests the kernels there and then measures this suite"
            )

    @property
    def chosen_suite(self) -> targets.Suite:
        """The suite; without one, no networks and no targets on a CPU."""
        return targets.SUITES[self.suite] if self.suite else targets.Suite((), ())

    @property
    def chosen_dtype(self) -> str:
        """Of parameters and activations."""
        return self.dtype or self.chosen_suite.dtypes[0]

    def names(self) -> list[str]:
        """The networks to measure, in order."""
        return list(dict.fromkeys((*self.chosen_suite.networks, *self.networks))) or list(NETWORKS)

    def backend_names(self) -> list[str]:
        """The backends that are forced, besides the one that is chosen by itself."""
        if self.backends is None:
            return []
        return list(rk.backends()) if self.backends == "all" else self.backends.split(",")

    def contestants_of(self, network: str) -> list[Contestant]:
        """Raises OptionsError for a backend or a contestant that there is not."""
        compiled = self.compile and (not self.quick or network == QUICK_COMPILES)
        try:
            found = contestants(compiled=True, backends=self.backend_names(), containing=self.contestants)
        except ValueError as error:
            raise OptionsError(str(error)) from None
        return found if compiled else [c for c in found if not c.compiled]

    def settings(self) -> dict[str, object]:
        """What figures depend on, for --resume."""
        return {
            "quick": self.quick,
            "batch": self.batch,
            "rounds": self.rounds,
            "contestants": self.contestants,
            "backends": self.backends,
            "compile": self.compile,
        }


def run(options: Options, console: Console) -> Report:
    """Measures what is asked for; prints a table per network, and the suite's target table.

    Every network's figures are in the JSON file before the next network begins.

    Raises:
        OptionsError, results.ResultsError, tables.MarksError: bad input, before anything is measured.
        racecar.bench.gradients.WrongGradientError: a contestant is wrong.
    """
    for name in options.names():
        options.contestants_of(name)
    options.check_device()
    if options.markdown:
        tables.check_marks(options.markdown, MARKS)
    options.check_files()
    if options.plot:
        from . import plot  # says that matplotlib is missing before hours of measuring
    if options.threads:
        torch.set_num_threads(options.threads)
    suite = options.chosen_suite
    if suite.device == "cuda":
        machine.prepare_cuda()
    fresh = Report(machine.facts(suite.device), options.settings(), dtype=options.chosen_dtype)
    report = results.taken_up(options.json, fresh) if options.json and options.resume else fresh
    _print(console, report.where)
    for name in options.names():
        if name in report.networks:
            _print(console, f"\n{name}: already in {options.json}")
        else:
            report.networks[name] = _measured(name, options, console)
            if options.json:
                report.write(options.json)
        _print(console, "\n" + tables.table(report.networks[name]))
    chosen = {name: report.networks[name] for name in options.names()}
    sections = [tables.markdown(measured) for measured in chosen.values()]
    if options.suite:
        cells = targets.rows(suite.targets, chosen, suite.unmeasured)
        tiny = "; TINY INPUTS: the verdicts mean nothing" if options.quick else ""
        _print(console, f"\nTargets, as ratios to plain training{tiny}\n" + tables.text_table(targets.HEAD, cells))
        sections.append(tables.markdown_table(targets.HEAD, cells))
    if options.markdown:
        tables.write_between_marks(options.markdown, MARKS, "\n\n".join([*sections, f"{report.where}."]))
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plot.draw(chosen, options.plot, report.where, suite.targets or targets.CPU)
    written = [str(path) for path in (options.json, options.markdown, options.plot) if path]
    if written:
        _print(console, f"\nwritten: {', '.join(written)}")
    return report


def _measured(name: str, options: Options, console: Console) -> Measured:
    network = NETWORKS[name]
    rounds = 2 if options.quick else options.rounds
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with progress:
        bar = progress.add_task(name, total=rounds)
        return measure_network(
            network,
            options.contestants_of(name),
            batch=_batch(network, options),
            rounds=rounds,
            warmup=1 if options.quick else 2,
            device=options.chosen_suite.device,
            dtype=getattr(torch, options.chosen_dtype),
            tiny=options.quick,
            stage=lambda words: progress.update(bar, description=f"{name}: {words}"),
            progress=lambda done: progress.update(bar, completed=done),
        )


def _batch(network: Network, options: Options) -> int:
    own = network.gpu_batch if options.chosen_suite.device == "cuda" else network.batch
    return options.batch or (2 if options.quick else own)


def compare(a: Path, b: Path, console: Console) -> None:
    """Prints every figure of both files, and which moved by more than the noise.

    Raises:
        results.ResultsError: one of them holds no results, or they share no case.
    """
    first, second = results.read(a), results.read(b)
    found, remarks = comparison.compare(first, second, (a, b))
    _print(console, f"A  {a}: {first.where}\nB  {b}: {second.where}\n")
    _print(console, tables.text_table(comparison.HEAD, comparison.rows(found)))
    moved = sum(d.moved for d in found)
    how = "times and ratios beyond both ranges from 20th to 80th percentile, bytes by over a thousandth"
    _print(console, f"\n{moved} of {len(found)} figures moved: {how}")
    for remark in remarks:
        _print(console, remark)


def where(options: Options, console: Console) -> None:
    """Prints which layer of a network keeps what, contestant beside contestant.

    Raises:
        OptionsError, tables.MarksError: bad input.
    """
    if options.markdown:
        tables.check_marks(options.markdown, WHERE_MARKS)
    options.check_files()
    if options.plot:
        from . import where_plot
    sections, pictures = [], {}
    for name in options.names():
        network = NETWORKS[name]
        rows: dict[str, list[Row]] = {}
        for contestant in _of_where(network, options):
            try:
                rows[contestant.name] = kept_by_layer(
                    network, contestant, batch=_batch(network, options), tiny=options.quick
                )
            except CannotRunError as reason:
                _print(console, f"{contestant.name}: {reason}")
        title = f"{network.title}, batch {_batch(network, options)}: kB kept for the backward pass"
        head, cells = _where_cells(rows)
        _print(console, f"\n{title}\n{tables.text_table(head, cells)}")
        sections.append(f"{title}\n\n{tables.markdown_table(head, cells)}")
        pictures[title] = rows
    if options.markdown:
        tables.write_between_marks(options.markdown, WHERE_MARKS, "\n\n".join(sections))
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        where_plot.draw(pictures, options.plot)


def _of_where(network: Network, options: Options) -> list[Contestant]:
    """Who is asked: plain training, the plain reverse pass and ours, unless --contestants says otherwise."""
    if options.contestants is not None or options.backends is not None:
        found = options.contestants_of("")
    else:
        wanted = {"full": ("store", "recompute"), "local": ("deferred",)}
        if "full" not in network.variants:
            wanted = {"local": ("store", "deferred")}
        first = network.variants[0]
        names = [STD, f"plain PyTorch, {first}", *(f"ours, {v}, {m}" for v in wanted for m in wanted[v])]
        found = [c for c in CONTESTANTS if c.name in names]
    return [c for c in found if c.variant in (None, *network.variants) and c not in COMPILED]


def _where_cells(rows: dict[str, list[Row]]) -> tuple[list[str], list[list[str]]]:
    """One line per layer and kind of tensor, one column per contestant, and the sum."""
    order: list[tuple[int, str, str]] = []
    sizes: dict[tuple[int, str, str], dict[str, int]] = {}
    for contestant, own in rows.items():
        for row in own:
            key = (row.layer or 10**6, row.name, row.role)
            sizes.setdefault(key, {})[contestant] = row.kept
            if key not in order:
                order.append(key)
    order.sort(key=lambda key: key[0])
    cells, last = [], ""
    for key in order:
        name = "" if key[1] == last else key[1]
        last = key[1]
        cells.append([name, key[2], *(_kilobytes(sizes[key].get(c)) for c in rows)])
    total = [_kilobytes(sum(row.kept for row in own)) for own in rows.values()]
    return ["layer", "tensor", *rows], [*cells, ["all", "", *total]]


def _kilobytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e3:.1f}"


def listing(console: Console) -> None:
    """Prints the networks, suites, contestants and backends that there are."""
    _print(console, "networks")
    for name, network in NETWORKS.items():
        _print(console, f"  {name:10} {network.title}, batch {network.batch}: {' and '.join(network.variants)}")
    _print(console, "suites")
    for name, suite in targets.SUITES.items():
        _print(console, f"  {name:10} {', '.join(suite.networks)}; prints their targets")
    _print(console, "contestants")
    for contestant in contestants(compiled=True):
        _print(console, f"  {contestant.name}")
    _print(console, f"backends, in order of preference\n  {', '.join(rk.backends())}")


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
