"""The steps of `make gpu`, most important first, and how each is run in a process of its own with a time limit."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from racecar.bench import machine
from racecar.bench.contestants import STD, VARIANTS, contestants
from racecar.bench.networks import NETWORKS
from racecar.bench.steps import measure_network
from racecar.bench.targets import SUITES
from racecar_kernels import cuda_toolkit

Report = dict[str, Any]

TESTS = machine.ROOT / "tests"
MOST_AT_ONCE = 8  # processes of tests: what takes their time is compiling kernels
KERNELS = ("bandwidth", "layers")
# Small tests that launch every CUDA kernel in every way, and few of PyTorch's, which would be checked as slowly.
SANITIZED = (
    "test_cuda_few_channels.py::test_a_repeated_run_gives_the_same_bits",
    "test_cuda_extension.py::test_folding_is_as_exact_as_plain_pytorch",
    "test_cuda_linear_chain.py::test_what_runs_again_is_the_same",
    "test_cuda_linear_chain.py::test_several_tiles_for_a_block_and_a_ragged_last_one",
)
SANITIZER, FOUND = "compute-sanitizer", 66  # the tool, and the exit status with which it says that it found something
NO_TESTS = 5  # pytest's exit status where none was selected
LINEAR = "linear"
CHAIN = "mlp"  # the network that is one chain of narrow linear layers
CHAIN_BACKENDS = ("cuda",)  # whose kernel for it is asked for besides
LAYER_NETWORKS = ("mnist", "vgg19", "cifar", "smoke", LINEAR)


class Step(NamedTuple):
    """One process, or several with tests. `variant`: whose compiled contestant is measured; `tool`: the sanitizer's."""

    name: str
    kind: str  # tests, network, compiled, bandwidth, layers, overhead or sanitizer
    files: tuple[str, ...] = ()  # of tests
    network: str = ""
    dtype: str = ""
    variant: str = ""
    tool: str = ""
    dry: bool = True  # whether a dry run has it: it does everything once, not for every network


def steps() -> list[Step]:
    """All of them, in order."""
    half, single = SUITES["gpu"].dtypes
    first, last = ("mnist", "cifar", "vgg19"), ("smoke",)
    found = [*_tests()]
    found += [_network(name, half) for name in first]
    found += [Step(f"bandwidth {half}", "bandwidth", dtype=half), *_layers(half), Step("overhead", "overhead")]
    found += [
        Step(f"compute-sanitizer {tool}", "sanitizer", SANITIZED, tool=tool) for tool in ("memcheck", "racecheck")
    ]
    found += [_network(name, single) for name in first]
    found += [Step(f"bandwidth {single}", "bandwidth", dtype=single, dry=False), *_layers(single)]
    found += [_network(name, dtype) for name in (CHAIN, *last) for dtype in (half, single)]
    found += [
        Step(f"{name} {dtype} {variant}, torch.compile", "compiled", (), name, dtype, variant, dry=False)
        for variant in VARIANTS
        for dtype in (half, single)
        for name in (*first, CHAIN, *last)
    ]
    return found


def _tests() -> list[Step]:
    """Only the files that hold such tests: the others import packages that a GPU machine may lack."""
    found, rest = [], []
    for path in sorted(TESTS.glob("test_*.py")):
        text = path.read_text("utf-8")
        if '"interpreted"' in text:
            found.append(Step(f"tests {path.stem.removeprefix('test_')}", "tests", (path.name,), dry=False))
        elif "mark.gpu" in text:
            rest.append(path.name)
    return [Step("tests", "tests", tuple(rest)), *found]


def _network(name: str, dtype: str) -> Step:
    return Step(f"{name} {dtype}", "network", network=name, dtype=dtype)


def _layers(dtype: str) -> list[Step]:
    half = SUITES["gpu"].dtypes[0]
    return [
        Step(
            f"layers {name} {dtype}",
            "layers",
            network=name,
            dtype=dtype,
            dry=name in ("mnist", LINEAR) and dtype == half,
        )
        for name in LAYER_NETWORKS
    ]


# ------------------------------------------------------------------------------------------- running a step


