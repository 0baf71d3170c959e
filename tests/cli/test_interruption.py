# SPDX-License-Identifier: Apache-2.0
"""A signal is heard at any moment, and answered where an exception is not lost and leaves nothing half done."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.crash_inputs import write_inputs
from tests.support.kit import environment

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="without timers it is answered at once")

LISTENING = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from surgery_cli import interruption
interruption.listen()
"""
MODULE = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
whole = [number for number in range(1000)]
print("imported", flush=True)
"""
IN_AN_IMPORT = """
sys.path.insert(0, sys.argv[1])
try:
    import interrupted_while_imported
    time.sleep(60)
except KeyboardInterrupt:
    print("answered", "interrupted_while_imported" in sys.modules)
"""
IN_A_FINALISER = """
class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        print("finalised", flush=True)
try:
    last = Last()
    del last
    time.sleep(60)
except KeyboardInterrupt:
    print("answered")
"""
IN_A_WHOLE = """
from surgery_formats.whole import whole
@whole
def all_of_it():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    print("all of it", flush=True)
try:
    all_of_it()
    time.sleep(60)
except KeyboardInterrupt:
    print("answered", interruption.exit_code())
"""

IN_WHAT_UNDOES_ITSELF = """
from surgery_formats.whole import interruptible, whole
@interruptible
def long():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    finally:
        print("undone", flush=True)
@whole
def all_of_it():
    long()
try:
    all_of_it()
except KeyboardInterrupt:
    print("answered", interruption.exit_code())
"""


def _told(script: str, *words: str) -> tuple[str, str]:
    command = [sys.executable, "-c", LISTENING + script, *words]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=True)
    return ran.stdout, ran.stderr


def test_an_import_is_finished_first(tmp_path: Path) -> None:
    (tmp_path / "interrupted_while_imported.py").write_text(MODULE)
    assert _told(IN_AN_IMPORT, str(tmp_path)) == ("imported\nanswered True\n", "")


def test_so_is_a_finaliser_where_exceptions_are_lost() -> None:
    assert _told(IN_A_FINALISER) == ("finalised\nanswered\n", "")


def test_so_is_a_function_that_must_not_be_left_halfway() -> None:
    assert _told(IN_A_WHOLE) == ("all of it\nanswered 143\n", "")


def test_a_long_part_of_it_that_undoes_itself_is_left() -> None:
    assert _told(IN_WHAT_UNDOES_ITSELF) == ("undone\nanswered 143\n", "")


STARTED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from surgery_cli.__main__ import main
print("started", flush=True)
main()
"""


def _interrupted(
    words: list[str], number: int, after: float | None, folder: Path | None = None
) -> tuple[int, str, float]:
    """A command that gets a signal some seconds after its first line of code; its exit code, its words, and its own seconds."""
    command = [sys.executable, "-c", STARTED, "-q", *words]
    with subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=folder,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        began = time.monotonic()
        if after is not None:
            time.sleep(after)
            process.send_signal(number)
        told = process.stderr.read()
        code = process.wait(300)
    return code, told, time.monotonic() - began


@pytest.mark.parametrize("times", [3, pytest.param(200, marks=pytest.mark.slow)], ids=["a few moments", "many moments"])
def test_at_any_moment_a_signal_leaves_all_or_nothing(base, lora, tmp_path: Path, times: int) -> None:
    """From the first line of the command to its last, imports included."""
    work = tmp_path / "work"
    work.mkdir()
    out = work / "out"
    words = ["merge", str(base), str(lora), "-o", str(out)]
    code, told, seconds = _interrupted(words, signal.SIGINT, None)
    assert (code, told) == (0, "")
    draw = random.Random(times)
    for turn in range(times):
        if out.exists():
            out.rename(tmp_path / f"{turn}")
        number = draw.choice([signal.SIGINT, signal.SIGTERM])
        code, told, _ = _interrupted(words, number, draw.random() * seconds)
        left = [path.name for path in work.iterdir()]
        if code == 0:
            assert (told, left) == ("", ["out"])
        else:
            assert (code, told) == (128 + number, "error: interrupted\n")
            assert left in ([], ["out"])


COMMANDS = {
    "extract-lora": ("extract-lora in/base in/tuned --rank 2 -o work/out", "out"),
    "export-onnx": ("export-onnx in/base in/lora -o work/out", "out"),
    "combine": ("combine in/lora=0.5 in/other -o work/out", "out"),
    "insert": ("insert in/base in/lora in/other --unmerged -o work/out", "out"),
    "prompt bake": ("prompt bake in/prompt in/base -o work/out", "out"),
    "apply": ("apply recipe.yaml", "out"),
    "eval": ("eval in/base --adapter in/lora --text text.txt --csv work/out.csv", "out.csv"),
    "diff": ("diff in/base in/tuned --html work/out.html", "out.html"),
}
"""What is run, and the name of what it writes into ``work``."""
RECIPE = """\
steps:
  - {verb: convert, adapter: in/lora, to: mlx, as: small}
  - {verb: merge, base: in/base, adapters: small, output: work/out}
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_any_command_is_left_at_any_moment(name: str, tmp_path: Path) -> None:
    write_inputs(tmp_path / "in")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("a b c " * 40)
    line, output = COMMANDS[name]
    out = tmp_path / "work" / output
    out.parent.mkdir()
    code, usual, seconds = _interrupted(line.split(), signal.SIGINT, None, tmp_path)
    assert code == 0, usual
    draw = random.Random(name)
    stopped = 0
    for turn in range(40):
        if out.exists():
            out.rename(tmp_path / f"{turn}")
        number = draw.choice([signal.SIGINT, signal.SIGTERM])
        code, told, _ = _interrupted(line.split(), number, draw.random() * seconds, tmp_path)
        left = [path.name for path in out.parent.iterdir()]
        if code == 0:
            assert (told, left) == (usual, [output])
        else:
            stopped += 1
            assert (code, told) == (128 + number, "error: interrupted\n")
            assert left in ([], [output])
    assert stopped
