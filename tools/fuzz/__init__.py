# SPDX-License-Identifier: Apache-2.0
"""Damaged files and texts for every reader and parser: each is read, or refused with a `SurgeryError`, and nothing else happens.

    python -m tools.fuzz --executions 1000000 --workers 16 --seed 0
    python -m tools.fuzz --only 31337 --seed 0 --keep DIR    # one of them again, its files kept
    python -m tools.fuzz --guided peer:safetensors --executions 100000    # by coverage, with atheris

An execution damages a seed of a `Target` (`mutations`), and does with it what commands do. It must end within `limits.SECONDS` and
`limits.MEMORY`, write nothing, start no process and open no connection. Which files it gets depends on the seed and its number alone.
Needs no more than numpy, ml_dtypes, regex, onnx, safetensors and click; targets that need more are left out where it is missing, and said
so. Files lie in memory (/dev/shm) where there is such a place.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [place for part in ("", "formats", "cli") if (place := str(ROOT / part)) not in sys.path]

from . import stand_ins as stand_ins  # noqa: E402
