# SPDX-License-Identifier: Apache-2.0
"""Records how near programs come to the dense weights with what we write for them, and makes the table of docs/consumers.md of it.

``python -m tests.loaders.record_acting [PROGRAM ...]`` runs the programs whose environments are named and writes ``acted.json`` and
the page; with ``--check`` it writes nothing, and ends with exit code 1 where something is off by more than a program's precision.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.loaders.acting import run
from tests.loaders.judging import command_of
from tests.loaders.programs import PROGRAMS

__all__ = ["observe", "read", "section", "wrong"]

_RECORDED = Path(__file__).with_name("acted.json")
_HEAD = """
## What we write, acting

Made by `python -m tests.loaders.record_acting`; do not edit. Each program is given what `surgery convert` writes in its format,
and a base into which `surgery merge` merged that, in the layout that the program has for bases. Beside them it runs the base,
and the dense weights `W + dW`, which PEFT or a program's own modules made, not we. An error is the greatest difference of its
output (logits; of a denoiser what it predicts) from that of the dense weights, as a share of the greatest difference between the
outputs of dense weights and base: 1 is an adapter that does nothing, 1e-6 is float32. A nightly test holds each to {precision:.0e}.

"""


def read() -> dict[str, Any]:
    """What is recorded, by program."""
    recorded: dict[str, Any] = json.loads(_RECORDED.read_text()) if _RECORDED.exists() else {}
    return recorded


def observe(consumer: str, folder: Path) -> dict[str, Any]:
    """Errors of all that the program is given: of what was written, and of what was merged."""
    acted, versions = run(consumer, PROGRAMS[consumer].trials(folder / "made"), folder / "out")
    acts = {name: {"written": _rounded(one.written), "merged": _rounded(one.merged)} for name, one in acted.items()}
    return {"versions": versions, "date": datetime.now(UTC).date().isoformat(), "acts": acts}


def _rounded(error: float | None) -> float | None:
    return None if error is None else float(f"{error:.1e}")


def wrong(consumer: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What is off by more than the program's precision."""
    limit = PROGRAMS[consumer].precision

    def near(act: Mapping[str, float | None]) -> bool:
        return all(error <= limit for key in ("written", "merged") if (error := act[key]) is not None)

    return {name: act for name, act in found["acts"].items() if not near(act)}


def _greatest(errors: Iterator[float | None]) -> str:
    found = [error for error in errors if error is not None]
    return f"{max(found):.0e}" if found else "—"


def _rows(recorded: Mapping[str, Any]) -> Iterator[str]:
    yield "| program | version | on | written as | what was written | greatest error | merged |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for consumer, one in recorded.items():
        program, acts = PROGRAMS[consumer], one["acts"]
        version = next(iter(one["versions"].values()))
        errors = [_greatest(act[key] for act in acts.values()) for key in ("written", "merged")]
        cells = [program.title, version, one["date"], program.written, f"{len(acts)}: {', '.join(acts)}", *errors]
        yield "| " + " | ".join(cells) + " |"


def section(recorded: Mapping[str, Any]) -> str:
    """Its part of docs/consumers.md."""
    precision = max(program.precision for program in PROGRAMS.values())
    return _HEAD.format(precision=precision) + "\n".join(_rows(recorded)) + "\n"


def main(arguments: list[str]) -> int:
    """See above."""
    from tests.loaders import record  # which puts this section on its page

    recorded, found, bad = read(), {}, []
    if "--page" not in arguments:
        asked = [one for one in arguments if not one.startswith("-")] or [one for one in PROGRAMS if command_of(one)]
        for consumer in asked:
            with tempfile.TemporaryDirectory() as scratch:
                found[consumer] = observe(consumer, Path(scratch))
            off = wrong(consumer, found[consumer])
            print(f"{consumer}: {len(found[consumer]['acts'])} acts, {len(off)} off", flush=True)
            bad += [f"{consumer}: {name}: {one}" for name, one in off.items()]
        print("\n".join(bad))
        if "--check" in arguments:
            return bool(bad)
        recorded = {name: (recorded | found)[name] for name in PROGRAMS if name in recorded | found}
        _RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    record.PAGE.write_text(record.page(record.read()))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
