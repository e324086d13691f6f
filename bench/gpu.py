"""`make gpu OUT=dir`: tests and figures on a GPU, with nothing but this tree, Python, PyTorch and pytest.

Steps in order of importance, each in a process of its own with a time limit: build the extension (carrying on without
it), the tests marked `gpu`, then step time, kept and peak bytes of every network and dtype as ratios to plain training.
One JSON per GPU model and a `summary.md` are written into OUT after every step; a step that the JSON already holds for
the same sources is not repeated, so a run that was cut short can be taken up again. No figure is measured after a
failed test, and every contestant's gradients are checked in float64 in the process that measures it.

`--dry-run` runs the same code on the CPU with tiny inputs. Its JSON says so, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from racecar.bench import machine
from racecar.bench.contestants import contestants
from racecar.bench.networks import NETWORKS
from racecar.bench.steps import measure_network

LIMIT_S = 480
BUILD_LIMIT_S = 300
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEASURED = [(network, dtype) for dtype in DTYPES for network in ("mnist", "cifar", "vgg19")]
DRY_BANNER = "DRY RUN ON A CPU, with tiny inputs: nothing below says anything about a GPU."

Report = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    described.add_argument("--out", type=Path, required=True, help="folder for the JSON and summary.md")
    described.add_argument("--dry-run", action="store_true", help="the same code on the CPU, with tiny inputs")
    described.add_argument("--force", action="store_true", help="repeat steps that the JSON already holds")
    described.add_argument("--limit", type=float, default=LIMIT_S, help=f"seconds per step (default: {LIMIT_S})")
    described.add_argument("--rounds", type=int, help="timed steps of each contestant (default: 30; dry run: 2)")
    described.add_argument(
        "--compile", action="store_true", help="the plain reverse pass under torch.compile too: minutes per network"
    )
    described.add_argument("--measure", nargs=2, metavar=("NETWORK", "DTYPE"), help=argparse.SUPPRESS)
    return described


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    device = "cpu" if options.dry_run else "cuda"
    if not options.dry_run and not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} sees no CUDA device; DRY=1 tries the same code on the CPU", file=sys.stderr)
        return 2
    if options.measure:
        return measure_into(options, device)
    if options.dry_run:
        print(DRY_BANNER)
    options.out.mkdir(parents=True, exist_ok=True)
    build_extension()
    facts = machine.facts(device)
    target = options.out / file_name(facts, options.dry_run)
    report = started_report(target, facts, options)
    if "tests" not in report["steps"] or not report["steps"]["tests"].get("passed"):
        record(report, target, "tests", run_tests(options.limit))
    if not report["steps"]["tests"]["passed"]:
        print(f"tests failed: no figure is measured; see {target}", file=sys.stderr)
        return 1
    for network, dtype in MEASURED:
        name = f"{network} {dtype}"
        if "results" in report["steps"].get(name, {}):
            print(f"{name}: already in {target.name}")
            continue
        record(report, target, name, run_measurement(network, dtype, options))
    failed = [name for name, step in report["steps"].items() if "error" in step]
    print(f"\nwritten: {target} and {options.out / 'summary.md'}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def file_name(facts: Report, dry_run: bool) -> str:
    if dry_run:
        return "dry-run-cpu.json"
    return re.sub(r"[^a-z0-9]+", "-", facts["gpu"]["name"].lower()).strip("-") + ".json"


def started_report(target: Path, facts: Report, options: argparse.Namespace) -> Report:
    """The report of an earlier run of the same sources on the same device, or an empty one."""
    fresh: Report = {"dry_run": options.dry_run, "device": facts["device"], "machine": facts, "steps": {}}
    if options.force or not target.is_file():
        return fresh
    try:
        earlier: Report = json.loads(target.read_text())
        same = earlier["machine"] == facts and earlier["dry_run"] == options.dry_run
    except (ValueError, KeyError):
        return fresh
    if not same:
        print(f"{target.name} is of other sources, versions or another machine: every step is repeated")
        return fresh
    return earlier


def record(report: Report, target: Path, name: str, step: Report) -> None:
    """Adds a step and writes everything, so that nothing is lost when the next step is cut short."""
    report["steps"][name] = step
    unfinished = target.with_suffix(".json.part")
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    unfinished.replace(target)
    (target.parent / "summary.md").write_text(summary(report))
    print(f"{name}: {outcome(step)} ({step['seconds']:.0f} s)", flush=True)


def outcome(step: Report) -> str:
    if "error" in step:
        return f"failed: {step['error'].strip().splitlines()[-1]}"
    if "passed" in step:
        return f"{step['counts']['passed']} passed, {step['counts']['skipped']} skipped"
    return "measured"


def build_extension() -> None:
    """Compiles `racecar_kernels._C` in place where it is missing or does not fit; never a reason to stop."""
    from racecar_kernels import extension

    if extension.why_not() is None:
        print("compiled extension: in use")
        return
    done = run(["setup.py", "build_ext", "--inplace"], BUILD_LIMIT_S)
    check = run(["-c", "from racecar_kernels import extension as e; print(e.why_not() or 'in use')"], BUILD_LIMIT_S)
    print(f"compiled extension: {check['output'].strip() or done['output'].strip()[-300:]}")


def run_tests(limit: float) -> Report:
    """The tests marked `gpu`. On a CPU they skip, which a dry run counts as passed and says."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        # only the files that hold such tests: the others import packages that a GPU machine may lack
        files = sorted(str(p) for p in (machine.ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text("utf-8"))
        done = run(["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={xml}", *files], limit)
        print(done["output"][-4000:], flush=True)
        step: Report = {"seconds": done["seconds"], "passed": done["returncode"] == 0}
        step["counts"] = counted(xml) if xml.is_file() else {"passed": 0, "skipped": 0, "failed": 0}
    if not step["passed"]:
        step["error"] = done["output"][-4000:] or "pytest wrote nothing"
    return step


def counted(xml: Path) -> dict[str, int]:
    suite = next(ElementTree.parse(xml).getroot().iter("testsuite"))
    number = {name: int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors")}
    failed = number["failures"] + number["errors"]
    return {"passed": number["tests"] - number["skipped"] - failed, "skipped": number["skipped"], "failed": failed}


def run_measurement(network: str, dtype: str, options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        argv = ["-m", "bench.gpu", "--out", folder, "--measure", network, dtype]
        argv += ["--dry-run"] if options.dry_run else []
        argv += ["--rounds", str(options.rounds)] if options.rounds else []
        argv += ["--compile"] if options.compile else []
        done = run(argv, options.limit)
        written = Path(folder) / "measured.json"
        if done["returncode"] == 0 and written.is_file():
            return {"seconds": done["seconds"], **json.loads(written.read_text())}
    return {"seconds": done["seconds"], "error": done["output"][-4000:] or f"exit status {done['returncode']}"}


def measure_into(options: argparse.Namespace, device: str) -> int:
    """One network in one dtype, in this process: what `run_measurement` starts."""
    name, dtype = options.measure
    network, dry = NETWORKS[name], options.dry_run
    if dry:
        torch.set_num_threads(1)  # tiny inputs; two threads that wait for each other on a busy machine take minutes
    torch.backends.cudnn.benchmark = True
    batch = 2 if dry else network.gpu_batch
    measured = measure_network(
        network,
        contestants(compiled=options.compile),
        batch=batch,
        rounds=options.rounds or (2 if dry else 30),
        warmup=1 if dry else 5,
        device=device,
        dtype=DTYPES[dtype],
        tiny=dry,
    )
    step = {
        "dry_run": dry,
        "device": device,
        "dtype": dtype,
        "tf32_convolutions": bool(torch.backends.cudnn.allow_tf32) and not dry,
        **measured.as_json(),
    }
    (options.out / "measured.json").write_text(json.dumps(step))
    return 0


def run(argv: list[str], limit: float) -> Report:
    """This Python with `argv` in the tree's root; output and exit status, None after the time limit."""
    paths = [str(machine.ROOT), str(machine.ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *argv],
            cwd=machine.ROOT,
            env=environment,
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


def summary(report: Report) -> str:
    """Markdown for people: what was run on what, and the ratios."""
    facts = report["machine"]
    gpu = facts.get("gpu")
    where = f"{gpu['name']}, CUDA {gpu['cuda']}" if gpu else facts["processor"]
    lines = ["# Reverse-pass pretraining against plain training", ""]
    lines += [f"**{DRY_BANNER}**", ""] if report["dry_run"] else []
    lines += [f"{where}; PyTorch {facts['torch']}, Python {facts['python']}, commit {facts['commit']}", ""]
    for name, step in report["steps"].items():
        if "results" not in step:
            lines += [f"{name}: {outcome(step)}", ""]
            continue
        lines += [f"## {name}, batch {step['batch']}", ""]
        lines += [
            "| | ms per step (20th to 80th percentile) | x Std | kept x Std | peak x Std |",
            "|---|---|---|---|---|",
        ]
        for r in step["results"]:
            ms = {key: value * 1e3 for key, value in r["step_seconds"].items()}
            lines.append(
                f"| {r['contestant']} | {ms['median']:.2f} ({ms['p20']:.2f} to {ms['p80']:.2f}) | "
                f"{r['step_ratio']['median']:.2f} | {r['kept_ratio']:.2f} | {r['peak_ratio']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
