# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several files of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import json_documents

# A deadline measures how busy the machine is: an example that was put off for 200 ms failed a run.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

json_documents.watch()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not looked at."""
    if json_documents.UNSEEN:
        terminalreporter.write_line(json_documents.UNSEEN, yellow=True)


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny base and its full fine-tune."""
    from tests.oracles import models
    from tests.support.extractions import everything, tune  # they import PEFT, which most tests do without

    base = models.build_base("llama", tmp_path / "base")
    return base, tune(base, tmp_path / "tuned", everything)
