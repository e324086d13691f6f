"""`make gpu OUT=dir`: tests and figures on a GPU, with nothing but this tree, Python, PyTorch and pytest.

Steps in order of importance, each in a process of its own with a time limit: the extension is built (or done without),
then come the tests marked `gpu`, step time, kept and peak bytes of every network and dtype as ratios to plain training,
the pointwise kernels' bandwidth, both forms of every layer, and plain PyTorch under `torch.compile`; `--list` names
them. One JSON per GPU model and a `summary.md` are written into OUT after every step. A step that the JSON already
holds for the same sources is not repeated, so a run that was cut short can be taken up again; one that failed is, and
costs the others nothing. But no figure is measured before all tests have passed, and everything is checked again in the
process that measures it: gradients in float64, kernels against plain PyTorch.

`--dry-run` runs the same code on the CPU with tiny inputs. Its JSON says so, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

import torch

from bench.gpu_steps import Report, Step, run, run_step, steps
from bench.gpu_summary import DRY_BANNER, outcome, summary
from racecar.bench import machine

LIMIT_S = 480
BUILD_LIMIT_S = 300
LEAST_S = 20  # with less left of --total no step is begun


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    described.add_argument("--out", type=Path, required=True, help="folder for the JSON and summary.md")
    described.add_argument("--dry-run", action="store_true", help="the same code on the CPU, with tiny inputs")
    described.add_argument("--force", action="store_true", help="repeat steps that the JSON already holds")
    described.add_argument("--limit", type=float, default=LIMIT_S, help=f"seconds per step (default: {LIMIT_S})")
    described.add_argument("--total", type=float, help="seconds for all of this run; what is left waits for the next")
    described.add_argument("--only", metavar="TEXT", default="", help="of the figures those whose step contains TEXT")
    described.add_argument("--rounds", type=int, help="timed runs of each contestant (default: 30; dry run: 2)")
    described.add_argument("--list", action="store_true", help="name the steps, and do nothing")
    return described


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    chosen = [s for s in steps() if (s.dry or not options.dry_run) and (s.kind == "tests" or options.only in s.name)]
    if options.list:
        print("\n".join(s.name for s in chosen))
        return 0
    if options.only and all(s.kind == "tests" for s in chosen):
        print(f"no step's name contains {options.only!r}; --list names them", file=sys.stderr)
        return 2
    device = "cpu" if options.dry_run else "cuda"
    if not options.dry_run and not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} sees no CUDA device; DRY=1 tries the same code on the CPU", file=sys.stderr)
        return 2
    if options.dry_run:
        print(DRY_BANNER)
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.total if options.total else float("inf")
    build_extension()
    facts = machine.facts(device)
    target = options.out / file_name(facts, options.dry_run)
    report = started_report(target, facts, options)
    return run_all(chosen, report, target, options, end)


def run_all(chosen: list[Step], report: Report, target: Path, options: argparse.Namespace, end: float) -> int:
    """Runs what the report does not hold yet; 0 where all of it is done by then."""
    finished = True
    for step in chosen:
        failed_tests = [s.name for s in chosen if s.kind == "tests" and "error" in report["steps"].get(s.name, {})]
        if step.kind != "tests" and failed_tests:
            print(f"{', '.join(failed_tests)} failed: no figure is measured; see {target}", file=sys.stderr)
            return 1
        if done(report, step):
            print(f"{step.name}: already in {target.name}")
        elif end - time.monotonic() < LEAST_S:
            finished = False
            print(f"the {options.total:.0f} s of --total are over before {step.name}: run again to go on")
            break
        else:
            record(report, target, step.name, run_step(step, options, min(options.limit, end - time.monotonic())))
    failed = [name for name, found in report["steps"].items() if "error" in found]
    print(f"\nwritten: {target} and {target.parent / 'summary.md'}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or not finished else 0


def done(report: Report, step: Step) -> bool:
    """Whether the report holds what the step would find."""
    found = report["steps"].get(step.name)
    return found is not None and "error" not in found


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
    except (ValueError, KeyError, TypeError):
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


def for_this_gpu() -> dict[str, str]:
    """Variables with which the CUDA kernels are compiled for the GPU that is here alone, in a sixth of the time."""
    if not torch.cuda.is_available():
        return {}
    return {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}


def build_extension() -> None:
    """Compiles in place what is missing or does not fit of the compiled modules; never a reason to stop."""
    from racecar_kernels import extension

    wanted = {extension.CPP: "compiled extension", **({extension.CUDA: "CUDA extension"} if torch.version.cuda else {})}
    output = ""
    if any(extension.load(name) is None for name in wanted):
        output = run(["setup.py", "build_ext", "--inplace"], BUILD_LIMIT_S, for_this_gpu())["output"]
        extension.forget()
    for name, called in wanted.items():  # in a process of its own: this one may hold the module that was there before
        check = run(["-c", f"from racecar_kernels import extension as e; print(e.why_not({name!r}) or 'in use')"], 60)
        print(f"{called}: {check['output'].strip() or output.strip()[-300:]}")


if __name__ == "__main__":
    sys.exit(main())