def run_step(step: Step, options: argparse.Namespace, limit: float) -> Report:
    """What a step found, with its seconds; what went wrong stands under `error`."""
    if step.kind == "tests":
        return run_tests(step, options.dry_run, limit)
    if step.kind == "sanitizer":
        return run_sanitizer(step, options.dry_run, limit)
    return run_measurement(step, options, limit)


def run_tests(step: Step, dry_run: bool, limit: float) -> Report:
    """The tests marked `gpu`, dealt out to several processes. On a CPU they skip, which a dry run counts as passed."""
    parts = 1 if dry_run else max(1, min(MOST_AT_ONCE, (os.cpu_count() or 2) // 2))
    with tempfile.TemporaryDirectory() as folder:

        def part(index: int) -> Report:
            argv = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--part={index}/{parts}"]
            argv += [f"--junitxml={folder}/{index}.xml", *(str(TESTS / name) for name in step.files)]
            return run(argv, limit)

        started = time.monotonic()
        with ThreadPoolExecutor(parts) as pool:
            done = list(pool.map(part, range(parts)))
        seconds = time.monotonic() - started
        counts = counted(list(Path(folder).glob("*.xml")))
    bad = [d["output"] for d in done if d["returncode"] not in (0, NO_TESTS)]
    print("\n".join(bad)[-4000:] or done[0]["output"][-500:], flush=True)
    found: Report = {"seconds": seconds, "passed": not bad and (dry_run or counts["passed"] > 0), "counts": counts}
    if not found["passed"]:
        found["error"] = "\n".join(bad)[-4000:] or "no test was run"
    return found


def run_sanitizer(step: Step, dry_run: bool, limit: float) -> Report:
    """The small CUDA cases under a tool of compute-sanitizer. A dry run says how, and runs the same tests without it.

    Every tensor has an allocation of its own, so that what is written or read beyond it is seen.
    """
    found = sanitizer()
    tool = [found or SANITIZER, "--tool", step.tool, f"--error-exitcode={FOUND}", "--target-processes=all"]
    if found is None and not dry_run:
        return {"seconds": 0.0, "left_out": f"{SANITIZER} is not installed; it comes with the CUDA toolkit"}
    argv = ["-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", *(str(TESTS / f) for f in step.files)]
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    print(shlex.join([*tool, sys.executable, *argv]), flush=True)
    done = run(argv, limit, variables, () if dry_run else tool)
    report: Report = {"seconds": done["seconds"]}
    if done["returncode"] != 0:
        report["error"] = done["output"][-4000:] or f"exit status {done['returncode']}"
    elif dry_run:
        report["left_out"] = "a dry run runs its tests without the tool"
    elif " passed" not in done["output"]:
        report["left_out"] = f"its tests did not run: {' '.join(done['output'].splitlines()[-1:])}"
    else:
        report["tool"] = step.tool
    return report


def sanitizer() -> str | None:
    """The path of compute-sanitizer: on PATH, or beside nvcc."""
    try:
        beside = str(cuda_toolkit.find().path.parent)
    except cuda_toolkit.ToolkitError:
        beside = ""
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=beside)


def counted(files: list[Path]) -> dict[str, int]:
    """Over several reports of pytest."""
    number = dict.fromkeys(("tests", "skipped", "failures", "errors"), 0)
    for xml in files:
        suite = next(ElementTree.parse(xml).getroot().iter("testsuite"))
        number = {name: number[name] + int(suite.get(name, 0)) for name in number}
    failed = number["failures"] + number["errors"]
    return {"passed": number["tests"] - number["skipped"] - failed, "skipped": number["skipped"], "failed": failed}


def run_measurement(step: Step, options: argparse.Namespace, limit: float) -> Report:
    """A step that is no test; of one that did not finish, also what it had written by then."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "measured.json"
        argv = ["-m", "bench.gpu_steps", "--out", str(written), "--step", step.name]
        argv += ["--dry-run"] if options.dry_run else []
        argv += ["--rounds", str(options.rounds)] if options.rounds else []
        done = run(argv, limit, {"TRITON_INTERPRET": "1"} if options.dry_run and step.kind in KERNELS else {})
        found: Report = {"seconds": done["seconds"]}
        if written.is_file():
            found |= json.loads(written.read_text())
        if done["returncode"] != 0:
            found["error"] = done["output"][-4000:] or f"exit status {done['returncode']}"
        return found


def run(argv: list[str], limit: float, variables: dict[str, str] | None = None, under: Sequence[str] = ()) -> Report:
    """This Python with `argv` in the tree's root; output and exit status, None after the time limit.

    under: the command of a tool that Python is run in.
    """
    paths = [str(machine.ROOT), str(machine.ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    try:
        done = subprocess.run(
            [*under, sys.executable, *argv],
            cwd=machine.ROOT,
            env={**environment, **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )
        output, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        output, status = f"{text}\nstopped after {limit:.0f} s", None
    return {"output": output, "returncode": status, "seconds": time.monotonic() - started}


# ------------------------------------------------------------------------------------------- inside its process


def main(arguments: list[str] | None = None) -> int:
    """One measuring step, in this process: what `run_measurement` starts."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_steps", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--step", choices=[s.name for s in steps() if s.kind not in ("tests", "sanitizer")], required=True
    )
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args(arguments)
    step = next(s for s in steps() if s.name == options.step)
    device = "cpu" if options.dry_run else "cuda"
    if options.dry_run:
        torch.set_num_threads(1)  # tiny inputs; two threads that wait for each other on a busy machine take minutes
    else:
        machine.prepare_cuda()

    def finished(found: Report) -> None:
        known = {"dry_run": options.dry_run, "device": device, "kind": step.kind, "dtype": step.dtype}
        tf32 = device == "cuda" and step.dtype == "float32"
        part = options.out.with_suffix(".part")
        part.write_text(json.dumps({**known, "network": step.network, "tf32": tf32, **found}))
        part.replace(options.out)

    by_kind = {"network": _measure_network, "compiled": _measure_network, "overhead": _measure_overhead}
    measure = by_kind.get(step.kind, _measure_kernels)
    found = measure(step, device, options.dry_run, options.rounds, finished)
    finished(found)
    wrong = [row for row in found.get("rows", []) if row.get("wrong")]
    for row in wrong:
        print(f"{row.get('layers', [row.get('kernel')])[0]} {row.get('pass', '')}: {row['why']}")
    if wrong:
        print(f"{len(wrong)} of {len(found['rows'])} rows have no figure")
    return 1 if wrong else 0


