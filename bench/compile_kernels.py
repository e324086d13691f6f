"""Compiles every shipped configuration of the Triton kernels for every architecture, without a GPU, and reads it back.

    python -m bench.compile_kernels --out kernels.json

Fails where a kernel spills registers beyond `MOST_SPILLED`, needs more shared memory than the chip has, or lacks the
matrix instructions that it is meant to have.
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from racecar_kernels.gpu import shipped

MOST_SPILLED = 32  # bytes of a thread's stack: a few loop counters
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # that one program can have, CUDA programming guide
# What the compiler emits for tl.dot: in PTX, by architecture.
MATRIX = {80: ("mma.sync",), 90: ("wgmma",), 100: ("tcgen05.mma", "mma.sync")}
OBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass
class Compiled:
    """What came out of one compilation."""

    kernel: str
    config: str
    architecture: int
    seconds: float
    registers: int
    stack: int
    shared: int
    wide_loads: int
    matrix: bool
    trouble: str = ""


def build(entry: shipped.Shipped, architecture: int) -> Compiled:
    """Compiles one entry; what is wrong with the result stands in `trouble`."""
    names = entry.kernel.arg_names
    signature = {name: entry.signature.get(name, "constexpr") for name in names}
    constants = {(i,): entry.constants.get(name) for i, name in enumerate(names) if signature[name] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in entry.aligned}
    source = ASTSource(fn=entry.kernel, signature=signature, constexprs=constants, attrs=aligned)
    start = time.perf_counter()
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(entry.options))
    seconds = time.perf_counter() - start
    registers, stack, local = resources(made.asm["cubin"])
    ptx = made.asm["ptx"]
    found = Compiled(
        entry.kernel.__name__,
        entry.name,
        architecture,
        round(seconds, 2),
        registers,
        stack + local,
        made.metadata.shared,
        len(re.findall(r"(?:ld|cp)\.\S*(?:v4|v8|\.16;|128)", ptx)),
        any(name in ptx for name in meant(entry, architecture)),
    )
    if found.stack > MOST_SPILLED:
        found.trouble = f"spills {found.stack} bytes a thread, at most {MOST_SPILLED} are allowed"
    elif found.shared > SHARED[architecture]:
        found.trouble = f"needs {found.shared} bytes of shared memory, sm_{architecture} has {SHARED[architecture]}"
    elif entry.matrix and not found.matrix:
        found.trouble = f"has no {' or '.join(meant(entry, architecture))}"
    return found


def meant(entry: shipped.Shipped, architecture: int) -> tuple[str, ...]:
    """The matrix instructions that a kernel is to have. wgmma takes 64 rows; smaller tiles do with an older one."""
    rows = entry.constants.get("BLOCK_R", entry.constants.get("BLOCK_M", 64))
    return MATRIX[architecture] if rows >= 64 else ("mma.sync", *MATRIX[architecture])


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack and of local memory per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([OBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", told.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {told.stdout}{told.stderr}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, local


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument("--only", default="", help="compile kernels whose name contains this")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED), help="default: all")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: then Triton compiles nothing")
    work = [
        (entry, architecture)
        for architecture in args.arch or sorted(SHARED)
        for entry in shipped.everything(architecture)
        if args.only in entry.kernel.__name__
    ]
    if not work:
        parser.error(f"no kernel's name contains {args.only!r}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda w: build(*w), work))
    report(found)
    if args.out:
        args.out.write_text(json.dumps({"triton": triton.__version__, "kernels": [asdict(f) for f in found]}, indent=1))
    return 1 if any(f.trouble for f in found) else 0


def report(found: list[Compiled]) -> None:
    """One line per kernel and architecture: the worst of its configurations."""
    print(f"Triton {triton.__version__}: {len(found)} compilations")
    print(f"{'kernel':<30}{'sm':>5}{'configs':>9}{'registers':>11}{'stack':>7}{'shared':>8}  matrix instructions")
    groups = Counter((f.kernel, f.architecture) for f in found)
    for (kernel, architecture), number in groups.items():
        own = [f for f in found if (f.kernel, f.architecture) == (kernel, architecture)]
        worst = [max(getattr(f, name) for f in own) for name in ("registers", "stack", "shared")]
        print(
            f"{kernel:<30}{architecture:>5}{number:>9}{worst[0]:>11}{worst[1]:>7}{worst[2]:>8}  "
            f"{sum(f.matrix for f in own) or '-'}"
        )
    for f in found:
        if f.trouble:
            print(f"WRONG {f.kernel} ({f.config}) on sm_{f.architecture} {f.trouble}")


if __name__ == "__main__":
    sys.exit(main())
