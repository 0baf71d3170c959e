# SPDX-License-Identifier: Apache-2.0
"""Adapters of any formats are added up and written in any: names, types and configuration of what comes out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from surgery import combine, convert, diff
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.updates import LoRA, Update
from tests.support.adapter_files import (
    GOLDEN,
    assert_close,
    config_of,
    draw,
    kohya_deltas,
    llama,
    mlx_deltas,
    peft_deltas,
    unet,
    write_mlx,
    write_peft,
)
from tests.support.combinations import lora, simple, total


def test_peft_and_mlx_combine_into_either(tmp_path: Path) -> None:
    one = lora(tmp_path / "a", 1, 3, {"self_attn.q_proj": (6, 6)})
    parameters = {"rank": 2, "scale": 4.0, "dropout": 0.0}
    stem = "model.layers.0.self_attn.q_proj"
    other = write_mlx(
        tmp_path / "m", {f"{stem}.lora_a": draw(5, 6, 2), f"{stem}.lora_b": draw(6, 2, 6)}, lora_parameters=parameters
    )
    wanted, _ = total([(peft_deltas(one), 0.7), (mlx_deltas(other), -0.3)])
    combine([(one, 0.7), (other, -0.3)], output=tmp_path / "p")
    combine([(other, -0.3), (one, 0.7)], output=tmp_path / "q")
    assert_close(peft_deltas(tmp_path / "p"), wanted)
    assert_close(mlx_deltas(tmp_path / "q"), wanted)


def test_kohya_files_combine_through_the_base(tmp_path: Path) -> None:
    base = unet(tmp_path / "base")
    paths = []
    for number in range(2):
        r = number + 2
        tensors = {
            "base_model.model.conv_in.lora_A.weight": draw(number, r, 3, 3, 3),
            "base_model.model.conv_in.lora_B.weight": draw(number + 9, 4, r, 1, 1),
        }
        folder = write_peft(tmp_path / f"p{number}", tensors, r=r)
        paths.append(convert(folder, "kohya", output=tmp_path / f"k{number}.safetensors", base=base).output)
    pairs = list(zip(paths, (0.7, -0.3), strict=True))
    wanted, _ = total([(kohya_deltas(path), weight) for path, weight in pairs])
    result = combine(pairs, output=tmp_path / "out.safetensors", base=base)
    assert_close(kohya_deltas(tmp_path / "out.safetensors"), wanted)
    assert (result.modules[0].ranks, result.modules[0].rank) == ((2, 3), 4)  # the weight has four rows
    combine([(tmp_path / "p0", 0.7), (paths[1], -0.3)], output=tmp_path / "mixed", base=base)
    assert_close(peft_deltas(tmp_path / "mixed"), {"conv_in": next(iter(wanted.values()))})
    combine(pairs, output=tmp_path / "own.safetensors")
    assert_close(kohya_deltas(tmp_path / "own.safetensors"), wanted)
    with pytest.raises(FitError, match="come from the base"):
        combine([(tmp_path / "p0", 0.7)], output=tmp_path / "none.safetensors", to="kohya")


def test_names_that_only_a_base_can_tell_apart(tmp_path: Path) -> None:
    one = lora(tmp_path / "a", 1, 2, {"self_attn.q_proj": (6, 6)})
    bare = "base_model.model.layers.0.self_attn.q_proj"
    other = write_peft(
        tmp_path / "b", {f"{bare}.lora_A.weight": draw(3, 2, 6), f"{bare}.lora_B.weight": draw(4, 6, 2)}, r=2
    )
    with pytest.raises(FitError, match="may be") as caught:
        combine([(one, 1.0), (other, 1.0)], output=tmp_path / "out")
    assert "`base=`" in str(caught.value)
    combine([(one, 1.0), (other, 1.0)], output=tmp_path / "out", base=llama(tmp_path / "base"))
    wanted = peft_deltas(one)["model.layers.0.self_attn.q_proj"] + peft_deltas(other)["layers.0.self_attn.q_proj"]
    assert_close(peft_deltas(tmp_path / "out"), {"model.layers.0.self_attn.q_proj": wanted})


def test_the_configuration_names_every_module_of_both(tmp_path: Path) -> None:
    one = simple(tmp_path / "a", target_modules=["q_proj"], base_model_name_or_path="org/x", task_type="CAUSAL_LM")
    other = lora(tmp_path / "b", 5, 3, {"self_attn.v_proj": (24, 32)}, target_modules=["v_proj"])
    combine([(one, 1.0), (other, 1.0)], output=tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert config["base_model_name_or_path"] == "org/x"
    assert config["task_type"] == "CAUSAL_LM"
    manifest = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())
    assert [source["weight"] for source in manifest["sources"]] == [1.0, 1.0]
    assert str(tmp_path) not in json.dumps(manifest)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_factors_are_stored_in_the_type_asked_for(tmp_path: Path, dtype: str) -> None:
    pairs = [(simple(tmp_path / "a"), 0.7), (simple(tmp_path / "b", seed=5), -0.3)]
    result = combine(pairs, output=tmp_path / "out", dtype=dtype)
    stored = {tensor.dtype.label for tensor in read_adapter(tmp_path / "out").tensors}
    assert stored == {{"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[dtype]}
    assert 0 < result.error < {"fp32": 1e-6, "bf16": 2**-7, "fp16": 2**-10}[dtype]  # type: ignore[operator]


def test_stacks_of_mlx_are_combined_expert_by_expert(tmp_path: Path) -> None:
    source = GOLDEN / "mlx" / "mixtral" / "lora"
    combine([(source, 0.7), (source, 0.3)], output=tmp_path / "sum")
    assert diff(source, tmp_path / "sum").equal
    result = combine([(source, 1.0), (source, -0.5)], rank=1, output=tmp_path / "cut")
    assert {module.rank for module in result.modules} == {1}
    assert not diff(source, tmp_path / "cut").equal


@pytest.mark.parametrize("to", ["comfyui", "diffusers"])
def test_a_format_that_has_to_name_the_network_names_it(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's folder says nothing of a pipeline, and these files name a component before each module."""
    pairs = [(simple(tmp_path / "a"), 0.5), (simple(tmp_path / "b", 5), 0.25)]
    wanted, _ = total([(peft_deltas(path), weight) for path, weight in pairs])
    out = tmp_path / "out.safetensors"
    combine(pairs, output=out, to=to)
    written = read_adapter(out)
    assert (written.format, len({site.component for site in written.updates} - {""})) == (to, 1)
    assert_close({site.path.removesuffix(".weight"): delta for site, delta in _deltas(out).items()}, wanted)
    convert(pairs[0][0], to, output=tmp_path / "one.safetensors")
    assert_close(
        {site.path.removesuffix(".weight"): delta for site, delta in _deltas(tmp_path / "one.safetensors").items()},
        peft_deltas(pairs[0][0]),
    )
    names = sys.modules["surgery_formats.canonical.site_names"]
    monkeypatch.setattr(names, "COMPONENTS", ())  # and no other component is taken for that network
    for refused in (
        lambda: combine(pairs, output=tmp_path / "no.safetensors", to=to),
        lambda: convert(pairs[0][0], to, output=tmp_path / "no.safetensors"),
    ):
        with pytest.raises(ProofError, match=r"are missing .*, \d+ are new"):
            refused()


def _deltas(path: Path) -> dict[Site, np.ndarray]:
    loras = {site: low_rank_of(chain[0]) for site, chain in read_adapter(path).updates.items()}
    return {site: lora.scale * lora.B.load(DType.F64) @ lora.A.load(DType.F64) for site, lora in loras.items()}


def low_rank_of(update: Update) -> LoRA:
    lora = update.low_rank()
    assert lora is not None
    return lora
