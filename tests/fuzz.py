"""Runs the fuzz tests: `make fuzz`, or `python tests/fuzz.py --cases 20000 --seed 7` (see --help).

Cases are drawn by hypothesis from one seed, which is printed. Failures are made small, printed with what to paste to
run them again, and kept in `.hypothesis/fuzz`, from where the next run replays them first. (Hypothesis' own database
stays closed where a seed is given.)
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # make does not install the tests
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent), str(here.parent / "python")]

import fuzz_chains
import fuzz_layers
import fuzz_pointwise
import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Target:
    """What is fuzzed: cases, what each has to fulfil, and its part of all cases."""

    module: str
    cases: SearchStrategy
    check: Callable[[object], str]
    part: float


# To fuzz something else, write its module (a case of plain values, a strategy, `check`) and add a row. A new backend
# needs nothing: cases draw from `rk.backends()`.
TARGETS = {
    "layers": Target("fuzz_layers", fuzz_layers.layer_cases, fuzz_layers.check, 0.45),
    "chains": Target("fuzz_chains", fuzz_chains.chain_cases, fuzz_chains.check, 0.3),
    "pointwise": Target("fuzz_pointwise", fuzz_pointwise.pointwise_cases, fuzz_pointwise.check, 0.25),
}
KEPT = Path(__file__).resolve().parent.parent / ".hypothesis" / "fuzz"


def run(name: str, cases: int, seed: int, *, every: float = 10.0) -> Counter[str]:
    """Runs what failed before, then `cases` new cases of a target; gives how many were served, refused, passed over.

    Raises AssertionError with the smallest failing case found. Prints how far it is every `every` seconds.
    """
    target, outcomes, failing = TARGETS[name], Counter[str](), list[object]()
    start = last = time.monotonic()

    def one(case: object) -> None:
        nonlocal last
        try:
            outcomes[target.check(case)] += 1
        except Exception as error:  # whatever it is, it needs the case beside it
            failing[:] = [case]
            raise AssertionError(f"{error}\n\n{how_to_repeat(name, case)}") from error
        now = time.monotonic()
        if now - last > every:
            last = now
            print(f"  {name}: {outcomes.total()} of {cases} cases, {now - start:.0f} s", flush=True)

    settings = hypothesis.settings(
        max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None,
        report_multiple_bugs=False, phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    with torch.random.fork_rng(), poisoned():
        try:
            for case in kept(name):
                one(case)
            outcomes.clear()
            hypothesis.seed(seed)(settings(hypothesis.given(target.cases)(one)))()
        except AssertionError:
            keep(name, failing)  # the last one that failed is the smallest
            raise
    keep(name, [])
    return outcomes


def kept(name: str) -> list[object]:
    """The case that failed last time, if it is still one."""
    try:
        return [eval(line, vars(sys.modules[TARGETS[name].module])) for line in (KEPT / name).read_text().splitlines()]
    except (OSError, TypeError, NameError):  # none, or its fields have changed since
        return []


def keep(name: str, failing: list[object]) -> None:
    if failing:
        KEPT.mkdir(parents=True, exist_ok=True)
        (KEPT / name).write_text("".join(f"{case!r}\n" for case in failing))
    else:
        (KEPT / name).unlink(missing_ok=True)


class poisoned:  # noqa: N801  used like the fixture of the same name
    """Uninitialised memory is full of NaN, so that an element which is never written shows."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.before = torch.utils.deterministic.fill_uninitialized_memory
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_: object) -> None:
        torch.utils.deterministic.fill_uninitialized_memory = self.before
        torch.use_deterministic_algorithms(False)


def how_to_repeat(name: str, case: object) -> str:
    return f"To run this case again:\n\nPYTHONPATH=.:python:tests python - <<'CASE'\nfrom {TARGETS[name].module} import *\nprint(check({case!r}))\nCASE"  # noqa: E501  to be pasted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="cases over all targets (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="repeats a run (default: another one each time)")
    parser.add_argument("--only", choices=TARGETS, help="one target gets all cases")
    options = parser.parse_args()
    if options.cases < 1:
        parser.error(f"--cases is a whole number from 1, got {options.cases}")
    seed = int.from_bytes(os.urandom(3), "big") if options.seed is None else options.seed
    torch.set_num_threads(min(2, torch.get_num_threads()))  # tensors are small; two, so that blocks are shared out
    print(f"seed {seed}; again: make fuzz CASES={options.cases} ARGS='--seed {seed}'", flush=True)
    total, failed = Counter[str](), 0
    for name in [options.only] if options.only else TARGETS:
        cases = -int(-options.cases * (1 if options.only else TARGETS[name].part) // 1)
        try:
            outcomes = run(name, cases, seed)
        except AssertionError as error:
            failed += 1
            print(f"{name}: FAILED\n\n{error}\n", flush=True)
        else:
            total += outcomes
            print(f"{name}: {_listed(outcomes)}", flush=True)
    print(f"{total.total()} cases ran: {_listed(total)}" + (f"; {failed} of the targets FAILED" if failed else ""))
    return 1 if failed else 0


def _listed(outcomes: Counter[str]) -> str:
    return ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())) or "none"


if __name__ == "__main__":
    sys.exit(main())
