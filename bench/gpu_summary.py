"""`summary.md` of `make gpu`: what was run on what, the targets, and every table that there is a figure for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import overhead
from bench.bandwidth import GOAL
from bench.gpu_steps import CHAIN, CHAIN_BACKENDS
from racecar.bench import tables, targets
from racecar.bench.steps import Measured

Report = dict[str, Any]

DRY_BANNER = "DRY RUN ON A CPU, with tiny inputs: nothing below says anything about a GPU."
CHOOSE = "`python -m bench.choose` with the JSON beside this file makes the chooser's table of the layers' rows."
CHAIN_GOAL = 5
MOST_US = 15  # of processor time for a reverse layer, forward and backward
SUITE = targets.SUITES["gpu"]
FORMS = ("library", "fused", "cuda")  # of a layer, as `bench.layers` measures them


def summary(report: Report) -> str:
    """Markdown for people."""
    facts = report["machine"]
    gpu = facts.get("gpu")
    where = f"{gpu['name']}, CUDA {gpu['cuda']}" if gpu else facts["processor"]
    lines = ["# Reverse-pass pretraining against plain training", ""]
    lines += [f"**{DRY_BANNER}**", ""] if report["dry_run"] else []
    lines += [f"{where}; PyTorch {facts['torch']}, Python {facts['python']}, commit {facts['commit']}.", ""]
    lines += ["float32 is multiplied as TF32, by everybody.", ""]
    lines += ["## Targets", "", targets_table({} if report["dry_run"] else report["steps"]), ""]
    for name, step in report["steps"].items():
        lines += _section(name, step)
    return "\n".join([*lines, CHOOSE, ""])


def outcome(step: Report) -> str:
    """A step in a few words."""
    if "error" in step:
        return f"failed: {step['error'].strip().splitlines()[-1]}"
    if "passed" in step:
        return f"{step['counts']['passed']} passed, {step['counts']['skipped']} skipped"
    if "left_out" in step:
        return f"left out: {step['left_out']}"
    return f"{step['tool']} found nothing" if "tool" in step else "measured"


def targets_table(steps: Report) -> str:
    """Every target of the suite for both dtypes; what was not measured says so. Figures of a dry run are no figures."""
    rows: list[list[str]] = []
    for dtype in SUITE.dtypes:
        measured, compiled = _of_dtype(steps, "network", dtype), _of_dtype(steps, "compiled", dtype)
        own = targets.rows(SUITE.targets, measured, SUITE.unmeasured)
        against = {
            row[0]: row for row in targets.rows(SUITE.targets, compiled, SUITE.unmeasured) if ": best of " in row[0]
        }
        rows += [[f"{dtype}, {row[0]}", *row[1:]] for row in (against.get(row[0], row) for row in own)]
        rows.append(_bandwidth_target(steps, dtype))
        rows.append(_chain_target(steps, dtype))
    rows.append(_overhead_target(steps))
    return tables.markdown_table(targets.HEAD, rows)


def _of_dtype(steps: Report, kind: str, dtype: str) -> dict[str, Measured]:
    found = [s for s in steps.values() if s.get("kind") == kind and s.get("dtype") == dtype and "results" in s]
    return {s["network"]: Measured.from_json(s) for s in found if kind == "network" or _is_full(s)}


def _is_full(step: Report) -> bool:
    return any(r["contestant"] == targets.FULL for r in step["results"])


def _bandwidth_target(steps: Report, dtype: str) -> list[str]:
    """The slowest pointwise kernel; none is left out because it is wrong."""
    step = steps.get(f"bandwidth {dtype}", {})
    rows = [] if "error" in step else step.get("rows", [])
    known = [row["share"] for row in rows if "share" in row]
    value = min(known) if known and len(known) == len(rows) else None
    said = SUITE.unmeasured if value is None else "met" if value >= GOAL else "NOT MET"
    name = f"{dtype}, pointwise kernels, the slowest: share of a copy's bandwidth"
    return [name, "GB/s", "", "" if value is None else f"{value:.2f}", "", f"{GOAL:.2f}", "", said]


def _chain_target(steps: Report, dtype: str) -> list[str]:
    """A step of the MLP in one kernel per direction against plain PyTorch's, the faster of eager and compiled."""
    step = steps.get(f"{CHAIN} {dtype} full, torch.compile", {})
    seconds = {r["contestant"]: r["step_seconds"]["median"] for r in step.get("results", [])}
    plain = [taken for name, taken in seconds.items() if name.startswith("plain PyTorch, full")]
    own = seconds.get(f"{targets.FULL}, {CHAIN_BACKENDS[0]}")
    value = min(plain) / own if own and len(plain) == 2 else None
    said = SUITE.unmeasured if value is None else "met" if value >= CHAIN_GOAL else "NOT MET"
    name = f"{dtype}, {CHAIN}, full, store, backend {CHAIN_BACKENDS[0]}: times faster than plain PyTorch's best"
    return [name, "step", "", "" if value is None else f"{value:.2f}", "", f"{CHAIN_GOAL:.2f}", "", said]


