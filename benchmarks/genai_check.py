# SPDX-License-Identifier: Apache-2.0
"""Exported folders in onnxruntime-genai: its greedy tokens against PEFT's, for adapters merged, swapped and in front.

    python benchmarks/genai_check.py --python PYTHON

PYTHON is that of an environment with onnxruntime-genai (0.18 was measured); models and adapters are tiny and random, made here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from surgery.verbs.export_onnx import export_onnx
from tests.oracles import recipes
from tests.support import trained

IDS = [5, 17, 3, 88, 42, 9, 61]
STEPS = 10
PEER = """
import json, sys
import onnxruntime_genai as og
job = json.load(sys.stdin)
model = og.Model(job["folder"])
def tokens(ids, adapter):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + job["steps"], do_sample=False)
    generator = og.Generator(model, params)
    if adapter:
        adapters = og.Adapters(model)
        adapters.load(adapter, "one")
        generator.set_active_adapter(adapters, "one")
    generator.append_tokens(ids)
    for _ in range(job["steps"]):
        if generator.is_done():
            break
        generator.generate_next_token()
    return [int(one) for one in generator.get_sequence(0)][len(ids):]
print(json.dumps([tokens(ids, adapter) for ids, adapter in job["runs"]]))
"""


def peer(python: str, folder: Path, runs: list[tuple[list[int], str]]) -> list[list[int]]:
    """Tokens that onnxruntime-genai generates for each ``(ids, adapter file or empty)``."""
    job = json.dumps({"folder": str(folder), "steps": STEPS, "runs": runs})
    done = subprocess.run([python, "-c", PEER], input=job, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folder.name}: {done.stderr.strip()[-600:]}")
    found: list[list[int]] = json.loads(done.stdout)
    return found


def main() -> int:
    """0 if every token is PEFT's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of an environment with onnxruntime-genai")
    parser.add_argument("--target", default="cpu", choices=["cpu", "portable"])
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = recipes.build("llama", folder / "base", hidden_size=64)
        for name, out, runs, models in cases(base, folder, options.target):
            expected = [trained.generated(model, np.array([IDS]), STEPS) for model in models]
            for found, wanted in zip(peer(options.python, out, runs), expected, strict=True):
                same = found == wanted
                wrong += not same
                print(f"{'equal' if same else 'WRONG'}  {name}  {found}" + ("" if same else f"  PEFT {wanted}"))
    return 1 if wrong else 0


def cases(base: Path, folder: Path, target: str) -> Any:
    """``(name, exported folder, runs, the models they must equal)``."""
    for name, config in trained.MERGED.items():
        adapter = trained.train("llama", base, config, folder / name)
        out = folder / f"{name} out"
        export_onnx(base, [adapter], output=out, target=target)
        yield f"merged: {name}", out, [(IDS, "")], [trained.attached("llama", base, (adapter, 1.0))]
    pair = [folder / "lora all-linear", folder / "rslora"]
    out = folder / "swapped"
    export_onnx(base, swap=pair, output=out, target=target)
    files = [f"{out}/adapters/{path.name.replace(' ', '_')}.onnx_adapter" for path in pair]
    models = [recipes.load("llama", base), *(trained.attached("llama", base, (path, 1.0)) for path in pair)]
    yield "swapped: none, each", out, [(IDS, one) for one in ("", *files)], models
    ahead = list(range(recipes.VOCAB, recipes.VOCAB + trained.TOKENS))
    for kind in ("prompt", "p-tuning"):
        adapter = trained.train("llama", base, trained.PROMPTS[kind], folder / kind)
        model = trained.attached("llama", base, (adapter, 1.0))
        for form in ("kv", "rows"):  # beside keys and values the folder holds rows.onnx for it
            out = folder / f"{kind} {form}"
            export_onnx(base, [adapter], output=out, target=target, prompt_form=form)
            yield f"in front: {kind}, exported as {form}", out, [(ahead + IDS, "")], [model]


if __name__ == "__main__":
    sys.exit(main())
