# SPDX-License-Identifier: Apache-2.0
"""The program in docs/deploying.md, in onnxruntime-node, gives the tokens of `surgery.run`.

SURGERY_ONNXRUNTIME_NODE names a folder with node_modules: ``npm install onnxruntime-node``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import surgery

pytestmark = pytest.mark.nightly
ROOT = Path(__file__).resolve().parents[2]


def test_the_loop_in_javascript_gives_the_tokens_of_run(tmp_path: Path):
    page = (ROOT / "docs" / "deploying.md").read_text()
    program = re.search(r"^```js\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    ids = json.loads(re.search(r"let ids = (\[.*?\])", program)[1])
    (tmp_path / "node_modules").symlink_to(Path(os.environ["SURGERY_ONNXRUNTIME_NODE"]) / "node_modules")
    (tmp_path / "run.mjs").write_text(program)
    surgery.export_onnx(ROOT / "examples" / "base", merge=ROOT / "examples" / "lora", output=tmp_path / "out")

    done = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True)

    expected = surgery.run(tmp_path / "out", ids, device="cpu", max_new=8).texts[0].tokens
    assert len(set(expected)) > 2  # another row than the last, or a wrong past, would give others
    assert json.loads(done.stdout) == list(expected)
