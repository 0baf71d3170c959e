# SPDX-License-Identifier: Apache-2.0
r"""Measure the tables of docs/deploying.md: the same folders in every program that people run graphs with.

Each program has an environment of its own; one that is not named keeps its rows::

    python tools/deploy_page.py --onnxruntime PYTHON [--onnxruntime "env PYTHONPATH=old PYTHON" ...] \
        --genai PYTHON --optimum PYTHON --sentence-transformers PYTHON --node FOLDER_WITH_NODE_MODULES
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "formats"), str(ROOT / "cli")]

import numpy as np

import surgery
from tests.support.deployed import IDS, NEW, PAD, PAIRS, PROMPT, ROWS, TEXT_NEW, TEXTS, TRAINED, make_models

PAGE = ROOT / "docs" / "deploying.md"
PEERS = ROOT / "tools" / "deploy"
TOLERANCE = 1e-4
KINDS = {
    "generate": "decoder",
    "batch": "decoder in batches",
    "text": "decoder, text",
    "coded": "int4 decoder, text",
    "embed": "sentence encoder",
    "classify": "classifier",
    "seq2seq": "encoder-decoder",
}
PROGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {  # the layout of its own, and what it runs
    "onnxruntime": ("plain", ("generate", "batch", "embed", "classify")),
    "genai": ("genai", ("generate", "batch", "text", "coded")),
    "optimum": ("optimum", ("generate", "batch", "text", "coded", "embed", "classify", "seq2seq")),
    "sentence-transformers": ("sentence-transformers", ("embed", "classify")),
    "transformers.js": ("transformers.js", ("generate", "batch", "text", "coded", "embed", "classify", "seq2seq")),
}
LEAST = {  # columns of the table of least versions: options of an export of decoder and encoder
    "decoder, `cpu`": ("decoder", {}),
    "decoder, `portable`": ("decoder", {"target": "portable"}),
    "decoder, `portable --opset 17`": ("decoder", {"target": "portable", "opset": 17}),
    "encoder": ("encoder", {}),
    "encoder, `--opset 17`": ("encoder", {"opset": 17}),
}


def exported(work: Path, kind: str, layout: str, **options: Any) -> Path:
    """The folder of an export, made once."""
    name = "-".join([kind, layout, *(f"{key}{value}" for key, value in options.items())])
    if not (work / "out" / name).exists():
        (work / "out").mkdir(exist_ok=True)
        decoders = dict.fromkeys(("generate", "batch", "decoder"), "decoder")
        base = {**decoders, "encoder": "embed", "text": TRAINED, "coded": TRAINED}.get(kind, kind)
        adapters = [work / "lora"] if base == "decoder" else []
        if kind == "coded":
            options |= {"weights_type": "int4"}
        surgery.export_onnx(work / base, adapters, output=work / "out" / name, layout=layout, **options)
    return work / "out" / name


def asked(command: str, work: Path, program: str, kind: str, folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a program answers."""
    told = {"ids": IDS, "rows": ROWS, "new": NEW, "pad": PAD, "texts": TEXTS, "pairs": PAIRS}
    told |= {"prompt": PROMPT, "text_new": TEXT_NEW, **facts}
    (work / "wanted.json").write_text(json.dumps(told))
    if program == "transformers.js":
        script = Path(command) / "peer.mjs"
        script.write_text((PEERS / "peer.mjs").read_text())
        words = ["node", str(script), kind, str(folder), str(work / "wanted.json")]
    else:
        words = [*shlex.split(command), str(PEERS / "peer.py"), program, kind, str(folder), str(work / "wanted.json")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=work, check=False)
    last = done.stdout.strip().splitlines()[-1:] or [""]
    try:
        answer: dict[str, Any] = json.loads(last[0])
    except ValueError:
        answer = {"error": done.stderr.strip()[-300:] or "no answer"}
    return answer