def _measure_network(
    step: Step, device: str, dry_run: bool, rounds: int | None, finished: Callable[[Report], None]
) -> Report:
    network = NETWORKS[step.network]
    chosen = contestants(compiled=step.kind == "compiled", backends=CHAIN_BACKENDS if step.network == CHAIN else ())
    if step.kind == "compiled":  # the others are in a step of their own: compiling alone takes minutes
        plain = f"plain PyTorch, {step.variant}"
        ours = "store" if step.variant == "full" else "deferred"
        ours = f"ours, {step.variant}, {ours}"
        names = (STD, plain, f"{plain}, torch.compile", ours, *(f"{ours}, {name}" for name in CHAIN_BACKENDS))
        chosen = [c for c in chosen if c.name in names]
    measured = measure_network(
        network,
        chosen,
        batch=2 if dry_run else network.gpu_batch,
        rounds=rounds or (2 if dry_run else 30),
        warmup=1 if dry_run else 5,
        device=device,
        dtype=getattr(torch, step.dtype),
        tiny=dry_run,
    )
    return measured.as_json()


def _measure_overhead(
    step: Step, device: str, dry_run: bool, rounds: int | None, finished: Callable[[Report], None]
) -> Report:
    from bench import overhead

    return overhead.measure(device, rounds or (2 if dry_run else 50))


def _measure_kernels(
    step: Step, device: str, dry_run: bool, rounds: int | None, finished: Callable[[Report], None]
) -> Report:
    from bench import bandwidth, layers, linear_layers

    if dry_run:
        layers.interpret(["-m", "bench.gpu_steps", *sys.argv[1:]])
    few = rounds or (1 if dry_run else 20)
    if step.kind == "bandwidth":
        return bandwidth.measure(step.dtype, device, rounds=few, tiny=dry_run, finished=finished)
    if step.network == LINEAR:
        return linear_layers.measure(step.dtype, device, rounds=few, tiny=dry_run, finished=finished)
    return layers.measure([step.network], step.dtype, device, rounds=few, tiny=dry_run, finished=finished)


if __name__ == "__main__":
    sys.exit(main())
