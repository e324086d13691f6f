"""`python -m bench.models`: what the reverse pass of well-known models costs: layers covered, step time, kept bytes.

Every model trains a step alternately with its plain twin, in this process: forward, reverse, backward, no optimiser.
A name is a function of torchvision.models, or `timm:NAME`; both are needed only for what is asked for.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import racecar
from racecar.bench import machine
from racecar.measure import kept_bytes, ratios, step_times
from racecar_kernels import describe

MODELS = (
    "vgg11_bn resnet18 resnet50 densenet121 mobilenet_v3_small convnext_tiny efficientnet_b0 timm:vit_tiny_patch16_224"
)
SIDES = {"timm:vit_tiny_patch16_224": 224}
PLAIN = "plain"


def build(name: str) -> nn.Module:
    """The model, with ten classes. Raises ValueError for a name that there is not."""
    library, _, model = name.rpartition(":")
    try:
        if library == "timm":
            import timm

            made: nn.Module = timm.create_model(model, pretrained=False, num_classes=10)
            return made
        import torchvision

        made = torchvision.models.get_model(model, weights=None, num_classes=10)
    except (ImportError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{name!r} cannot be built: {error}") from error
    return made


def measure(name: str, side: int, batch: int, memory: str, rounds: int) -> dict[str, Any]:
    """One row: layers covered of the operations there are, and both ratios to the plain twin."""
    torch.manual_seed(0)
    plain = build(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net = copy.deepcopy(plain)
    x = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
    wrapped = racecar.wrap(net, 1e-6, memory=memory, example=x, variant="local" if memory == "deferred" else "auto")

    def loss(model: Any) -> Tensor:
        out: Tensor = model(x).square().mean()
        return out if model is plain else out + model.reverse_loss

    def step(model: Any) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            loss(model).backward()

        return run

    times = ratios(step_times({PLAIN: step(plain), memory: step(wrapped)}, rounds=rounds, warmup=3), PLAIN)
    kept = {
        key: kept_bytes(lambda m=model: loss(m), model.parameters())
        for key, model in ((PLAIN, plain), (memory, wrapped))
    }
    operations = sum(describe.is_a(m, describe.TIED) for m in plain.modules())
    return {
        "model": name, "side": side, "batch": batch, "memory": memory, "variant": wrapped.plan.variant,
        "layers": len(wrapped.plan.layers), "operations": operations,
        "step": times[memory].median, "kept": kept[memory] / kept[PLAIN],
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| model | layers of operations | variant, memory | step × Std | kept × Std |", "|---|---|---|---|---|"]
    for row in rows:
        cells = f"{row['layers']} of {row['operations']} | {row['variant']}, {row['memory']}"
        lines.append(
            f"| {row['model']}, {row['batch']}×{row['side']}² | {cells} | {row['step']:.2f} | {row['kept']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", default=MODELS, help="names with spaces between; of torchvision, or timm:NAME")
    parser.add_argument("--memory", default="store deferred", help="policies with spaces between")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the figures as JSON, too")
    given = parser.parse_args(arguments)
    if min(given.side, given.batch, given.rounds) < 1:
        parser.error("--side, --batch and --rounds must be at least 1")
    rows = []
    for name in given.models.split():
        for memory in given.memory.split():
            try:
                rows.append(measure(name, SIDES.get(name, given.side), given.batch, memory, given.rounds))
            except ValueError as error:
                parser.error(str(error))
            print(json.dumps(rows[-1]), file=sys.stderr)
    print(table(rows))
    if given.out is not None:
        found = {"machine": machine.facts(), "rounds": given.rounds, "rows": rows}
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