def judged(answer: Mapping[str, Any], wanted: Sequence[Any]) -> str:
    """``yes``, the difference, or what the program says."""
    if "error" in answer:
        print(answer["error"])
        return "refused"
    found = answer["result"]
    if found and not isinstance(np.ravel(np.array(found, dtype=object))[0], float):
        return "equal" if found == wanted else "**differs**"
    difference = float(np.abs(np.array(found) - np.array(wanted)).max()) if len(found) == len(wanted) else np.inf
    return f"{difference:.0e}" if difference < TOLERANCE else f"**{difference:.1g}**"


def row(work: Path, program: str, command: str, wanted: Mapping[str, Any]) -> str:
    """The line of a program."""
    own, kinds = PROGRAMS[program]
    version, cells = "", []
    for kind in KINDS:
        if kind not in kinds:
            cells.append("")
            continue
        target = {"target": "portable"} if kind == "batch" and program != "genai" else {}
        results = []
        for layout in dict.fromkeys((own, "plain")):
            counted = kind in ("generate", "batch") and not target
            answer = asked(
                command,
                work,
                program,
                kind,
                exported(work, kind, layout, **target),
                {"layout": layout, "counted": counted},
            )
            version = answer.get("version", version)
            key = f"{kind} text" if program == "sentence-transformers" else kind
            results.append(judged(answer, wanted[key]))
        cells.append(results[0] if len(set(results)) == 1 else " / ".join(results))
        print(program, version, kind, cells[-1], flush=True)
    return f"| {program} {version} | {' | '.join(cells)} |"


def least_rows(work: Path, commands: Sequence[str], wanted: Mapping[str, Any]) -> list[str]:
    """The lines of versions of onnxruntime."""
    lines = []
    for command in commands:
        cells, version = [], ""
        for kind, options in LEAST.values():
            asked_kind = "generate" if kind == "decoder" else "embed"
            facts = {"layout": "plain", "counted": kind == "decoder" and "target" not in options}
            answer = asked(command, work, "onnxruntime", asked_kind, exported(work, kind, "plain", **options), facts)
            version = answer.get("version", version)
            cells.append(judged(answer, wanted[asked_kind]))
        print("onnxruntime", version, cells, flush=True)
        lines.append(f"| {version or command} | {' | '.join(cells)} |")
    return lines


def replaced(page: str, name: str, head: str, lines: Sequence[str]) -> str:
    """The page with another table between its marks; rows of programs that were not asked stay."""
    pattern = re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
    found = pattern.search(page)
    assert found is not None
    known = {line.split(" ")[1]: line for line in found[2].splitlines()[2:]}
    table = [head, re.sub(r"[^|]+", " --- ", head), *{**known, **{line.split(" ")[1]: line for line in lines}}.values()]
    return pattern.sub(lambda match: match[1] + "\n".join(table) + "\n" + match[3], page)


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--onnxruntime", action="append", default=[])
    for name in ("genai", "optimum", "sentence-transformers", "node"):
        parser.add_argument(f"--{name}")
    given = vars(parser.parse_args())
    commands = {name: given.get(name.replace("-", "_")) for name in PROGRAMS if name != "onnxruntime"}
    commands = {"onnxruntime": next(reversed(given["onnxruntime"]), None), **commands, "transformers.js": given["node"]}
    with tempfile.TemporaryDirectory(prefix="surgery-deploy-") as place:
        work = Path(place)
        wanted = make_models(work)
        coded = surgery.run(exported(work, "coded", "plain"), PROMPT, max_new=TEXT_NEW)  # no other program is its truth
        wanted["coded"] = coded.texts[0].text
        lines = [row(work, name, command, wanted) for name, command in commands.items() if command]
        least = least_rows(work, given["onnxruntime"], wanted)
    page = PAGE.read_text(encoding="utf-8")
    page = replaced(page, "programs", f"| program | {' | '.join(KINDS.values())} |", lines)
    page = replaced(page, "least", f"| onnxruntime | {' | '.join(LEAST)} |", least)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
