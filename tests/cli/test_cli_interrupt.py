# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, a closed terminal and a polite kill all end the same way: 128 and the signal's number, nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.support.kit import environment

# A merge that waits at its first step, which says that it has begun, until it is interrupted, or for some seconds.
SLOW = """
import contextlib, sys, time
from surgery_cli import interruption
from surgery_cli.commands import merge

waited = []

@contextlib.contextmanager
def slow(settings, what):
    def step(progress):
        if not waited:
            waited.append(step)
            print("begun", flush=True)
            end = time.monotonic() + 60
            while time.monotonic() < end and not interruption.asked():
                time.sleep(0.01)
        interruption.check()
    yield step

merge.bar = slow
from surgery_cli.__main__ import main
main()
"""

# As from a terminal, whatever the tests themselves were started by: a process of `nohup` or of a shell's background ignores signals.
HEARING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_in_the_middle_of_a_merge(base, lora, tmp_path, number):
    before = sorted(path.name for path in tmp_path.iterdir())
    command = [sys.executable, "-c", HEARING + SLOW, "merge", str(base), str(lora), "-o", str(tmp_path / "out")]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        told = process.stderr.read()
        assert process.wait(300) == 128 + number
    assert told == "error: interrupted\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_under_nohup_a_closed_terminal_is_ignored(base, lora, tmp_path):
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SLOW.replace("+ 60", "+ 0.2")
    command = [sys.executable, "-c", script, "merge", str(base), str(lora), "-o", str(tmp_path / "out"), "-q"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGHUP)
        process.stdout.read()
        assert process.wait(300) == 0
    assert (tmp_path / "out/model.safetensors").exists()
