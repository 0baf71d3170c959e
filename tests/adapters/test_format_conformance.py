# SPDX-License-Identifier: Apache-2.0
"""Every adapter format passes the public conformance suite, for every kind of update it has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery_formats.adapters.adapterhub import ADAPTERHUB
from surgery_formats.adapters.bare import BARE
from surgery_formats.adapters.comfyui import COMFYUI
from surgery_formats.adapters.compact import COMPACT
from surgery_formats.adapters.diffusers import DIFFUSERS
from surgery_formats.adapters.gguf import GGUF_LORA
from surgery_formats.adapters.keras import KERAS
from surgery_formats.adapters.kohya import KOHYA
from surgery_formats.adapters.litgpt import LITGPT
from surgery_formats.adapters.mlx import MLX
from surgery_formats.adapters.omi import OMI
from surgery_formats.adapters.onnx_adapter import ONNX_ADAPTER
from surgery_formats.adapters.peft import PEFT
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.adapters.tensorrt_llm import TENSORRT_LLM
from surgery_formats.adapters.torchtune import TORCHTUNE
from surgery_formats.arrays import cast
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.testing.format import FORMAT_CHECKS, FormatCase, save
from surgery_formats.testing.memory import in_memory
from tests.support.adapter_files import GOLDEN, draw, write_peft

M = "base_model.model.model"
Q, UP, EMBED = f"{M}.layers.0.self_attn.q_proj", f"{M}.layers.0.mlp.up_proj", f"{M}.embed_tokens"


def _pair(module: str, out: int = 24, inputs: int = 40, rank: int = 3) -> dict[str, np.ndarray]:
    return {f"{module}.lora_A.weight": draw(1, rank, inputs), f"{module}.lora_B.weight": draw(2, out, rank)}


def _magnitude(module: str, size: int = 24) -> dict[str, np.ndarray]:
    return {f"{module}.lora_magnitude_vector": draw(3, size) + 5}


def _hada(module: str, rank: int = 2) -> dict[str, np.ndarray]:
    shapes = {"w1_a": (24, rank), "w1_b": (rank, 40), "w2_a": (24, rank), "w2_b": (rank, 40)}
    return {f"{module}.hada_{name}": draw(4, *shape) for name, shape in shapes.items()}


_ROTATION = {"peft_version": "0.21.0", "use_cayley_neumann": False}
PEFT_FILES: dict[str, tuple[dict[str, np.ndarray], dict[str, object]]] = {
    "lora": ({**_pair(Q), **_pair(UP, rank=2)}, {"r": 3, "rank_pattern": {"up_proj": 2}, "lora_alpha": 6}),
    "dora": ({**_pair(Q), **_magnitude(Q)}, {"r": 3, "use_dora": True}),
    "lora on an embedding": (
        {f"{EMBED}.lora_embedding_A": draw(5, 3, 32), f"{EMBED}.lora_embedding_B": draw(6, 40, 3)},
        {"r": 3},
    ),
    "lora on a convolution": (
        {
            "base_model.model.conv.lora_A.weight": draw(7, 2, 4, 3, 3),
            "base_model.model.conv.lora_B.weight": draw(8, 6, 2, 1, 1),
        },
        {"r": 2},
    ),
    "lora_bias": ({**_pair(Q), f"{Q}.lora_B.bias": draw(9, 24)}, {"r": 3, "lora_bias": True}),
    "biases": ({**_pair(Q), f"{Q}.base_layer.bias": draw(10, 24), f"{UP}.bias": draw(11, 24)}, {"r": 3, "bias": "all"}),
    "a carried embedding": (
        {
            f"{EMBED}.lora_embedding_A": draw(5, 3, 32),
            f"{EMBED}.lora_embedding_B": draw(6, 40, 3),
            f"{EMBED}.base_layer.weight": draw(25, 32, 40),
        },
        {"r": 3},
    ),
    "a resized vocabulary": ({**_pair(Q), f"{EMBED}.weight": draw(25, 36, 40)}, {"r": 3}),
    "experts": (
        {
            f"{M}.layers.0.mlp.experts.base_layer.lora_A.weight": draw(26, 8, 40),
            f"{M}.layers.0.mlp.experts.base_layer.lora_B.weight": draw(27, 24, 8),
            f"{M}.layers.0.mlp.experts.lora_A.weight": draw(28, 8, 12),
            f"{M}.layers.0.mlp.experts.lora_B.weight": draw(29, 40, 8),
        },
        {
            "r": 2,
            "peft_version": "0.21.0",
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "target_modules": [],
        },
    ),
    "saved modules": ({**_pair(Q), f"{M}.norm.weight": draw(12, 40)}, {"r": 3, "modules_to_save": ["norm"]}),
    "token rows": (
        {**_pair(Q), f"{EMBED}.token_adapter.trainable_tokens_delta": draw(13, 2, 40)},
        {"r": 3, "trainable_token_indices": {"embed_tokens": [1, 7]}},
    ),
    "wrapped attention": (_pair("base_model.model.attn.base_layer.out_proj"), {"r": 3, "lora_alpha": 6}),
    "adalora": (
        {f"{Q}.lora_A": draw(40, 3, 40), f"{Q}.lora_B": draw(41, 24, 3), f"{Q}.lora_E": draw(42, 3, 1)},
        {
            "peft_type": "ADALORA",
            "init_r": 4,
            "lora_alpha": 6,
            "rank_pattern": {f"{Q[17:]}.lora_E": [True] * 3 + [False]},
        },
    ),
    "miss": ({f"{Q}.miss_block": draw(43, 6, 24)}, {"peft_type": "MISS", "r": 6}),
    "bat": ({f"{Q}.miss_block": draw(44, 6, 4, 4)}, {"peft_type": "MISS", "r": 4, "init_weights": "bat"}),
    "hira": ({f"{Q}.hira_A": draw(46, 3, 40), f"{Q}.hira_B": draw(47, 24, 3)}, {"peft_type": "HIRA", "r": 3}),
    "hra": ({f"{Q}.hra_u": draw(48, 40, 3)}, {"peft_type": "HRA", "r": 3}),
    "boft": (
        {f"{Q}.boft_R": draw(49, 2, 10, 4, 4), f"{Q}.boft_s": draw(50, 24, 1)},
        {"peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 2},
    ),
    "c3a": ({f"{Q}.c3a_kernel": draw(51, 3, 5, 8)}, {"peft_type": "C3A", "block_size": 8}),
    "road": (
        {f"{Q}.road_theta": draw(52, 12), f"{Q}.road_alpha": draw(53, 12)},
        {"peft_type": "ROAD", "variant": "road_1", "group_size": 8},
    ),
    "delora": (
        {
            f"{Q}.delora_A": draw(54, 3, 40),
            f"{Q}.delora_B": draw(55, 24, 3),
            f"{Q}.delora_lambda": draw(56, 1),
            f"{Q}.delora_w_norm": draw(57, 40) + 4,
        },
        {"peft_type": "DELORA", "r": 3},
    ),
    "gralora": (
        {f"{Q}.gralora_A": draw(58, 2, 20, 4), f"{Q}.gralora_B": draw(59, 2, 4, 12)},
        {"peft_type": "GRALORA", "r": 4, "gralora_k": 2, "alpha": 6},
    ),
    "fourierft": ({f"{Q}.fourierft_spectrum": draw(60, 30)}, {"peft_type": "FOURIERFT", "n_frequency": 30}),
    "pvera, drawn": (
        {f"{Q}.pvera_lambda_b": draw(61, 24), f"{Q}.pvera_lambda_d": draw(62, 6)},
        {"peft_type": "PVERA", "r": 3, "save_projection": False},
    ),
    "randlora, drawn": (
        {f"{Q}.randlora_lambda": draw(63, 5, 3), f"{Q}.randlora_gamma": draw(64, 3, 12)},
        {"peft_type": "RANDLORA", "r": 5, "save_projection": False, "sparse": True},
    ),
    "vblora": (
        {
            f"{Q}.vblora_logits_A": draw(65, 3, 5, 9),
            f"{Q}.vblora_logits_B": draw(66, 3, 3, 9),
            "base_model.vblora_vector_bank": draw(67, 9, 8),
        },
        {"peft_type": "VBLORA", "r": 3, "num_vectors": 9, "vector_length": 8, "topk": 2},
    ),
    "beft": ({f"{Q}.beft_bias": draw(68, 1, 24)}, {"peft_type": "BEFT"}),
    "ia3": (
        {f"{Q}.ia3_l": draw(14, 24, 1) + 2, f"{UP}.ia3_l": draw(15, 1, 40) + 2},
        {"peft_type": "IA3", "feedforward_modules": ["up_proj"]},
    ),
    "loha": ({**_hada(Q), **_hada(UP, 4)}, {"peft_type": "LOHA", "r": 2, "alpha": 4, "rank_pattern": {"up_proj": 4}}),
    "lokr": (
        {f"{Q}.lokr_w1": draw(16, 4, 5), f"{Q}.lokr_w2_a": draw(17, 6, 2), f"{Q}.lokr_w2_b": draw(18, 2, 8)},
        {"peft_type": "LOKR", "r": 2, "alpha": 4},
    ),
    "oft": ({f"{Q}.oft_R.weight": draw(19, 5, 28)}, {"peft_type": "OFT", "oft_block_size": 8, "r": 0, **_ROTATION}),
    "vera": (
        {
            f"{Q}.vera_lambda_b": draw(20, 24),
            f"{Q}.vera_lambda_d": draw(21, 3),
            "base_model.vera_A": draw(22, 3, 40),
            "base_model.vera_B": draw(23, 24, 3),
        },
        {"peft_type": "VERA", "r": 3, "projection_prng_key": 1},
    ),
    "vera, drawn": (
        {f"{Q}.vera_lambda_b": draw(20, 24), f"{Q}.vera_lambda_d": draw(21, 3)},
        {"peft_type": "VERA", "r": 3, "projection_prng_key": 1, "save_projection": False},
    ),
    "ln tuning": ({f"{M}.norm.ln_tuning_layers.weight": draw(24, 40)}, {"peft_type": "LN_TUNING"}),
}


def _peft(name: str) -> FormatCase:
    tensors, config = PEFT_FILES[name]
    return FormatCase(PEFT, lambda folder: write_peft(folder / "peft", tensors, **config))


def _copied(path: Path) -> Callable[[Path], Path]:
    """Golden files, away from what lies beside them."""

    def write(folder: Path) -> Path:
        target = folder / f"copy{path.suffix}"
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            shutil.copy(path, target)
        return target

    return write


def _compact(name: str) -> FormatCase:
    def write(folder: Path) -> Path:
        tensors, config = PEFT_FILES[name]
        source = read_adapter(write_peft(folder / "source", tensors, **config))
        return save(COMPACT.render(source, None), COMPACT, folder)

    return FormatCase(COMPACT, write, tolerance=0.1)


def _with_base(fmt, path: Path, base: Path, tolerance: float = 1e-6) -> FormatCase:
    return FormatCase(fmt, _copied(path), open_checkpoint(base), tolerance)


LYCORIS = json.loads((GOLDEN / "lycoris/expected.json").read_text())["files"]
NEEDS_A_BASE = {"locon-core", "loha-core", "lokr-core"}  # kernels of convolutions that factors in memory have lost


def _dotted(folder: Path, name: str) -> Path:
    """A file of LyCORIS under dotted names, as ai-toolkit has them."""
    dotted = {"blocks_0_to_q": "blocks.0.to_q", "blocks_0_to_out_0": "blocks.0.to_out.0", "blocks_0_": "blocks.0."}
    tensors = {}
    for key, value in load_file(GOLDEN / "lycoris" / name / "adapter.safetensors").items():
        module, _, leaf = key.removeprefix("lora_unet_").removeprefix("lycoris_").partition(".")
        start = next(start for start in dotted if module.startswith(start))
        tensors[f"diffusion_model.{dotted[start]}{module.removeprefix(start)}.{leaf}"] = value
    save_file(tensors, folder / "dotted.safetensors")
    return folder / "dotted.safetensors"


def _torchtune(folder: Path, name: str) -> Path:
    """torchtune's own files of an epoch, without PEFT's."""
    target = folder / "epoch"
    target.mkdir(exist_ok=True)
    for file in ("adapter_model.pt", "adapter_config.json"):
        shutil.copy(GOLDEN / "torchtune" / name / "epoch" / file, target / file)
    return target


def _unbundled(folder: Path) -> Path:
    """A file of OMI's names without its embeddings, which no base has rows for."""
    tensors = {
        k: v for k, v in load_file(GOLDEN / "onetrainer/omi.safetensors").items() if not k.startswith("bundle_emb")
    }
    save_file(tensors, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


CASES: dict[str, Callable[[], FormatCase]] = {
    **{f"peft {name}": lambda name=name: _peft(name) for name in PEFT_FILES},
    **{
        f"compact {name}": lambda name=name: _compact(name)
        for name in (
            "lora",
            "dora",
            "lora on an embedding",
            "lora on a convolution",
            "biases",
            "saved modules",
            "token rows",
        )
    },
    **{
        f"mlx {name}": lambda name=name: FormatCase(MLX, _copied(GOLDEN / "mlx/llama" / name))
        for name in ("lora-keys", "dora-embed", "full")
    },
    **{
        f"adapterhub {name}": lambda name=name: FormatCase(ADAPTERHUB, _copied(GOLDEN / "adapterhub" / name))
        for name in ("llama-lora", "llama-ia3", "gpt2-lora", "bert-vera")
    },
    "onnx-adapter": lambda: FormatCase(
        ONNX_ADAPTER, _copied(GOLDEN / "onnx_adapter/llama-rslora/adapter.onnx_adapter")
    ),
    "mlx experts": lambda: _with_base(MLX, GOLDEN / "mlx/mixtral/lora", GOLDEN / "mlx/mixtral/base"),
    **{
        f"gguf {name}": lambda name=name: _with_base(
            GGUF_LORA, GOLDEN / "gguf" / name / "adapter.gguf", (GOLDEN / "gguf" / name).parent / "base"
        )
        for name in ("llama/embedding", "qwen2/lora", "mixtral/lora")
    },
    **{
        f"litgpt {name}": lambda name=name: _with_base(LITGPT, GOLDEN / "litgpt" / name, GOLDEN / "litgpt/base")
        for name in ("default", "all")
    },
    **{
        f"keras {name}": lambda name=name: _with_base(
            KERAS, GOLDEN / "keras" / name, (GOLDEN / "keras" / name).parent / "base"
        )
        for name in ("llama/lora-all", "gemma/lora", "gpt2/lora", "bert/lora")
    },
    **{
        f"tensorrt-llm {name}": lambda name=name: _with_base(
            TENSORRT_LLM, GOLDEN / "tensorrt_llm" / name, GOLDEN / "litgpt/base"
        )
        for name in ("all", "ranks")
    },
    **{
        f"torchtune {name}": lambda name=name: FormatCase(
            TORCHTUNE, lambda folder: _torchtune(folder, name), open_checkpoint(GOLDEN / "torchtune" / name / "base")
        )
        for name in ("llama", "llama-dora", "qwen2")
    },
    **{
        f"kohya {name}": lambda name=name: _with_base(
            KOHYA, GOLDEN / "kohya/sd1" / name / "adapter.safetensors", GOLDEN / "kohya/sd1/base"
        )
        for name in ("mixed", "conv", "mid", "dora-in")
    },
    **{
        f"{format.name} {name}": lambda format=format, name=name: FormatCase(
            format, _copied(GOLDEN / "dotted" / name / "adapter.safetensors")
        )
        for name, format in {
            "diffusers": DIFFUSERS,
            "diffusers-lora-down": DIFFUSERS,
            "diffusers-processors": DIFFUSERS,
            "lightx2v": COMFYUI,
            "lightning": BARE,
            "diffsynth": BARE,
        }.items()
    },
    "omi": lambda: FormatCase(
        OMI, lambda folder: _unbundled(folder), open_checkpoint(GOLDEN / "flux/base-bfl.safetensors")
    ),
    **{
        f"onetrainer oft {name}": lambda name=name: _with_base(
            KOHYA,
            GOLDEN / f"onetrainer/oft-{name}/adapter.safetensors",
            GOLDEN / f"onetrainer/oft-{name}/base.safetensors",
        )
        for name in ("own", "shared", "scaled")
    },
    **{
        f"bare {name}": lambda name=name: FormatCase(BARE, _copied(GOLDEN / "flux" / name / "adapter.safetensors"))
        for name in ("control", "xlabs", "fal")
    },
    **{
        f"comfyui {name}": lambda name=name: FormatCase(COMFYUI, lambda folder: _dotted(folder, name))
        for name in LYCORIS
        if name not in NEEDS_A_BASE
    },
}


@pytest.mark.parametrize("check", FORMAT_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
def test_a_built_in_format_conforms(name: str, check: Callable[[FormatCase, Path], None], tmp_path: Path) -> None:
    check(CASES[name](), tmp_path)


@pytest.mark.parametrize("name", PEFT_FILES)
def test_a_peft_folder_is_written_again_as_it_is(name: str, tmp_path: Path) -> None:
    """Keys, types, values and configuration, though no key of the source is looked at."""
    tensors, _ = PEFT_FILES[name]
    path = _peft(name).write(tmp_path)
    rendering = PEFT.render(PEFT.read(path), None)
    assert {tensor.name: tensor.shape for tensor in rendering.tensors} == {k: v.shape for k, v in tensors.items()}
    for tensor in rendering.tensors:
        assert np.array_equal(cast(tensor.load(), tensor.dtype), tensors[tensor.name]), tensor.name
    assert json.loads(rendering.small_files["adapter_config.json"]) == json.loads(
        (path / "adapter_config.json").read_text()
    )


@pytest.mark.parametrize(
    "name", [name for name in PEFT_FILES if name != "ln tuning"]
)  # a saved module, once it has no file
def test_a_configuration_made_from_memory_names_what_is_there(name: str, tmp_path: Path) -> None:
    """PEFT builds what the configuration names: factors of modules, and of parameters."""
    adapter = in_memory(_peft(name).read(tmp_path))
    config = json.loads(PEFT.render(adapter, None).small_files["adapter_config.json"])
    factored = [s for s, chain in adapter.updates.items() if {u.kind for u in chain} - {"replacement", "token rows"}]
    modules = {site.path.rpartition(".")[0] for site in factored if site.module_kind != "experts"}
    assert config["peft_type"] == PEFT_FILES[name][1].get("peft_type", "LORA")
    assert set(config["target_modules"]) == {module.removesuffix(".out_proj") for module in modules}
    assert set(config.get("target_parameters", [])) == {s.path for s in factored if s.module_kind == "experts"}
