"""Compiles every CUDA kernel of csrc/cuda for every architecture by nvcc, without a GPU, and reads back what came out.

    python -m bench.compile_cuda --out kernels.json

Fails where a kernel spills registers, keeps anything on a stack, has more registers than fit as often as its launch
bounds ask for, or more shared memory than a launch without asking gets. Exit status: 0 all is well, 1 a kernel is not,
2 a wrong option, 3 no nvcc.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from racecar_kernels import cuda_toolkit

SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
# Of a multiprocessor, and of the largest block: CUDA programming guide, the same on all targets.
REGISTERS, THREADS = 64 * 1024, 1024
MOST_OF_A_THREAD, REGISTERS_AT_ONCE = 255, 8  # a warp is given registers in eights for each thread
STATIC_SHARED = 48 * 1024
NO_COMPILER = 3


@dataclass
class Kernel:
    """What ptxas says of one kernel on one architecture, per thread but for `shared`."""

    kernel: str
    source: str
    architecture: int
    registers: int
    most_registers: int
    spilled: int  # bytes stored and loaded
    stack: int
    shared: int  # static, of a block
    trouble: str = ""


class Bounds(NamedTuple):
    """The launch bounds of a kernel."""

    threads: int = THREADS
    blocks: int = 1  # at a time on a multiprocessor

    @property
    def registers(self) -> int:
        """How many registers a thread may have for so many blocks to fit."""
        most = REGISTERS // (self.threads * self.blocks)
        return min(MOST_OF_A_THREAD, most // REGISTERS_AT_ONCE * REGISTERS_AT_ONCE)


def bounds_in(ptx: str) -> dict[str, Bounds]:
    """The launch bounds of every kernel of a PTX file, by its name; a kernel without any may be launched with 1024."""
    found = {}
    for name, directives in re.findall(r"\.entry\s+([\w$]+)\s*\(.*?\)([^{;]*)\{", ptx, flags=re.DOTALL):
        threads = re.search(r"\.(?:max|req)ntid\s+([\d, ]+)", directives)
        blocks = re.search(r"\.minnctapersm\s+(\d+)", directives)
        size = THREADS
        if threads:
            size = 1
            for side in threads[1].split(","):
                size *= int(side)
        found[name] = Bounds(size, int(blocks[1]) if blocks else 1)
    return found


def read_back(told: str, bounds: dict[str, Bounds], source: str) -> list[Kernel]:
    """What ptxas -v printed, kernel by kernel, with what is wrong with it.

    Raises:
        ValueError: a kernel of `bounds` of which nothing was said: another ptxas prints differently.
    """
    found = []
    for part in re.split(r"Compiling entry function ", told)[1:]:
        name, chip = re.match(r"'([^']+)' for 'sm_(\d+)[af]?'", part).groups()  # type: ignore[union-attr]
        # the properties of functions that were not inlined follow in the same part, each with a stack of its own
        stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        if not stacks or used is None:
            raise ValueError(f"ptxas says neither stack nor registers of {name}: {part[:300]}")
        shared = re.search(r"(\d+) bytes smem", part)
        kernel = Kernel(
            name, source, int(chip), int(used[1]), bounds[name].registers,
            sum(int(stores) + int(loads) for _, stores, loads in stacks), max(int(stack) for stack, _, _ in stacks),
            int(shared[1]) if shared else 0,
        )  # fmt: skip
        kernel.trouble = trouble_of(kernel, bounds[name])
        found.append(kernel)
    missing = bounds.keys() - {kernel.kernel for kernel in found}
    if missing:
        raise ValueError(f"ptxas says nothing of {', '.join(sorted(missing))}")
    return found


def trouble_of(kernel: Kernel, bounds: Bounds) -> str:
    if kernel.spilled:
        return f"spills {kernel.spilled} bytes a thread"
    if kernel.stack:
        return f"has a stack of {kernel.stack} bytes a thread: something is indexed that registers cannot hold"
    if kernel.registers > kernel.most_registers:
        times = f"{bounds.blocks} × {bounds.threads} threads"
        return f"has {kernel.registers} registers a thread, for {times} at most {kernel.most_registers} fit"
    if kernel.shared > STATIC_SHARED:
        return f"has {kernel.shared} bytes of static shared memory, a block gets {STATIC_SHARED}"
    return ""


def build(nvcc: Path, source: Path, chip: int) -> list[Kernel]:
    """Compiles one file for one architecture. Raises RuntimeError with nvcc's words where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        output, code = Path(folder) / "kernel.cubin", f"arch=compute_{chip},code=sm_{chip}"
        # PyTorch compiles with C++17 or C++20, by its version: what is valid in the older is in both
        command = [
            nvcc,
            "-cubin",
            "-O3",
            "-std=c++17",
            f"-gencode={code}",
            "-Xptxas",
            "-v",
            "--keep",
            "--keep-dir",
            folder,
        ]
        done = subprocess.run([*command, "-o", output, source], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{chip}:\n{done.stderr.strip()}")
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    return read_back(done.stdout + done.stderr, bounds_in(ptx), source.name)


def readable(names: list[str]) -> dict[str, str]:
    """Kernels by the names that the source has; as the compiler has them where nothing translates."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    told = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    # "void racecar::cuda::run<racecar::cuda::Fold<float, float, true> >(...)": what is run says it all
    short = [re.sub(r"\b(?:racecar|cuda)::", "", line) for line in told.splitlines()]
    short = [re.sub(r"^void run<(.*)>\(.*\)$", r"\1", line).strip() for line in short]
    return dict(zip(names, short, strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument("--only", default="", metavar="TEXT", help="compile files whose name contains TEXT")
    parser.add_argument("--arch", type=int, action="append", choices=cuda_toolkit.TARGETS, help="default: all")
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    sources = [path for path in sorted(SOURCES.glob("*.cu")) if args.only in path.name]
    if not sources:
        parser.error(f"no file of csrc/cuda has a name that contains {args.only!r}")
    try:
        nvcc = cuda_toolkit.find()
    except cuda_toolkit.ToolkitError as error:
        print(f"no CUDA kernel was compiled: {error}", file=sys.stderr)
        return NO_COMPILER if isinstance(error, cuda_toolkit.NoCompilerError) else 1
    chips = [chip for chip in args.arch or cuda_toolkit.TARGETS if chip in nvcc.known]
    start = time.perf_counter()
    try:
        found = compile_all(sources, chips, lambda source, chip: build(nvcc.path, source, chip))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    version = ".".join(map(str, nvcc.version))
    console.print(table(found, f"nvcc {version}: {len(found)} kernels in {time.perf_counter() - start:.0f} s"))
    for left_out in sorted(set(args.arch or cuda_toolkit.TARGETS) - set(chips)):
        console.print(f"nvcc {version} does not know sm_{left_out}: not compiled")
    for kernel in found:
        if kernel.trouble:
            console.print(f"WRONG {kernel.kernel} ({kernel.source}) on sm_{kernel.architecture} {kernel.trouble}")
    if args.out:
        args.out.write_text(json.dumps({"nvcc": version, "kernels": [asdict(kernel) for kernel in found]}, indent=1))
    return 1 if any(kernel.trouble for kernel in found) else 0


def compile_all(sources: list[Path], chips: list[int], one: Callable[[Path, int], list[Kernel]]) -> list[Kernel]:
    """Every file for every architecture, as many at a time as cores and memory allow."""
    work = [(source, chip) for source in sources for chip in chips]
    with ThreadPoolExecutor(cuda_toolkit.jobs()) as pool:
        found = [kernel for part in pool.map(lambda job: one(*job), work) for kernel in part]
    names = readable(sorted({kernel.kernel for kernel in found}))
    for kernel in found:
        kernel.kernel = names[kernel.kernel]
    return found


def table(found: list[Kernel], title: str) -> Table:
    """One row per kernel: the most of any architecture."""
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("kernel", overflow="fold")
    for column in ("sm", "registers", "at most", "spilled", "stack", "shared"):
        drawn.add_column(column, justify="right")
    for name in dict.fromkeys(kernel.kernel for kernel in found):
        own = [kernel for kernel in found if kernel.kernel == name]
        worst = [max(getattr(k, key) for k in own) for key in ("registers", "spilled", "stack", "shared")]
        worst.insert(1, min(kernel.most_registers for kernel in own))
        chips = " ".join(str(kernel.architecture) for kernel in own)
        drawn.add_row(name, chips, *map(str, worst), style="red" if any(k.trouble for k in own) else None)
    return drawn


if __name__ == "__main__":
    sys.exit(main())
