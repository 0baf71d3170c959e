# SPDX-License-Identifier: Apache-2.0
"""Two things of one name, of two adapters, networks or files, have an account each, and no output takes one for the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.algebra.output import combination_id
from surgery.verbs.combine import combined
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import FitError
from tests.support.kit import make_base, make_lora, spawn

COPY = "base_model.model.score.original_module.weight"
WHY = "the base's own copy of a module trained in full"


def _lora(folder: Path, seed: int, *, copied: bool = True) -> Path:
    """An adapter called ``lora`` in a folder of its own, with a tensor that no merge has a use for."""
    folder.mkdir()
    path = make_lora(folder / "lora")
    torch.manual_seed(seed)
    tensors = {name: torch.randn_like(value) for name, value in load_file(path / "adapter_model.safetensors").items()}
    tensors |= {COPY: torch.randn(2, 2)} if copied else {}
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    return path


def _ledger(folder: Path) -> Any:
    return json.loads((folder / "surgery_manifest.json").read_text())["ledger"]


def test_ignored_tensors_of_one_name_are_told_by_their_adapter(tmp_path: Path) -> None:
    base, adapters = make_base(tmp_path / "base"), [_lora(tmp_path / name, i) for i, name in enumerate("ab")]
    surgery.merge(base, adapters[0], output=tmp_path / "one")
    assert _ledger(tmp_path / "one")["ignored"] == {COPY: WHY}
    done = spawn("merge", base, *adapters, "-o", tmp_path / "two", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["ledger"]["ignored"] == {f"0:{COPY}": WHY, f"1:{COPY}": WHY}
    ledger = _ledger(tmp_path / "two")
    assert ledger["ignored"] == {f"0:{COPY}": WHY, f"1:{COPY}": WHY}
    changed = next(row for row in ledger["tensors"].values() if row["class"] == "updated")
    assert [update["adapter"] for update in changed["updates"]] == [0, 1]  # the same numbers
    surgery.verify(tmp_path / "two", against=base)


def test_the_one_of_several_that_ignores_a_tensor_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapters = [_lora(tmp_path / "a", 0, copied=False), _lora(tmp_path / "b", 1)]
    surgery.merge(base, adapters, output=tmp_path / "out")
    assert _ledger(tmp_path / "out")["ignored"] == {f"1:{COPY}": WHY}


def test_a_combination_of_the_same_files_the_other_way_round_is_another(tmp_path: Path) -> None:
    """Both adapters are called ``lora``: the weights alone do not tell which of them has which."""
    first, second = (_lora(tmp_path / name, i, copied=False) for i, name in enumerate("ab"))
    ids = [
        combination_id(combined([(one, 0.7), (other, -0.3)]))
        for one, other in ((first, second), (second, first), (first, second))
    ]
    assert ids[0] == ids[2] != ids[1]


def test_a_tensor_of_another_file_is_not_used_because_its_name_is(tmp_path: Path) -> None:
    """Beside the adapter lies a file that no rule knows, with a tensor of a name that the adapter's own file has too."""
    path = _lora(tmp_path / "a", 0, copied=False)
    own = path / "adapter_model.safetensors"
    bare = {name.removeprefix("base_model.model."): value for name, value in load_file(own).items()}
    save_file(bare | {"score.weight": torch.ones(2, 2)}, own, {"format": "pt"})
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["score"]}))
    assert read_adapter(path).unconsumed() == ()
    save_file({"score.weight": torch.zeros(2, 2)}, path / "stray.safetensors")
    (left,) = read_adapter(path).unconsumed()
    assert left.path == path / "stray.safetensors"
    with pytest.raises(FitError, match="not used by any update"):
        surgery.convert(path, "mlx", output=tmp_path / "out")