def _overhead_target(steps: Report) -> list[str]:
    """The dearest replayed reverse layer."""
    found = [
        r["reverse_us"] for r in steps.get("overhead", {}).get("overhead", []) if r["contestant"].endswith("replayed")
    ]
    said = SUITE.unmeasured if not found else "met" if max(found) <= MOST_US else "NOT MET"
    value = f"{max(found):.0f}" if found else ""
    return ["processor time per reverse layer", "µs", "", value, "", f"{MOST_US}", "", said]


def _section(name: str, step: Report) -> list[str]:
    if "results" in step:
        return [f"## {name}, batch {step['batch']}", "", _network_table(step), "", *_skipped(step)]
    if step.get("overhead"):
        return [f"## {name}", "", tables.markdown_table(overhead.HEAD, overhead.table(step)), ""]
    if not step.get("rows"):
        return [f"{name}: {outcome(step)}", ""]
    table = _bandwidth_table(step) if step["kind"] == "bandwidth" else _layer_table(step)
    best = ", ".join(f"{key.replace('_gb_s', ' GB/s').replace('_tflop_s', ' TFLOP/s')} {value:.0f}"
                     for key, value in step["ceilings"].items())  # fmt: skip
    return [f"## {name}", "", f"{outcome(step)}. Ceilings in the same run: {best}.", "", table, ""]


def _skipped(step: Report) -> list[str]:
    return [line for name, why in step.get("skipped", {}).items() for line in (f"{name}: not measured, {why}", "")]


def _network_table(step: Report) -> str:
    rows = []
    for r in step["results"]:
        ms = {key: value * 1e3 for key, value in r["step_seconds"].items()}
        spread = f"{ms['median']:.2f} ({ms['p20']:.2f} to {ms['p80']:.2f})"
        rows.append([r["contestant"], spread, *(f"{value:.2f}" for value in (
            r["step_ratio"]["median"], r["kept_ratio"], r["peak_ratio"]))])  # fmt: skip
    head = ["", "ms per step (20th to 80th percentile)", "x Std", "kept x Std", "peak x Std"]
    return tables.markdown_table(head, rows)


def _bandwidth_table(step: Report) -> str:
    rows = [
        [r["kernel"], f"{r['us']:.0f}", f"{r['gb_s']:.0f}", f"{r['share']:.2f}"]
        if "us" in r
        else [r["kernel"], "", "", r["why"]]
        for r in step["rows"]
    ]
    return tables.markdown_table(["kernel", "µs", "GB/s", "of a copy"], rows)


def _layer_table(step: Report) -> str:
    units = ("µs", "GB/s", "TFLOP/s")
    head = ["layers", "pass", "channels", "size", "folded", *(f"{form} {unit}" for unit in units for form in FORMS), ""]
    return tables.markdown_table(head, [_layer_cells(row) for row in step["rows"]])


def _layer_cells(row: Report) -> list[str]:
    times = [row.get(f"{form}_us") for form in FORMS]
    size = "x".join(map(str, row["size"]))
    names = [row["layers"][0], row.get("pass", ""), f"{row['c_out']} to {row['c_in']}", size]
    rates: Sequence[tuple[str, float]] = (("bytes", 1e3), ("flops", 1e6))  # per µs: to GB/s, to TFLOP/s
    return [
        *names,
        "yes" if row["factor"] else "",
        *(_number(us) for us in times),
        *(_number(None if us is None else row[what] / us / scale) for what, scale in rates for us in times),
        "; ".join(row[why] for why in ("why", "cuda_why") if row.get(why)),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"
