"""Runs every command of the README, so that none of them rots.

The commands are the lines of its ```sh and ```bash blocks: comments and a leading `$ ` are dropped, a backslash
continues a line. A ```python block that imports torch is a whole program and runs too; the others are excerpts. What is
skipped is listed below with its reason, and printed. Usage: python .ci/readme_commands.py [--list] [README.md]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 300

SKIP = {
    r"^git clone": "the clone is what this runs in",
    r"^cd ": "it runs in the clone",
    r"^make test\b": "CI has run it",
    r"^make (install|lint)\b": "CI has run it",
    r"^make clean\b": "would remove the environment under test",
    r"^make gpu\b(?!.*DRY=1)": "needs a GPU; CI runs it with DRY=1",
    r"pip install": "CI builds and installs the packages in a step of its own",
    r"\.\./shared/": "data beside the checkout, not in it",
    r"^(bash )?\.ci/run": "this is .ci/run",
}

QUICKER = [
    (r"^make demo\b(?!.*ARGS)", 'make demo ARGS="--quick"'),
    (r"^(\.venv/bin/)?racecar demo\b(?!.*(--quick|--help))", "racecar demo --quick"),
    (r"^(?:\.venv/bin/)?racecar run (?!.*(?:--quick|--help))(\S+).*", r"racecar run \1 --quick --overwrite"),
    (r"^make bench(?!-)(?!.*--quick).*", 'make bench ARGS="--quick --no-compile mnist mlp"'),
    (r"^make bench-ops\b.*", 'make bench-ops ARGS="-k MLP"'),
    (
        r"^(\.venv/bin/)?racecar bench\b(?!.*(--quick|--help|--list|--compare|--where)).*",
        "racecar bench --quick --no-compile mnist mlp",
    ),
]


def blocks(text: str, languages: tuple[str, ...]) -> list[str]:
    pattern = rf"^```(?:{'|'.join(languages)})[ \t]*\n(.*?)^```"
    return re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    found = []
    for block in blocks(text, ("sh", "bash")):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s+# .*$", "", re.sub(r"^\$ ", "", line.strip()))
            if command and not command.startswith("#"):
                found.append(command)
    return found


def reason_to_skip(command: str) -> str | None:
    return next((reason for pattern, reason in SKIP.items() if re.search(pattern, command)), None)


def quicker(command: str) -> str:
    for pattern, replacement in QUICKER:
        if re.search(pattern, command):
            return re.sub(pattern, replacement, command, count=1)
    return command


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": paths}


def run(title: str, argv: list[str]) -> bool:
    started = time.monotonic()
    try:
        done = subprocess.run(
            argv, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S
        )
        failure = f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}" if done.returncode else None
    except subprocess.TimeoutExpired:
        failure = f"still running after {LIMIT_S} s"
    print(f"{'FAILED ' if failure else 'ran    '} {title}  ({time.monotonic() - started:.0f} s)", flush=True)
    if failure:
        print(failure, file=sys.stderr)
    return failure is None


def main(arguments: list[str]) -> int:
    only_list = "--list" in arguments
    files = [a for a in arguments if not a.startswith("--")]
    text = (Path(files[0]) if files else ROOT / "README.md").read_text()
    good = True
    for command in commands(text):
        reason = reason_to_skip(command)
        if reason or only_list:
            print(f"{'skipped' if reason else 'found  '} {command}" + (f"  ({reason})" if reason else ""))
            continue
        quick = quicker(command)
        title = command if quick == command else f"{command}  as  {quick}"
        good = run(title, ["bash", "-c", quick]) and good
    with tempfile.TemporaryDirectory() as folder:
        for number, block in enumerate(blocks(text, ("python",)), 1):
            title = f"python block {number}: {block.strip().splitlines()[0]}"
            if only_list or "import torch" not in block:
                print(f"found   {title}" if only_list else f"skipped {title}  (an excerpt: it does not import torch)")
                continue
            script = Path(folder) / f"block{number}.py"
            script.write_text(block)
            good = run(title, [sys.executable, str(script)]) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
