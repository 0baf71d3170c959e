# SPDX-License-Identifier: Apache-2.0
"""An adapter is split by the names of its modules, and its parts together do what it did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file

from surgery import combine, diff
from surgery.engine.selection import Selection
from surgery_cli.group import surgery as command
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import FitError, NothingChangedError
from tests.oracles import disk, models, peft_oracle
from tests.support.adapter_files import (
    assert_close,
    config_of,
    draw,
    kohya_deltas,
    mlx_deltas,
    peft_deltas,
    unet,
    write_mlx,
)
from tests.support.combinations import lora

SHAPES = {"self_attn.q_proj": (24, 32), "self_attn.v_proj": (24, 32), "mlp.down_proj": (32, 40)}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("q_proj", "q"),
        ("self_attn.*", "qv"),
        ("*_proj", "qvd"),
        ("[qv]_proj", "qv"),
        ("layers.0.*", "qvd"),
        ("layers.1.*", ""),
        ("model.layers.?.mlp.down_proj", "d"),
        ("q_proj.weight", "q"),
        ("proj", ""),
        ("attn.q_proj", ""),
    ],
)
def test_patterns_match_from_any_dot_to_the_end(pattern: str, names: str) -> None:
    sites = {module[module.index(".") + 1]: Site(f"model.layers.0.{module}.weight") for module in SHAPES}
    flat = {
        name: Site(f"{s.path.removesuffix('.weight').replace('.', '_')}.weight", "unet", True)
        for name, s in sites.items()
    }
    assert "".join(name for name, site in sites.items() if Selection((pattern,)).keeps(site)) == names
    assert "".join(name for name, site in sites.items() if not Selection((), (pattern,)).keeps(site)) == names
    if not pattern.startswith(("proj", "attn")):  # in flattened names a name may begin at any underscore
        assert "".join(name for name, site in flat.items() if Selection((f"unet:{pattern}",)).keeps(site)) == names
        assert not any(Selection((f"text_encoder:{pattern}",)).keeps(site) for site in flat.values())


def test_two_halves_are_the_whole(tmp_path: Path) -> None:
    whole = lora(tmp_path / "whole", 1, 3, SHAPES, use_rslora=True)
    result = combine([(whole, 1.0)], output=tmp_path / "attention", only=["self_attn.*"])
    combine([(whole, 1.0)], output=tmp_path / "rest", without=["self_attn.*"])
    assert [one.outcome for one in result.modules] == ["kept", "kept", "left out"]
    parts = peft_deltas(tmp_path / "attention"), peft_deltas(tmp_path / "rest")
    assert [sorted(part) for part in parts] == [
        ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"],
        ["model.layers.0.mlp.down_proj"],
    ]
    assert_close(parts[0] | parts[1], peft_deltas(whole))
    assert config_of(tmp_path / "rest")["target_modules"] == ["model.layers.0.mlp.down_proj"]
    combine([(tmp_path / "attention", 1.0), (tmp_path / "rest", 1.0)], output=tmp_path / "again")
    assert diff(whole, tmp_path / "again").equal


def test_mlx_folders_are_split_too(tmp_path: Path) -> None:
    stem = "model.layers.0.self_attn"
    tensors = {f"{stem}.{m}.lora_{x}": draw(i, *shape) for i, (m, x, shape) in enumerate(
        (m, x, s) for m in ("q_proj", "v_proj") for x, s in (("a", (6, 2)), ("b", (2, 6))))}  # fmt: skip
    mlx = write_mlx(tmp_path / "m", tensors, lora_parameters={"rank": 2, "scale": 4.0, "dropout": 0.0})
    combine([(mlx, 1.0)], output=tmp_path / "q", only=["q_proj"])
    assert_close(mlx_deltas(tmp_path / "q"), {f"{stem}.q_proj": mlx_deltas(mlx)[f"{stem}.q_proj"]})


def test_a_kohya_file_loses_a_block(tmp_path: Path) -> None:
    base = unet(tmp_path / "base")
    attention = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    made = {
        "lora_unet_conv_in.lora_down.weight": draw(1, 2, 3, 3, 3),
        "lora_unet_conv_in.lora_up.weight": draw(2, 4, 2, 1, 1),
        "lora_unet_conv_in.alpha": np.array(1, np.float32),
        f"{attention}.lora_down.weight": draw(3, 2, 4),
        f"{attention}.lora_up.weight": draw(4, 6, 2),
    }
    save_file(made, tmp_path / "k.safetensors")
    combine([(tmp_path / "k.safetensors", 1.0)], output=tmp_path / "out.safetensors", base=base, without=["attn1.*"])
    wanted = kohya_deltas(tmp_path / "k.safetensors")
    del wanted[attention]
    assert_close(kohya_deltas(tmp_path / "out.safetensors"), wanted)


def test_peft_loads_and_runs_a_selected_part(tmp_path: Path) -> None:
    """A part that lost its norms loads without a word about missing keys, and attached it does what those modules did."""
    base = models.build_base("llama", tmp_path / "base")
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["norm"]}
    peft_oracle.train("llama", base, "LoraConfig", config, tmp_path / "a", seed=0)
    combine([(tmp_path / "a", 1.0)], output=tmp_path / "q", only=["q_proj"])
    assert config_of(tmp_path / "q")["modules_to_save"] is None
    whole, part = (peft_oracle.merge("llama", base, [(tmp_path / side, 1.0)]) for side in "aq")
    before = disk.read_tensors(base)
    for name, value in part.tensors.items():
        wanted = whole.tensors[name] if "q_proj" in name else before[name].double()
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=0, msg=name)
    model = models.load("llama", base, "float64")
    model.load_state_dict(part.tensors)
    torch.testing.assert_close(part.attached, models.run("llama", model), atol=1e-9, rtol=0)
    assert float((part.attached - models.run("llama", models.load("llama", base, "float64"))).abs().max()) > 1e-2


def test_a_selection_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    whole = lora(tmp_path / "whole", 1, 3, SHAPES)
    with pytest.raises(FitError, match="no module matches 'q_prj'") as caught:
        combine([(whole, 1.0)], output=tmp_path / "x", only=["q_prj"])
    assert "q_proj" in str(caught.value)
    with pytest.raises(NothingChangedError, match="no module is left"):
        combine([(whole, 1.0)], output=tmp_path / "x", without=["*"])
    with pytest.raises(NothingChangedError, match="what it was"):
        combine([(whole, 1.0)], output=tmp_path / "x", only=["*"])
    words = ["combine", str(whole), "-o", str(tmp_path / "x"), "--only", "mlp.*", "--without", "q_proj"]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    assert "2 left out" in done.stdout
    assert peft_deltas(tmp_path / "x").keys() == {"model.layers.0.mlp.down_proj"}


def test_blocks_have_weights_of_their_own(tmp_path: Path) -> None:
    """Blocks of one of two adapters are weighed by splitting it first: .5 times the attention, all of the rest."""
    a, b = lora(tmp_path / "a", 1, 3, SHAPES), lora(tmp_path / "b", 9, 2, SHAPES)
    combine([(a, 1.0)], output=tmp_path / "a1", only=["self_attn.*"])
    combine([(a, 1.0)], output=tmp_path / "a2", without=["self_attn.*"])
    combine([(tmp_path / "a1", 0.5), (tmp_path / "a2", 1.0), (b, 1.0)], output=tmp_path / "out")
    one, other = peft_deltas(a), peft_deltas(b)
    assert_close(
        peft_deltas(tmp_path / "out"), {n: (0.5 if "attn" in n else 1.0) * v + other[n] for n, v in one.items()}
    )
