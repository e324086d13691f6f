"""`python -m bench`: the reverse pass against plain training, on this machine's CPU."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import torch

from bench import machine
from bench.contestants import CONTESTANTS, WrongGradientError
from bench.networks import NETWORKS
from bench.steps import markdown, measure_network, table

BEGIN, END = "<!-- measured:begin", "<!-- measured:end -->"


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    described.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)} (default: all)")
    described.add_argument("--contestants", metavar="TEXT", help="only those whose name contains TEXT, and Std")
    described.add_argument("--batch", type=int, help="samples per step (default: the network's own)")
    described.add_argument("--rounds", type=int, default=15, help="timed steps of each contestant (default: 15)")
    described.add_argument("--threads", type=int, help="PyTorch's threads (default: PyTorch's choice)")
    described.add_argument("--quick", action="store_true", help="tiny inputs, 2 rounds: does it run, not how fast")
    described.add_argument(
        "--markdown", type=Path, metavar="FILE", help=f"write the ratios there, between {BEGIN} ... and {END}"
    )
    described.add_argument("--json", type=Path, metavar="FILE", help="also write machine, versions and figures here")
    return described


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    unknown = [name for name in options.networks if name not in NETWORKS]
    if unknown:
        print(f"no network is named {', '.join(unknown)}; there are {', '.join(NETWORKS)}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    contestants = [c for c in CONTESTANTS if options.contestants is None or options.contestants in c.name]
    report = {"machine": machine.facts(), "dtype": "float32", "quick": options.quick, "networks": {}}
    facts = report["machine"]
    where = f"{facts['processor']}, {facts['threads']} threads, PyTorch {facts['torch']}, commit {facts['commit']}"
    print(where)
    sections = []
    for name in options.networks or NETWORKS:
        network = NETWORKS[name]
        batch = options.batch or (2 if options.quick else network.batch)
        try:
            results = measure_network(
                network,
                contestants,
                batch=batch,
                rounds=2 if options.quick else options.rounds,
                warmup=1 if options.quick else 2,
                tiny=options.quick,
            )
        except WrongGradientError as wrong:
            print(wrong, file=sys.stderr)
            return 1
        title = f"{network.title}, batch {batch}" + (" (tiny input)" if options.quick else "")
        print("\n" + table(title, results))
        sections.append(markdown(title, results))
        report["networks"][name] = {"batch": batch, "results": [r.as_json() for r in results]}
    if options.markdown:
        write_between_marks(options.markdown, "\n\n".join([*sections, f"{where}."]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwritten: {options.json}")
    return 0


def write_between_marks(path: Path, text: str) -> None:
    """Replaces what `path` has between its line BEGIN ... and its line END."""
    old = path.read_text()
    new, count = re.subn(
        rf"(^{BEGIN}[^\n]*\n).*?(^{END})", lambda m: f"{m[1]}\n{text}\n\n{m[2]}", old, flags=re.DOTALL | re.MULTILINE
    )
    if count != 1:
        raise SystemExit(f"{path} needs one line that begins with {BEGIN!r}, and a line {END!r} after it")
    path.write_text(new)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    sys.exit(main())
