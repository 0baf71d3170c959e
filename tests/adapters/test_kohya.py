# SPDX-License-Identifier: Apache-2.0
"""kohya files: golden weights, names resolved against the base, and files that other tools broke."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from surgery import convert
from surgery_formats.adapters.kohya import KOHYA
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.updates import DoRA, LoRA, Offset
from tests.support.adapter_files import (
    GOLDEN,
    assert_close,
    assert_expected,
    draw,
    kohya_deltas,
    merged,
    unet,
    write_peft,
)

EXPECTED = json.loads((GOLDEN / "kohya/expected.json").read_text())["files"]
FILES = sorted(EXPECTED)
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def _pair(key: str = KEY, out: int = 6, inputs: int = 4, rank: int = 2) -> dict[str, np.ndarray]:
    return {f"{key}.lora_down.weight": draw(1, rank, inputs), f"{key}.lora_up.weight": draw(2, out, rank)}


def _file(folder: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, folder / "lora.safetensors", metadata=metadata)
    return folder / "lora.safetensors"


@pytest.mark.parametrize("name", FILES)
def test_merges_to_the_golden_weights(name: str, tmp_path: Path) -> None:
    facts = EXPECTED[name]
    base = GOLDEN / "kohya" / facts["base"]
    file = GOLDEN / "kohya" / name / "adapter.safetensors"
    assert read_adapter(file).unconsumed() == ()
    assert_expected(base, merged(base, file, tmp_path / "out"), GOLDEN / "kohya" / facts["expected"])


@pytest.mark.parametrize("name", FILES)
def test_written_again_it_does_the_same(name: str, tmp_path: Path) -> None:
    facts = EXPECTED[name]
    base = GOLDEN / "kohya" / facts["base"]
    result = convert(
        GOLDEN / "kohya" / name / "adapter.safetensors", "kohya", output=tmp_path / "x.safetensors", base=base
    )
    assert result.max_error <= 1e-6
    assert_expected(
        base, merged(base, tmp_path / "x.safetensors", tmp_path / "out"), GOLDEN / "kohya" / facts["expected"]
    )


@pytest.mark.parametrize("component", ["unet", "text-encoder"])
def test_peft_to_kohya_and_back(component: str, tmp_path: Path) -> None:
    folder = GOLDEN / "kohya/sd1" / f"peft-{component}"
    base = GOLDEN / "kohya/sd1/base"
    convert(folder, "kohya", output=tmp_path / "x.safetensors", base=base)
    assert_expected(
        base,
        merged(base, tmp_path / "x.safetensors", tmp_path / "out"),
        folder.with_name(f"{folder.name}-expected.safetensors"),
    )
    convert(tmp_path / "x.safetensors", "peft", output=tmp_path / "back", base=base)
    convert(tmp_path / "back", "kohya", output=tmp_path / "y.safetensors", base=base)
    assert_close(kohya_deltas(tmp_path / "y.safetensors"), kohya_deltas(tmp_path / "x.safetensors"))


def test_sdxl_is_written_with_the_original_names(tmp_path: Path) -> None:
    base = GOLDEN / "kohya/sdxl/base"
    convert(
        GOLDEN / "kohya/sdxl/diffusers-names/adapter.safetensors", "kohya", output=tmp_path / "x.safetensors", base=base
    )
    original = load_file(GOLDEN / "kohya/sdxl/sgm-names/adapter.safetensors")
    written = load_file(tmp_path / "x.safetensors")
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[name], original[name]) for name in original)


def test_one_alpha_per_part_so_that_diffusers_reads_it(tmp_path: Path) -> None:
    convert(GOLDEN / "kohya/sd1/peft-unet", "kohya", output=tmp_path / "x.safetensors", base=GOLDEN / "kohya/sd1/base")
    alphas = {float(v) for k, v in load_file(tmp_path / "x.safetensors").items() if k.endswith(".alpha")}
    assert alphas == {3.0}


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (None, 1.0),
        (torch.tensor(3.0), 1.5),
        (torch.tensor(0.5, dtype=torch.float16), 0.25),
        (torch.tensor(6.0, dtype=torch.bfloat16), 3.0),
        (torch.tensor(5.0, dtype=torch.float64), 2.5),
        (torch.tensor(4), 2.0),
        (torch.tensor([1.0]), 0.5),
    ],
)
def test_the_scale_is_alpha_over_rank_and_one_without_alpha(
    tmp_path: Path, alpha: torch.Tensor | None, scale: float
) -> None:
    from safetensors.torch import save_file as save

    tensors = {name: torch.from_numpy(value) for name, value in _pair().items()}
    save(tensors | ({f"{KEY}.alpha": alpha} if alpha is not None else {}), tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    ((update,),) = adapter.updates.values()
    assert isinstance(update, LoRA)
    assert update.scale == scale
    assert adapter.unconsumed() == ()
    assert bool(adapter.stated_issues) == (alpha is None)


def test_reading_does_not_import_torch(tmp_path: Path) -> None:
    file = _file(tmp_path, {**_pair(), f"{KEY}.alpha": np.array(1, np.float32)})
    code = (
        "import sys; from surgery_formats.adapters.registry import read_adapter;"
        f"assert len(read_adapter({str(file)!r}).updates) == 1; sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root / "formats")


def test_a_torch_file_is_read_too(tmp_path: Path) -> None:
    torch.save({name: torch.from_numpy(value) for name, value in _pair().items()}, tmp_path / "lora.pt")
    assert KOHYA.detect(tmp_path / "lora.pt")
    assert len(read_adapter(tmp_path / "lora.pt").updates) == 1


def test_the_axis_of_a_magnitude_is_where_the_one_is(tmp_path: Path) -> None:
    square = {f"{CONV}.lora_down.weight": draw(1, 2, 4, 3, 3), f"{CONV}.lora_up.weight": draw(2, 4, 2, 1, 1)}
    for shape, per_row in (((4, 1, 1, 1), True), ((1, 4, 1, 1), False)):
        file = _file(tmp_path, {**square, f"{CONV}.dora_scale": draw(3, *shape)})
        ((update,),) = read_adapter(file).updates.values()
        assert isinstance(update, DoRA)
        assert update.per_row is per_row
        assert update.magnitude.shape == (4,)
    with pytest.raises(FitError, match="dora_scale"):
        read_adapter(_file(tmp_path, {**square, f"{CONV}.dora_scale": draw(3, 1, 1, 1, 4)}))


def test_differences_and_their_way_back(tmp_path: Path) -> None:
    base = unet(tmp_path / "base")
    norm, out = (
        "lora_unet_down_blocks_0_resnets_0_norm1",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
    )
    file = _file(
        tmp_path,
        {f"{CONV}.diff": draw(1, 4, 4, 3, 3), f"{norm}.w_norm": draw(2, 4), f"{out}.diff_b": draw(3, 4), **_pair()},
    )
    adapter = read_adapter(file)
    assert {type(chain[0]) for chain in adapter.updates.values()} == {LoRA, Offset}
    convert(file, "kohya", output=tmp_path / "x.safetensors", base=base)
    before, after = (
        load_file(base / "diffusion_pytorch_model.safetensors"),
        merged(base, tmp_path / "x.safetensors", tmp_path / "m"),
    )
    assert np.allclose(
        after["down_blocks.0.resnets.0.conv1.weight"] - before["down_blocks.0.resnets.0.conv1.weight"],
        draw(1, 4, 4, 3, 3),
        atol=1e-6,
    )
    assert np.allclose(
        after["down_blocks.0.resnets.0.norm1.weight"] - before["down_blocks.0.resnets.0.norm1.weight"],
        draw(2, 4),
        atol=1e-6,
    )
    with pytest.raises(FitError, match="peft cannot hold 3 of 4"):
        convert(file, "peft", output=tmp_path / "no", base=base)


def test_metadata_survives_except_what_is_of_the_file(tmp_path: Path) -> None:
    base = unet(tmp_path / "base")
    notes = {"ss_tag_frequency": '{"a": 1}', "modelspec.title": "t", "sshs_model_hash": "old", "ss_network_dim": "99"}
    file = _file(tmp_path, _pair(), notes)
    convert(file, "peft", output=tmp_path / "peft", base=base)
    convert(tmp_path / "peft", "kohya", output=tmp_path / "x.safetensors", base=base)
    with safe_open(tmp_path / "x.safetensors", "np") as opened:
        kept = opened.metadata()
    assert kept == {
        "ss_tag_frequency": '{"a": 1}',
        "modelspec.title": "t",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "ss_network_module": "networks.lora",
    }


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({f"{KEY}.lora_up.weight": draw(1, 6, 2)}, "without its 'lora_down"),
        ({f"{KEY}.lora_down.weight": draw(1, 2, 4)}, "without its 'lora_up"),
        ({f"{KEY}.dora_scale": draw(1, 6, 1)}, "without its"),
        ({**_pair(), f"{KEY}_lora_magnitude_vector.weight": draw(1, 6)}, "not a key"),
        ({**_pair(), "lora_unet_x_lora_A.weight": draw(1, 6)}, "not a key"),
        ({**_pair(), "other.lora_up.weight": draw(1, 6, 2)}, "prefixes"),
        ({**_pair(), f"{KEY}.alpha": np.array(0, np.float32)}, "alpha of 0"),
        ({**_pair(), f"{KEY}.alpha": np.array(np.inf, np.float32)}, "alpha of inf"),
        ({**_pair(), f"{KEY}.alpha": draw(1, 2)}, "alpha of shape"),
        ({**_pair(), "lora_unet_y.hada_w1_a": draw(1, 4, 2)}, "without its 'hada_w1_b"),
        ({**_pair(), "lora_unet_y.lokr_w1": draw(1, 2, 2)}, "without its 'lokr_w2_a"),
        ({**_pair(), "lora_unet_y.oft_blocks": draw(1, 2, 2, 3)}, "blocks of shape"),
        ({**_pair(), "oft_unet_y.oft_blocks": draw(1, 3, 3, 2, 2)}, "blocks of shape"),
        ({**_pair(), "lora_unet_y.a1.weight": draw(1, 2, 2)}, "without its 'a2.weight"),
        ({**_pair(), "lora_unet_y.oft_R.weight": draw(1, 2, 2)}, "no strictly upper triangles"),
        ({**_pair(), "lora_unet_y.lambda_layer": draw(1, 1, 2)}, "T-LoRA is not read yet"),
        ({**_pair(), "lora_unet_y.weight": draw(1, 4)}, "without its 'on_input"),
        (
            {**_pair(), "lora_te_x.lora_up.weight": draw(1, 6, 2), "lora_te1_x.lora_down.weight": draw(1, 2, 4)},
            "another spelling",
        ),
        ({**_pair(), "lora_unet_y.something": draw(1, 2, 2)}, "not known"),
        ({f"{KEY}.lora_down.weight": draw(1, 3, 4), f"{KEY}.lora_up.weight": draw(1, 6, 2)}, "rank 3"),
        ({f"{KEY}.lora_down.weight": draw(1, 0, 4), f"{KEY}.lora_up.weight": draw(1, 6, 0)}, "is empty"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray], fault: str) -> None:
    with pytest.raises((MalformedError, FitError), match=fault):
        read_adapter(_file(tmp_path, tensors))


def test_a_module_the_base_lacks_is_named(tmp_path: Path) -> None:
    base = unet(tmp_path / "base")
    file = _file(tmp_path, _pair(KEY.replace("to_q", "to_z")))
    with pytest.raises(FitError, match="to_z") as caught:
        convert(file, "peft", output=tmp_path / "out", base=base)
    assert caught.value.exit_code == 4


def test_one_flat_name_of_two_modules_is_refused(tmp_path: Path) -> None:
    from tests.support.adapter_files import write_base

    base = write_base(tmp_path / "base", {"a.b_c.weight": (2, 2), "a_b.c.weight": (2, 2)}, {})
    with pytest.raises(FitError, match="fits"):
        open_checkpoint(base).main.names.resolve("a_b_c.weight", flat=True)


def test_embeddings_have_no_home_here(tmp_path: Path) -> None:
    stem = "base_model.model.embeddings.token_embedding"
    source = write_peft(
        tmp_path / "a", {f"{stem}.lora_embedding_A": draw(1, 2, 64), f"{stem}.lora_embedding_B": draw(2, 16, 2)}, r=2
    )
    with pytest.raises(FitError, match=r"embedding"):
        convert(
            source, "kohya", output=tmp_path / "x.safetensors", base=GOLDEN / "kohya/sd1/base", component="text_encoder"
        )


def test_sites_are_flat_and_know_their_part() -> None:
    sites = read_adapter(GOLDEN / "kohya/sdxl/mixed/adapter.safetensors").updates
    assert {site.component for site in sites} == {"unet", "text_encoder", "text_encoder_2"}
    assert Site("text_projection.weight", "text_encoder_2", flat=True) in sites
