# SPDX-License-Identifier: Apache-2.0
"""Records what programs did with every adapter here, as it is and after ``--fix``, and makes the table of docs/consumers.md of it.

``python -m tests.loaders.record [CONSUMER ...]`` runs the loaders whose environments are named (see `judging.LOADERS`) and
writes ``recorded.json`` and the page; with ``--check`` it ends with exit code 1 where a program did something else; with
``--page`` it only makes the page.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.loaders.adapters import ADAPTERS
from tests.loaders.judging import LOADERS, MAX_RANK, Made, command_of, fix, load, make
from tests.loaders.record_acting import read as acted
from tests.loaders.record_acting import section

__all__ = ["PAGE", "RECORDED", "page", "read"]

RECORDED = Path(__file__).with_name("recorded.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "consumers.md"
_TITLES = {
    "peft": "PEFT",
    "transformers": "transformers",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llama.cpp": "llama.cpp",
    "mlx-lm": "mlx-lm",
    "olive": "Olive",
}
_HEAD = """\
# What programs really did

Made by `python -m tests.loaders.record`; do not edit. {adapters} small adapters were given to the loaders of {programs} programs, each run
in its own environment by its own code: the managers of vLLM and SGLang on their own models (kernels are stood in for: what
lies in their slots is read), llama.cpp's converter and runtime, mlx-lm, Olive's converter and onnxruntime, PEFT and
transformers.

*Right* is what gives the logits of the model that was trained, to 1% of the change; *wrong* was loaded and gives others;
*refused* was not loaded. After the arrow: what the program did with what `surgery check --fix` wrote for it (with
`--rank 64 --saved lora` where it takes consent; vLLM is then started with `--max-lora-rank 64`). A dash is where `--fix`
refused: what is left can only be merged into the base (`--merge-rest`) or left out.

A test holds [`check`](check.md) to every cell. `layer-replication`, `activated`, `rank-contradicts` and `factor-missing`
are refused as they are read, for every program.

"""


def read() -> dict[str, Any]:
    """What is recorded, by consumer."""
    recorded: dict[str, Any] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    return recorded


def observe(consumer: str, made: Mapping[str, Made], folder: Path) -> dict[str, Any]:
    """What ``consumer`` did with each adapter, and with what was written for it."""
    did, versions = load(consumer, made, folder / "plain")
    refusals, fixed = {}, {}
    for name, one in made.items():
        if did[name].outcome == "right":
            continue
        output = folder / "written" / name
        output.parent.mkdir(exist_ok=True)
        if why := fix(consumer, one, output):
            refusals[name] = why
        else:
            fixed[name] = replace(one, adapter=output)
    after = load(consumer, fixed, folder / "fixed", MAX_RANK)[0] if fixed else {}
    adapters = {}
    for name, done in did.items():
        adapters[name] = {"did": done.outcome}
        if done.said:
            adapters[name]["said"] = done.said
        if name in after:
            adapters[name]["fixed"] = after[name].outcome
            if after[name].said:
                adapters[name]["fixed_said"] = after[name].said
        elif name in refusals:
            adapters[name]["unfixed"] = refusals[name][:300]
    return {"versions": versions, "adapters": adapters}


def _cell(entry: Mapping[str, str] | None) -> str:
    if entry is None:
        return ""
    if entry["did"] == "right":
        return "right"
    return f"{entry['did']} → {entry.get('fixed', '—')}"


def _rows(recorded: Mapping[str, Any]) -> Iterator[str]:
    programs = [name for name in LOADERS if name in recorded]
    yield "| adapter | " + " | ".join(_TITLES[name] for name in programs) + " |"
    yield "| --- |" + " --- |" * len(programs)
    yield "| *version* | " + " | ".join(next(iter(recorded[name]["versions"].values())) for name in programs) + " |"
    for adapter in ADAPTERS:
        cells = (_cell(recorded[name]["adapters"].get(adapter)) for name in programs)
        yield f"| `{adapter}` | " + " | ".join(cells) + " |"


def page(recorded: Mapping[str, Any]) -> str:
    """docs/consumers.md."""
    head = _HEAD.format(adapters=len(ADAPTERS), programs=len(recorded))
    tail = "\nThe adapters are made by [`tests/loaders/adapters.py`](../tests/loaders/adapters.py).\n"
    return head + "\n".join(_rows(recorded)) + "\n" + tail + section(acted())


def write(recorded: Mapping[str, Any]) -> None:
    """Keep what was seen, consumers in their order."""
    ordered = {name: recorded[name] for name in LOADERS if name in recorded}
    RECORDED.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def main(arguments: list[str]) -> int:
    """See above."""
    recorded = read()
    if "--page" not in arguments:
        asked = [one for one in arguments if not one.startswith("-")] or [one for one in LOADERS if command_of(one)]
        with tempfile.TemporaryDirectory() as scratch:
            made = make(Path(scratch) / "made")
            found = {}
            for consumer in asked:
                found[consumer] = observe(consumer, made, Path(scratch) / consumer)
                print(f"{consumer}: {len(found[consumer]['adapters'])} adapters", flush=True)
                if "--check" not in arguments:
                    write(recorded | found)
        if "--check" in arguments:
            other = [
                f"{consumer}: {name}: {entry} was {recorded.get(consumer, {}).get('adapters', {}).get(name)}"
                for consumer, one in found.items()
                for name, entry in one["adapters"].items()
                if entry["did"] != recorded.get(consumer, {}).get("adapters", {}).get(name, {}).get("did")
                or entry.get("fixed") != recorded[consumer]["adapters"][name].get("fixed")
            ]
            print("\n".join(other))
            return bool(other)
        recorded |= found
    PAGE.write_text(page(recorded))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
