"""What the package reaches for on a CPU and on a GPU, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .steps import Measured, Result


@dataclass(frozen=True)
class Target:
    """One row of the target table; ratios to plain training.

    Attributes:
        network: a key of NETWORKS.
        contestant: whose figures count.
        plain: the contestant that does the same in plain PyTorch, for comparison.
        step: step time to reach for; None: no target.
        at_least: the step time that must be reached, where that is not the same.
        kept, peak: bytes to reach for; None: no target.
        faster: how many times faster than the best contestant in plain PyTorch; None: no target.
    """

    network: str
    contestant: str
    plain: str
    step: float | None
    at_least: float | None
    kept: float
    peak: float | None
    faster: float | None = None


FULL = "ours, full, store"


def _full(network: str, step: float, at_least: float, kept: float, peak: float | None) -> Target:
    return Target(network, FULL, "plain PyTorch, full", step, at_least, kept, peak)


def _local(network: str, step: float, kept: float) -> Target:
    return Target(network, "ours, local, deferred", "plain PyTorch, local", step, 2.2, kept, 1.0)


# The table at the end of section 5 of the project's design.
CPU = [
    _full("mnist", 1.30, 1.50, 0.80, 1.0),
    _full("cifar", 1.80, 2.00, 0.80, 1.0),
    _full("vgg19", 1.85, 1.95, 1.35, 1.40),
    _full("mlp", 1.35, 1.60, 2.0, None),
    _local("mnist", 1.95, 0.65),
    _local("cifar", 2.1, 0.55),
    _local("vgg19", 2.1, 0.85),
]


def _on_gpu(network: str, step: float) -> list[Target]:
    """Step times of the full reverse pass; bytes are no other than on a CPU."""
    return [
        replace(t, step=step, at_least=None, faster=1.25)
        if t.contestant == FULL
        else replace(t, step=None, at_least=None)
        for t in CPU
        if t.network == network
    ]


GPU = [*_on_gpu("mnist", 1.35), *_on_gpu("cifar", 1.75), *_on_gpu("vgg19", 1.85)]

RECOMPUTE_STEP, RECOMPUTE_KEPT = 1.2, 1.0  # of the full reverse with `recompute`, as a multiple of that with `store`


@dataclass(frozen=True)
class Suite:
    """Networks that are measured together, and the targets that their figures are held against.

    Attributes:
        device: where: cpu or cuda.
        dtypes: of parameters and activations; the first is measured where none is asked for.
        unmeasured: what a row says that nothing was measured for.
    """

    networks: tuple[str, ...]
    targets: tuple[Target, ...]
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32",)
    unmeasured: str = "not measured"


SUITES = {
    "cpu": Suite(tuple(dict.fromkeys(t.network for t in CPU)), tuple(CPU)),
    "gpu": Suite(
        ("mnist", "cifar", "vgg19", "smoke"), tuple(GPU), "cuda", ("bfloat16", "float32"), "not yet measured on a GPU"
    ),
}

HEAD = ["network, contestant", "figure", "plain", "measured", "least", "target", "at least", "verdict"]


def rows(
    targets: Sequence[Target], measured: Mapping[str, Measured], unmeasured: str = "not measured"
) -> list[list[str]]:
    """Every figure of every target beside what was measured, then `recompute` against `store`; cells under HEAD."""
    found: list[list[str]] = []
    for target in targets:
        network = measured.get(target.network)
        ours = None if network is None else network.of(target.contestant)
        plain = None if network is None else network.of(target.plain)
        name = f"{target.network}: {target.contestant}"
        wanted = [("step", target.step, target.at_least), ("kept", target.kept, None), ("peak", target.peak, None)]
        found += [
            _row(name, figure, _ratio(plain, figure), ours, goal, least, unmeasured)
            for figure, goal, least in wanted
            if goal is not None
        ]
        if target.faster is not None:
            found.append(_faster_row(target, network, target.faster, unmeasured))
    for name, network in measured.items():
        if any(target.network == name for target in targets):
            found += _recompute_rows(name, network)
    return found


def _faster_row(target: Target, network: Measured | None, goal: float, unmeasured: str) -> list[str]:
    """Against the best contestant in plain PyTorch. Without the compiled one nobody knows which is the best."""
    value = None
    if network is not None:
        ours = network.of(target.contestant)
        compiled = f"{target.plain}, torch.compile"
        plain = [r for r in network.results if r.contestant.startswith(target.plain)]
        if ours is not None and plain and any(r.contestant == compiled for r in plain):
            value = min(r.time_ratio.median for r in plain) / ours.time_ratio.median
    said = unmeasured if value is None else "met" if value >= goal else "NOT MET"
    name = f"{target.network}: best of {target.plain} / {target.contestant}"
    return [name, "step", "", _text(value), "", "", f"{goal:.2f}", said]


def _ratio(result: Result | None, figure: str) -> float | None:
    if result is None:
        return None
    return {"step": result.time_ratio.median, "kept": result.kept_ratio, "peak": result.peak_ratio}[figure]


def _row(
    name: str,
    figure: str,
    plain: float | None,
    ours: Result | None,
    goal: float,
    at_least: float | None,
    unmeasured: str,
) -> list[str]:
    value = _ratio(ours, figure)
    least = ours.least if ours is not None and figure == "step" else None
    return [name, figure, _text(plain), _text(value), _text(least), _text(goal), _text(at_least),
            verdict(value, goal, at_least, unmeasured)]  # fmt: skip


def verdict(value: float | None, goal: float, at_least: float | None, unmeasured: str = "not measured") -> str:
    """Whether a figure reaches its target, or at least what it must. No rounding in favour of the figure."""
    if value is None:
        return unmeasured
    if value <= goal:
        return "met"
    return "at least" if at_least is not None and value <= at_least else "NOT MET"


def _recompute_rows(name: str, network: Measured) -> list[list[str]]:
    store, again = network.of("ours, full, store"), network.of("ours, full, recompute")
    if store is None or again is None:
        return []
    step = again.time_ratio.median / store.time_ratio.median
    label = f"{name}: full, recompute / store"
    return [
        [label, "step", "", _text(step), "", _text(RECOMPUTE_STEP), "", verdict(step, RECOMPUTE_STEP, None)],
        [label, "kept", "", _text(again.kept / store.kept), "", _text(RECOMPUTE_KEPT), "",
         verdict(again.kept / store.kept, RECOMPUTE_KEPT, None)],
    ]  # fmt: skip


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
