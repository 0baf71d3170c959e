# SPDX-License-Identifier: Apache-2.0
"""How long a person waits for small work: every command on the shipped example, as a whole process, and what it imports.

    python benchmarks/startup.py [--against OTHER] [--rounds 9] [--cold 3] [--commands merge,convert]

Runs of this checkout and of OTHER take turns; medians are shown. Bytecode of all modules is there, as after an installation. ``cold``: the
files that the command reads and maps are dropped from the page cache first, as far as nobody else maps them, which is what the first run
after a while is like. The last columns tell which of a few large packages a run imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from measure import ROOT, add_against, environment, median, trees, versions

EXAMPLES = ROOT / "examples"
BASE, TUNED, LORA, PROMPT = (str(EXAMPLES / name) for name in ("base", "tuned", "lora", "prompt"))
OUT = "{out}"

COMMANDS: Mapping[str, Sequence[str]] = {
    "--help": ["--help"],
    "merge --help": ["merge", "--help"],
    "formats": ["formats"],
    "env": ["env"],
    "inspect a model": ["inspect", BASE],
    "inspect an adapter": ["inspect", LORA],
    "report": ["report", LORA, "--base", BASE],
    "diff of models": ["diff", BASE, TUNED],
    "diff of adapters": ["diff", LORA, LORA],
    "convert --to mlx": ["convert", LORA, "--to", "mlx", "-o", OUT],
    "combine": ["combine", f"{LORA}=0.5", f"{LORA}=0.25", "-o", OUT],
    "resize": ["resize", LORA, "--rank", "4", "-o", OUT],
    "merge": ["merge", BASE, LORA, "-o", OUT],
    "extract-lora": ["extract-lora", BASE, TUNED, "--rank", "4", "-o", OUT],
    "export-onnx": ["export-onnx", BASE, "-o", OUT],
    "export-onnx with slots": ["export-onnx", BASE, "--swap", LORA, "-o", OUT],
    "export-onnx with a prompt": ["export-onnx", BASE, "--prefix", PROMPT, "-o", OUT],
}

LARGE = ("torch", "numpy", "onnx", "onnxruntime", "click", "rich")

PROBE = """
import json, sys
from surgery_cli.group import surgery
try:
    surgery.main(sys.argv[2:], prog_name="surgery")
finally:
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    with open("/proc/self/maps") as maps:
        files |= {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
    with open(sys.argv[1], "w") as out:
        json.dump([sorted(sys.modules), sorted(filter(None, files))], out)
"""


@dataclass
class Contender:
    """One checkout's runs of one command."""

    tree: Path
    environment: dict[str, str]
    warm: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    imports: str = ""
    files: list[Path] = field(default_factory=list)


def run(words: Sequence[str], contender: Contender) -> tuple[float, float]:
    """Wall and processor seconds of a process of this interpreter; a folder that it made is removed."""
    out = Path(contender.environment["OUT"])
    command = [sys.executable, "-P", *(str(out) if word == OUT else word for word in words)]
    began = time.perf_counter()
    child = subprocess.Popen(
        command, env=contender.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=out.parent
    )
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)} left with {child.returncode} on {contender.tree}")
    shutil.rmtree(out, ignore_errors=True)
    return wall, usage.ru_utime + usage.ru_stime


def probe(words: Sequence[str], contender: Contender) -> None:
    """Find out what the command imports; this also writes its bytecode."""
    found = Path(contender.environment["OUT"]).parent / "imported.json"
    run(["-c", PROBE, str(found), *words], contender)
    modules, files = json.loads(found.read_text())
    contender.imports = ", ".join(name for name in LARGE if name in modules)
    bytecode = Path(contender.environment["PYTHONPYCACHEPREFIX"]).rglob("*.pyc")
    contender.files = [Path(file) for file in files if os.path.isfile(file)] + list(bytecode)


def forget(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure(name: str, words: Sequence[str], contenders: Sequence[Contender], rounds: int, cold: int) -> str:
    """The line of the table for one command."""
    process = ["-m", "surgery_cli", *words]
    for contender in contenders:
        probe(words, contender)
        run(process, contender)
    for number in range(rounds):
        for contender in contenders[:: -1 if number % 2 else 1]:
            wall, cpu = run(process, contender)
            contender.warm.append(wall)
            contender.cpu.append(cpu)
    for _ in range(cold):
        for contender in contenders:
            forget(contender.files)
            contender.cold.append(run(process, contender)[0])
    columns = [name]
    for kind in ("warm", "cpu", "cold"):
        values = [median(getattr(contender, kind)) for contender in contenders if getattr(contender, kind)]
        columns += [f"{value:.3f}" for value in values]
        columns += [f"{values[0] / values[1]:.2f}x"] if len(values) == 2 else []
    return "| " + " | ".join([*columns, *(contender.imports or "none" for contender in contenders)]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_against(parser)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cold", type=int, default=3, help="runs whose files are dropped from the page cache first")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="some of those in the table")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="surgery-bench-"))
    sides = trees(options)
    print(versions("torch", "numpy", "onnx", "click", "rich"))
    head = ["command"]
    for kind in ("warm, s", "processor, s", *(["cold, s"] if options.cold else [])):
        head += [f"{kind}{side}" for side in sides] + (["ratio"] if len(sides) == 2 else [])
    head += [f"imports{side}" for side in sides]
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    try:
        for name in options.commands.split(","):
            contenders = []
            for number, tree in enumerate(sides.values()):
                place = work / str(number)
                place.mkdir(exist_ok=True)
                own = {"PYTHONPYCACHEPREFIX": str(place / "bytecode"), "OUT": str(place / "out")}
                kept = {k: v for k, v in environment(tree).items() if k != "PYTHONDONTWRITEBYTECODE"}
                contenders.append(Contender(tree, kept | own))
            print(measure(name, COMMANDS[name], contenders, options.rounds, options.cold), flush=True)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
