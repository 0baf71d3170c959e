# SPDX-License-Identifier: Apache-2.0
"""Dotted adapters in one file: what their own programs do, which scale, rewriting under their own keys, and faults."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from surgery import combine, convert, inspect, merge, resize
from surgery import open as open_any
from surgery_formats.adapters.registry import format_named, read_adapter
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.testing.format import save
from surgery_formats.updates import DoRA, LoRA
from tests.support.adapter_files import GOLDEN, Arrays, assert_expected, draw, merged, write_base

FOLDER = GOLDEN / "dotted"
FILES = json.loads((FOLDER / "expected.json").read_text())["files"]
FORMATS = {"lightning": "bare", "lightx2v": "comfyui", "diffsynth": "bare"}
Q = "transformer_blocks.0.attn.to_q"


def _pair(stem: str, down: str = "lora_A.weight", up: str = "lora_B.weight", rank: int = 2) -> Arrays:
    return {f"{stem}.{down}": draw(1, rank, 8), f"{stem}.{up}": draw(2, 12, rank)}


def _file(folder: Path, tensors: Arrays, metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "lora.safetensors", metadata=metadata)
    return folder / "lora.safetensors"


def _scale(path: Path) -> float:
    ((update,),) = read_adapter(path).updates.values()
    assert isinstance(update, LoRA | DoRA)
    return update.scale


@pytest.mark.parametrize("name", FILES)
def test_it_does_what_its_own_program_does(name: str, tmp_path: Path) -> None:
    base, file = FOLDER / name / "base.safetensors", FOLDER / name / "adapter.safetensors"
    adapter = read_adapter(file)
    assert adapter.format == FORMATS.get(name, "diffusers")
    assert adapter.unconsumed() == ()
    assert_expected(base, merged(base, file, tmp_path / "out"), FOLDER / name / "expected.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_it_is_written_again_as_it_was(name: str, tmp_path: Path) -> None:
    file = FOLDER / name / "adapter.safetensors"
    adapter = read_adapter(file)
    target = format_named(adapter.format)
    path = save(target.render(adapter, None), target, tmp_path)
    before, written = load_file(file), load_file(path)
    assert before.keys() == written.keys()
    assert all(
        np.array_equal(written[key], value) and written[key].shape == value.shape for key, value in before.items()
    )
    again = read_adapter(path)
    assert again.provenance.scales == adapter.provenance.scales


@pytest.mark.parametrize("name", FILES)
def test_it_is_scaled_without_a_base(name: str, tmp_path: Path) -> None:
    base, file, half = (
        FOLDER / name / "base.safetensors",
        FOLDER / name / "adapter.safetensors",
        tmp_path / "h.safetensors",
    )
    combine({file: 0.5}, output=half)
    assert load_file(half).keys() == load_file(file).keys()
    before, wanted = load_file(base), load_file(FOLDER / name / "expected.safetensors")
    got = merged(base, half, tmp_path / "out")
    for key, value in wanted.items():
        step = value.astype(np.float64) - before[key]
        assert abs(got[key] - before[key] - 0.5 * step).max() <= 1e-6 * max(abs(step).max(), abs(value).max()), key


@pytest.mark.parametrize("target", ["kohya", "diffusers", "comfyui", "bare"])
@pytest.mark.parametrize("name", FILES)
def test_every_format_of_one_file_holds_what_the_others_do(name: str, target: str, tmp_path: Path) -> None:
    base, file = FOLDER / name / "base.safetensors", FOLDER / name / "adapter.safetensors"
    result = convert(file, target, output=tmp_path / "x.safetensors", base=base)
    assert {entry.outcome for entry in result.entries} <= {"exact", "folded"}
    assert read_adapter(tmp_path / "x.safetensors").format == target
    got = merged(base, tmp_path / "x.safetensors", tmp_path / "out")
    assert_expected(base, got, FOLDER / name / "expected.safetensors")


def test_it_is_resized_and_split_without_a_base(tmp_path: Path) -> None:
    file = FOLDER / "lightning/adapter.safetensors"
    resize(file, rank=2, output=tmp_path / "small.safetensors")
    small, source = load_file(tmp_path / "small.safetensors"), load_file(file)
    assert small.keys() == source.keys()
    for key in (key for key in source if key.endswith("lora_down.weight")):
        stem = key.removesuffix("lora_down.weight")
        delta = source[f"{stem}alpha"] / 4 * source[f"{stem}lora_up.weight"].astype(float) @ source[key]
        u, s, v = np.linalg.svd(delta)
        cut = small[f"{stem}alpha"] / 2 * small[f"{stem}lora_up.weight"].astype(float) @ small[key]
        assert small[key].shape[0] == 2
        assert np.allclose(cut, (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)
    combine([file], only="attn.*", output=tmp_path / "part.safetensors")
    part = load_file(tmp_path / "part.safetensors")
    assert part.keys() == {key for key in source if ".attn." in key}
    assert all(np.array_equal(part[key], source[key]) for key in part)


def test_alphas_of_the_header_follow_the_ranks(tmp_path: Path) -> None:
    file = FOLDER / "diffusers/adapter.safetensors"
    resize(file, rank=2, output=tmp_path / "small.safetensors")
    with safe_open(tmp_path / "small.safetensors", "np") as opened:
        fields = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (fields["transformer.r"], fields["transformer.rank_pattern"]) == (2, {})
    adapter = read_adapter(tmp_path / "small.safetensors")
    assert adapter.provenance.scales == {"adapter metadata": len(adapter.updates)}
    assert {chain[0].rank for chain in adapter.updates.values()} == {2}


@pytest.mark.parametrize(
    ("more", "metadata", "scale", "source"),
    [
        ({}, {}, 1.0, "rank"),
        ({f"{Q}.alpha": np.array(8, np.float32)}, {"lora_adapter_metadata": '{"transformer.r": 2}'}, 4.0, "alpha"),
        ({}, {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 6}'}, 3.0, "adapter metadata"),
        (
            {},
            {
                "lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 6, "transformer.use_rslora": true}'
            },
            6 / 2**0.5,
            "adapter metadata",
        ),
        (
            {},
            {
                "lora_adapter_metadata": json.dumps(
                    {
                        "transformer.r": 4,
                        "transformer.lora_alpha": 4,
                        "transformer.rank_pattern": {"attn.to_q": 2},
                        "transformer.alpha_pattern": {"to_q": 10},
                    }
                )
            },
            5.0,
            "adapter metadata",
        ),
        ({}, {"ss_network_dim": "2", "ss_network_alpha": "1"}, 0.5, "training metadata"),
        ({}, {"ss_network_dim": "4", "ss_network_alpha": "1"}, 1.0, "rank"),
        ({}, {"ss_network_dim": "Dynamic", "ss_network_alpha": "1"}, 1.0, "rank"),
        (
            {},
            {
                "ss_network_dim": "8",
                "ss_network_alpha": "8",
                "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1"}',
            },
            0.5,
            "training metadata",
        ),
    ],
)
def test_where_the_scale_comes_from(
    tmp_path: Path, more: Arrays, metadata: dict[str, str], scale: float, source: str
) -> None:
    prefixed = {f"transformer.{key}": value for key, value in {**_pair(Q), **more}.items()}
    file = _file(tmp_path, prefixed, metadata)
    assert _scale(file) == pytest.approx(scale)
    assert inspect(file).scale_sources == {source: 1}


def test_a_header_that_does_not_fit_the_factors_is_refused(tmp_path: Path) -> None:
    tensors = {f"transformer.{key}": value for key, value in _pair(Q).items()}
    for header, fault in (
        ('{"transformer.r": 4, "transformer.lora_alpha": 6}', "rank 2, but r says 4"),
        ("[1]", "not an object"),
        ("{", "not JSON"),
        ('{"transformer.r": 2, "transformer.init_lora_weights": "pissa_niter_4"}', "pissa"),
    ):
        with pytest.raises((MalformedError, FitError), match=fault):
            read_adapter(_file(tmp_path, tensors, {"lora_adapter_metadata": header}))


@pytest.mark.parametrize(
    ("stem", "down", "up", "format", "component"),
    [
        (f"transformer.{Q}", "lora_A.weight", "lora_B.weight", "diffusers", "transformer"),
        (f"unet.{Q}", "lora.down.weight", "lora.up.weight", "diffusers", "unet"),
        ("text_encoder.layers.0.q_proj", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight", "diffusers", "text_encoder"),
        (f"diffusion_model.{Q}", "lora_A.weight", "lora_B.weight", "comfyui", "denoiser"),
        (f"diffusion_model.{Q}", "lora_A", "lora_B", "comfyui", "denoiser"),
        (Q, "lora_down.weight", "lora_up.weight", "bare", "denoiser"),
        (Q, "lora_A.default.weight", "lora_B.default.weight", "bare", "denoiser"),
        ("model.layers.0.self_attn.q_proj", "lora_A.weight", "lora_B.weight", "bare", ""),
        ("lora_transformer_transformer_blocks_0_attn_to_q", "lora_down.weight", "lora_up.weight", "kohya", "transformer"),
        ("lora_unet__transformer_blocks_0_attn_to_q", "lora_down.weight", "lora_up.weight", "kohya", "unet"),
        ("lycoris_transformer_blocks_0_attn_to_q", "lora_down.weight", "lora_up.weight", "kohya", "denoiser"),
        ("lora_prior_unet_transformer_blocks_0_attn_to_q", "lora_down.weight", "lora_up.weight", "kohya", "prior"),
    ],
)  # fmt: skip
def test_every_spelling_is_told_by_content(
    stem: str, down: str, up: str, format: str, component: str, tmp_path: Path
) -> None:
    adapter = open_any(_file(tmp_path, _pair(stem, down, up)))
    assert isinstance(adapter, Adapter)
    ((site, (update,)),) = adapter.updates.items()
    assert (adapter.format, site.component) == (format, component)
    assert site.path.replace("_", ".") in stem.replace("_", ".") + ".weight"
    assert update.shape == (12, 8)


def test_a_folder_of_diffusers_and_one_with_a_lone_file_are_adapters(tmp_path: Path) -> None:
    file = _file(tmp_path / "lone", {f"diffusion_model.{key}": value for key, value in _pair(Q).items()})
    assert read_adapter(file.parent).format == "comfyui"
    tensors = {f"transformer.{key}": value for key, value in _pair(Q).items()}
    save_file(tensors, _file(tmp_path / "two", tensors).with_name("pytorch_lora_weights.safetensors"))
    assert read_adapter(tmp_path / "two").format == "diffusers"


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        (_pair("base_model.model.model.layers.0.q_proj"), "without their adapter_config"),
        ({"image_proj.proj.weight": draw(1, 4, 8), "ip_adapter.1.to_k_ip.weight": draw(1, 4, 8)}, "IP-Adapter"),
        ({"input_blocks.1.0.up": draw(1, 4, 2), "input_blocks.1.0.down": draw(1, 2, 4), "lora_controlnet": draw(1, 1)}, "Control"),
        ({"diffusion_model.x.weight::lora::0": draw(1, 4, 2), "diffusion_model.x.weight::lora::1": draw(1, 2, 4)}, "layerdiffuse"),
        ({**_pair(Q), "final.norm.scale": draw(1, 3)}, "factors of a LoRA"),
    ],
)  # fmt: skip
def test_factors_without_a_reader_are_no_model_either(tensors: Arrays, what: str, tmp_path: Path) -> None:
    file = _file(tmp_path, tensors)
    for look in (inspect, open_checkpoint, lambda path: merge(path, path, output=tmp_path / "out")):
        with pytest.raises(FitError, match=what):
            look(file)


def test_a_model_with_adapters_inside_is_a_model(tmp_path: Path) -> None:
    base = {f"layers.{n}.q.base_layer.weight": draw(n, 12, 8) for n in range(3)}
    factors = {
        k: v
        for n in range(3)
        for k, v in _pair(f"layers.{n}.q", "lora_A.default.weight", "lora_B.default.weight").items()
    }
    assert inspect(_file(tmp_path, {**base, **factors})).components


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({f"transformer.{Q}.lora_A.weight": draw(1, 2, 8)}, "without its 'lora_up"),
        ({**{f"transformer.{k}": v for k, v in _pair(Q).items()}, f"transformer.{Q}.lora_down.weight": draw(1, 2, 8)}, "another spelling"),
        ({**{f"transformer.{k}": v for k, v in _pair(Q).items()}, "other.lora_A.weight": draw(1, 2, 8)}, "prefixes"),
        ({**{f"transformer.{k}": v for k, v in _pair(Q).items()}, f"transformer.{Q}.bogus": draw(1, 2, 8)}, "not a key"),
        ({**{f"transformer.{k}": v for k, v in _pair(Q).items()}, f"transformer.{Q}.alpha": draw(1, 2)}, "alpha of shape"),
        ({f"diffusion_model.{k}": v for k, v in (*_pair("img_in").items(), ("img_in.reshape_weight", draw(1, 2)))}, "a shape in a tensor"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused(tensors: Arrays, fault: str, tmp_path: Path) -> None:
    with pytest.raises((MalformedError, FitError), match=fault):
        read_adapter(_file(tmp_path, tensors))


def test_differences_and_whole_weights_beside_factors(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{Q}.weight": (12, 8), f"{Q}.bias": (12,), "norm.weight": (8,)}, {})
    tensors = {
        **{f"diffusion_model.{k}": v for k, v in _pair(Q).items()},
        f"diffusion_model.{Q}.diff_b": draw(3, 12),
        f"diffusion_model.{Q}.dora_scale": draw(4, 12, 1) + 5,
        "diffusion_model.norm.set_weight": draw(5, 8),
    }
    before, got = load_file(base / "model.safetensors"), merged(base, _file(tmp_path, tensors), tmp_path / "out")
    changed = before[f"{Q}.weight"] + draw(2, 12, 2) @ draw(1, 2, 8)
    length = np.linalg.norm(changed, axis=1, keepdims=True)
    assert np.allclose(got[f"{Q}.weight"], changed / length * (draw(4, 12, 1) + 5), atol=1e-4)
    assert np.allclose(got[f"{Q}.bias"], before[f"{Q}.bias"] + draw(3, 12), atol=1e-6)
    assert np.array_equal(got["norm.weight"], draw(5, 8))


def test_the_header_of_diffusers_says_that_there_are_magnitudes(tmp_path: Path) -> None:
    """diffusers makes its LoraConfig of the header, and passes over magnitudes that this does not ask for."""
    base = write_base(tmp_path / "base", {f"{Q}.weight": (12, 8)}, {})
    for name, more in (("lora", {}), ("dora", {f"transformer.{Q}.lora_magnitude_vector": abs(draw(3, 12)) + 1})):
        save_file(
            _pair(f"diffusion_model.{Q}")
            | {k.replace("transformer", "diffusion_model", 1): v for k, v in more.items()},
            tmp_path / "x.safetensors",
        )
        out = tmp_path / f"{name}.safetensors"
        convert(tmp_path / "x.safetensors", "diffusers", output=out, base=base)
        with safe_open(out, "np") as file:
            header = json.loads(file.metadata()["lora_adapter_metadata"])
        assert header.get("transformer.use_dora", False) is bool(more)
        assert not more or f"transformer.{Q}.lora_magnitude_vector" in load_file(out)


def test_a_lora_beside_a_dora_is_refused_for_diffusers(tmp_path: Path) -> None:
    """diffusers would give its module magnitudes too, which the file has not."""
    stem = "diffusion_model.transformer_blocks.0.attn"
    magnitude = {f"{stem}.to_k.lora_magnitude_vector": abs(draw(3, 12)) + 1}
    save_file(_pair(f"{stem}.to_q") | _pair(f"{stem}.to_k") | magnitude, tmp_path / "x.safetensors")
    base = write_base(
        tmp_path / "base", {Q.replace("to_q", part) + ".weight": (12, 8) for part in ("to_q", "to_k")}, {}
    )
    with pytest.raises(FitError, match="no LoRA beside a DoRA"):
        convert(tmp_path / "x.safetensors", "diffusers", output=tmp_path / "out.safetensors", base=base)


def test_a_denoiser_is_found_whatever_the_pipeline_calls_it(tmp_path: Path) -> None:
    base = tmp_path / "pipeline"
    write_base(base / "transformer", {f"{Q}.weight": (12, 8)}, {}, "diffusion_pytorch_model.safetensors")
    (base / "model_index.json").write_text('{"_class_name": "P", "transformer": ["diffusers", "T"]}')
    for number, stem in enumerate((f"diffusion_model.{Q}", Q, f"lora_unet_{Q.replace('.', '_')}")):
        file = _file(tmp_path / str(number), _pair(stem, "lora_down.weight", "lora_up.weight"))
        got = merged(base, file, tmp_path / f"out{number}")
        before = load_file(base / "transformer/diffusion_pytorch_model.safetensors")[f"{Q}.weight"]
        assert np.allclose(got[f"transformer/{Q}.weight"] - before, draw(2, 12, 2) @ draw(1, 2, 8), atol=1e-5)


def test_stable_cascade_meets_the_prior_of_its_pipeline(tmp_path: Path) -> None:
    """diffusers 0.42, ``StableCascadeUNet``; the prefix is ComfyUI's and sd-scripts'."""
    base, module = tmp_path / "pipeline", "down_blocks.0.0.channelwise.0"
    write_base(base / "prior", {f"{module}.weight": (12, 8)}, {}, "diffusion_pytorch_model.safetensors")
    (base / "model_index.json").write_text('{"_class_name": "P", "prior": ["diffusers", "StableCascadeUNet"]}')
    flat = module.replace(".", "_")
    file = _file(tmp_path / "a", _pair(f"lora_prior_unet_{flat}", "lora_down.weight", "lora_up.weight"))
    got = merged(base, file, tmp_path / "out")
    before = load_file(base / "prior/diffusion_pytorch_model.safetensors")[f"{module}.weight"]
    assert np.allclose(got[f"prior/{module}.weight"] - before, draw(2, 12, 2) @ draw(1, 2, 8), atol=1e-5)
    assert inspect(file).family == "Stable Cascade"
    other = _file(
        tmp_path / "b", _pair("lora_prior_unet_down_blocks_0_9_channelwise_0", "lora_down.weight", "lora_up.weight")
    )
    with pytest.raises(FitError, match="the base has no parameter"):
        merge(base, other, output=tmp_path / "no")


def test_inspect_tells_tool_family_and_scales_without_a_base() -> None:
    report = inspect(FOLDER / "lightx2v/adapter.safetensors")
    assert (report.family, report.kinds) == ("Wan", {"LoRA": 10, "offset": 10})
    assert report.tool is not None
    assert report.tool.startswith("LightX2V")
    text = str(report.summary())
    assert "written by" in text
    assert "nowhere: alpha is the rank" in text
    assert inspect(FOLDER / "diffusers/adapter.safetensors").tool == "diffusers (lora_adapter_metadata)"
    assert inspect(FOLDER / "lightning/adapter.safetensors").family == "Qwen-Image"


@pytest.mark.parametrize("alpha", [{}, {"alpha": np.array(8, np.float32)}])
def test_a_scale_of_a1111_goes_before_alpha(alpha: Arrays, tmp_path: Path) -> None:
    stem = f"lora_unet_{Q.replace('.', '_')}"
    beside = {f"{stem}.{leaf}": value for leaf, value in ({"scale": np.array(0.25, np.float32)} | alpha).items()}
    file = _file(tmp_path, {**_pair(stem, "lora_down.weight", "lora_up.weight"), **beside})
    assert _scale(file) == 0.25
    adapter = read_adapter(file)
    assert (adapter.unconsumed(), adapter.provenance.scales) == ((), {"alpha": 1})
    with pytest.raises(MalformedError, match="a scale of 0"):
        read_adapter(_file(tmp_path, {**load_file(file), f"{stem}.scale": np.array(0, np.float32)}))


def test_tables_of_lightx2v_and_comfyui(tmp_path: Path) -> None:
    names = ("blocks.0.modulation", "head.modulation")
    base = write_base(
        tmp_path / "base", {"blocks.0.ffn.0.weight": (12, 8), names[0]: (1, 6, 8), names[1]: (1, 2, 8)}, {}
    )
    before = load_file(base / "model.safetensors")
    factors = {f"diffusion_model.{k}": v for k, v in _pair("blocks.0.ffn.0").items()}
    tables = {"diffusion_model.blocks.0.diff_m": draw(3, 1, 6, 8), "diffusion_model.head.diff_m": draw(4, 1, 2, 8)}
    spelt = {
        "diffusion_model.blocks.0.modulation.diff": draw(3, 1, 6, 8),
        "diffusion_model.head.modulation.diff": draw(4, 1, 2, 8),
    }
    for number, changes in enumerate((tables, spelt)):
        file = _file(tmp_path / str(number), {**factors, **changes})
        got = merged(base, file, tmp_path / f"out{number}")
        for name, step in zip(names, changes.values(), strict=True):
            assert np.allclose(got[name] - before[name], step, atol=1e-6)
        combine({file: 0.5}, output=tmp_path / f"half{number}.safetensors")
        half = load_file(tmp_path / f"half{number}.safetensors")
        assert all(
            np.allclose(half[key], value / 2) and half[key].shape == value.shape for key, value in changes.items()
        )
