# SPDX-License-Identifier: Apache-2.0
"""Savings: the same counts as PEFT, the same bytes as the file system, from headers alone."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest

import surgery
from surgery.verbs.report import Split
from surgery_formats.errors import FitError, NotFoundError
from tests.oracles import models
from tests.support import header_only

GOLDEN = Path(__file__).parents[1] / "golden"
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
CASES: list[
    tuple[str, str, dict[str, Any], int]
] = [  # architecture, PEFT's config class, its fields, vocabulary rows added
    ("llama", "LoraConfig", LORA, 0),
    ("llama", "LoraConfig", LORA | {"target_modules": "all-linear", "use_dora": True}, 0),
    ("llama", "LoraConfig", LORA | {"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, 0),
    ("llama", "LoraConfig", LORA | {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, 0),
    ("llama", "LoraConfig", LORA | {"modules_to_save": ["embed_tokens", "lm_head"]}, 0),
    ("llama", "LoraConfig", LORA | {"modules_to_save": ["norm"]}, 0),  # a suffix: input_layernorm too
    ("llama", "LoraConfig", LORA | {"trainable_token_indices": {"embed_tokens": [2, 3], "lm_head": [1]}}, 0),
    ("llama", "LoraConfig", LORA, 5),
    ("llama", "TrainableTokensConfig", {"token_indices": [1, 5, 7]}, 0),
    ("llama", "PromptTuningConfig", {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}, 0),
    ("llama", "PrefixTuningConfig", {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}, 0),
    ("llama_tied", "LoraConfig", LORA, 0),
    ("llama_tied", "LoraConfig", LORA | {"target_modules": ["q_proj", "embed_tokens"]}, 5),
    ("llama_tied", "LoraConfig", LORA | {"modules_to_save": ["embed_tokens"]}, 0),
    ("llama_tied", "LoraConfig", LORA | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 0),
    ("llama_tied", "LoraConfig", LORA | {"trainable_token_indices": [1, 5], "ensure_weight_tying": True}, 0),
    ("llama_cls", "LoraConfig", LORA | {"task_type": "SEQ_CLS"}, 0),
    ("qwen2", "LoraConfig", LORA | {"bias": "all"}, 0),
    ("qwen2", "LoraConfig", LORA | {"bias": "lora_only", "lora_bias": False}, 0),
    ("qwen2", "LoraConfig", LORA | {"lora_bias": True}, 0),
    ("gpt2", "LoraConfig", LORA | {"target_modules": ["wte", "c_attn"], "use_dora": True}, 0),
    ("gpt2", "LoraConfig", LORA | {"target_modules": ["c_attn", "c_proj"], "bias": "all"}, 0),
    ("bert", "LoraConfig", LORA | {"target_modules": ["query"], "bias": "all"}, 0),
    ("t5", "LoraConfig", LORA | {"target_modules": ["q", "wo"]}, 0),
    ("vit", "LoraConfig", LORA | {"modules_to_save": ["classifier"]}, 0),
    ("resnet", "LoraConfig", LORA | {"target_modules": ["convolution"], "use_dora": True}, 0),
    (
        "mixtral",
        "LoraConfig",
        LORA | {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        0,
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("arch", "kind", "fields", "more_rows"), CASES, ids=lambda value: str(value)[:60])
def test_counts_are_pefts(arch: str, kind: str, fields: dict[str, Any], more_rows: int, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    models.build_base(arch, base, dtype="float32", seed=1)
    model = models.load(arch, base, "float32")
    if more_rows:
        model.resize_token_embeddings(models.VOCAB + more_rows)
    attached = peft.get_peft_model(model, getattr(peft, kind)(**fields))
    attached.save_pretrained(adapter)
    trained, total = attached.get_nb_trainable_parameters()

    found = surgery.report(adapter, base=base)
    cost = found.adapters[0]
    assert (cost.trained, cost.total) == (trained, total)
    assert cost.share == trained / total
    assert cost.split.total == trained
    assert cost.warnings == ()
    assert cost.nbytes == sum(os.stat(path).st_size for path in adapter.glob("adapter_model*"))
    assert found.base is not None
    assert found.base.nbytes == sum(os.stat(path).st_size for path in base.glob("*.safetensors"))


def test_p_tuning_says_what_it_cannot_count(tmp_path: Path) -> None:
    models.build_base("llama", tmp_path / "base", dtype="float32", seed=1)
    config = peft.PromptEncoderConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    peft.get_peft_model(models.load("llama", tmp_path / "base", "float32"), config).save_pretrained(
        tmp_path / "adapter"
    )
    cost = surgery.report(tmp_path / "adapter", base=tmp_path / "base").adapters[0]
    assert cost.trained == 5 * models.HIDDEN
    assert "not in the file" in cost.warnings[0]


@pytest.mark.parametrize(
    ("size", "tied", "parameters"), [("1b", True, 1_235_814_400), ("8b", False, 8_030_261_248)]
)  # the counts Meta and the Hub give for Llama 3.2 1B and Llama 3.1 8B
def test_parameters_of_llama_are_counted_from_headers_alone(
    size: str, tied: bool, parameters: int, tmp_path: Path
) -> None:
    base = header_only.llama(tmp_path / "base", size, tied=tied)
    adapter = header_only.lora(tmp_path / "adapter", size, rank=16)
    assert os.stat(base / "model.safetensors").st_blocks * 512 < 1 << 20, "the file system does not keep files sparse"

    found = surgery.report(adapter, base=base, tasks=(1, 10, 100))
    layers, shapes = header_only.SIZES[size]["num_hidden_layers"], header_only.linears(size)
    per_layer = {name: 16 * (out + inp) for name, (out, inp) in shapes.items()}
    attention = layers * sum(n for name, n in per_layer.items() if "attn" in name)
    mlp = layers * sum(n for name, n in per_layer.items() if "mlp" in name)
    base_attention = layers * sum(math.prod(shape) for name, shape in shapes.items() if "attn" in name)
    base_mlp = layers * sum(math.prod(shape) for name, shape in shapes.items() if "mlp" in name)
    assert found.base is not None
    assert found.base.parameters == parameters
    assert found.base.split == Split(base_attention, base_mlp, parameters - base_attention - base_mlp)
    cost = found.adapters[0]
    assert cost.split == Split(attention, mlp, 0)
    assert cost.trained == attention + mlp
    assert cost.total == parameters + attention + mlp

    full, small = (
        os.stat(path).st_size for path in (base / "model.safetensors", adapter / "adapter_model.safetensors")
    )
    assert (found.base.nbytes, cost.nbytes) == (full, small)
    assert [task.tasks for task in cost.tasks] == [1, 10, 100]
    for task in cost.tasks:
        assert task.copies_nbytes == task.tasks * full
        assert task.shared_nbytes == full + task.tasks * small
        assert task.saved_nbytes == task.copies_nbytes - task.shared_nbytes
        assert task.times == task.copies_nbytes / task.shared_nbytes
    assert cost.tasks[0].saved_nbytes < 0 < cost.tasks[1].saved_nbytes


def test_several_adapters_share_one_base(tmp_path: Path) -> None:
    base = header_only.llama(tmp_path / "base", "1b", tied=True)
    adapters = [header_only.lora(tmp_path / f"rank{rank}", "1b", rank) for rank in (8, 64)]
    found = surgery.report([adapters[0], base, adapters[1]])
    assert [cost.name for cost in found.adapters] == ["rank8", "rank64"]
    assert found.together is not None
    assert found.base is not None
    assert found.together.tasks == 2
    assert found.together.shared_nbytes == found.base.nbytes + sum(cost.nbytes for cost in found.adapters)
    assert found == surgery.report(adapters, base=base)


def test_without_a_base_only_the_adapter_is_told(tmp_path: Path) -> None:
    found = surgery.report(header_only.lora(tmp_path / "adapter", "1b", 8))
    cost = found.adapters[0]
    assert (found.base, found.together, cost.total, cost.share, cost.tasks) == (None, None, None, None, ())
    assert cost.trained > 0


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ("mlx/llama/base", "mlx/llama/dora-embed"),
        ("mlx/mixtral/base", "mlx/mixtral/lora"),
        ("mlx/qwen3_moe/base", "mlx/qwen3_moe/lora-switch"),
        ("kohya/sd1/base", "kohya/sd1/mixed/adapter.safetensors"),
        ("kohya/sd1/base", "kohya/sd1/dora/adapter.safetensors"),
        ("kohya/sdxl/base", "kohya/sdxl/sgm-names/adapter.safetensors"),
    ],
)
def test_every_format_fits_its_base(base: str, adapter: str) -> None:
    cost = surgery.report(GOLDEN / adapter, base=GOLDEN / base).adapters[0]
    assert cost.warnings == ()
    assert cost.trained == cost.split.total > 0


def test_alphas_are_no_trained_parameters() -> None:
    from safetensors import safe_open

    file = GOLDEN / "kohya/sd1/mixed/adapter.safetensors"
    with safe_open(file, "pt") as stored:
        expected = sum(
            math.prod(stored.get_slice(name).get_shape())
            for name in stored.keys()  # noqa: SIM118
            if not name.endswith(".alpha")
        )
    assert surgery.report(file).adapters[0].trained == expected


def test_flattened_names_get_their_roles_from_the_base() -> None:
    """sgm's ``output_blocks_..._in_layers_2`` are resnets, and nothing in the name says attention or MLP."""
    file, base = GOLDEN / "kohya/sdxl/sgm-names/adapter.safetensors", GOLDEN / "kohya/sdxl/base"
    other = GOLDEN / "kohya/sdxl/diffusers-names/adapter.safetensors"
    assert surgery.report(file, base=base).adapters[0].split == surgery.report(other, base=base).adapters[0].split


def test_another_base_is_refused(tmp_path: Path) -> None:
    adapter = header_only.lora(tmp_path / "adapter", "1b", 8)
    with pytest.raises(FitError, match="none of its 112 parameters"):
        surgery.report(adapter, base=header_only.llama(tmp_path / "base", "8b", tied=False))


def test_a_part_that_does_not_fit_is_named(tmp_path: Path) -> None:
    base = header_only.llama(tmp_path / "base", "1b", tied=True)
    adapter = header_only.lora(tmp_path / "adapter", "1b", 8)
    shapes = header_only.linears("1b")
    names = [(0, "self_attn.q_proj"), (99, "self_attn.q_proj")]
    header_only.write(
        adapter / "adapter_model.safetensors",
        [
            (f"base_model.model.model.layers.{layer}.{name}.{leaf}.weight", shape)
            for layer, name in names
            for leaf, shape in (("lora_A", (8, shapes[name][1])), ("lora_B", (shapes[name][0], 8)))
        ],
    )
    cost = surgery.report(adapter, base=base).adapters[0]
    assert "1 of 2" in cost.warnings[0]
    assert "layers.99" in cost.warnings[0]


def test_two_models_are_refused(tmp_path: Path) -> None:
    base = header_only.llama(tmp_path / "base", "1b", tied=True)
    with pytest.raises(FitError, match="more than one base"):
        surgery.report([base], base=base)
    with pytest.raises(FitError, match="tasks is 0"):
        surgery.report([base], tasks=[0])
    with pytest.raises(NotFoundError):
        surgery.report(tmp_path / "nothing")


def test_markdown_is_the_same_wherever_the_files_lie(tmp_path: Path) -> None:
    texts = []
    for place in ("one", "two/deeper"):
        base = header_only.llama(tmp_path / place / "base", "1b", tied=True)
        adapter = header_only.lora(tmp_path / place / "my|`adapter`", "1b", 8)
        texts.append(surgery.report(adapter, base=base).as_markdown())
    assert texts[0] == texts[1]
    assert str(tmp_path) not in texts[0]
    assert "1.24 B parameters, 2.47 GB" in texts[0]
    assert "`my\u00a6'adapter'`" in texts[0]
    for block in texts[0].split("\n\n"):  # every row of a table has as many cells as its head
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1


def test_json_is_strict_and_complete(tmp_path: Path) -> None:
    base = header_only.llama(tmp_path / "base", "1b", tied=True)
    found = surgery.report(header_only.lora(tmp_path / "adapter", "1b", 8), base=base)
    again = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert again["type"] == "savings"
    assert again["base"]["parameters"] == 1_235_814_400
    assert again["adapters"][0]["tasks"][2]["tasks"] == 100


def test_neither_torch_nor_numpy_is_imported(tmp_path: Path) -> None:
    base = header_only.llama(tmp_path / "base", "1b", tied=True)
    adapter = header_only.lora(tmp_path / "adapter", "1b", 8)
    shutil.copytree(GOLDEN / "kohya/sd1", tmp_path / "sd1")
    code = (
        "import sys, surgery\n"
        f"surgery.report({str(adapter)!r}, base={str(base)!r}).as_markdown()\n"
        f"surgery.report({str(tmp_path / 'sd1/dora/adapter.safetensors')!r}, base={str(tmp_path / 'sd1/base')!r}).as_json()\n"
        "print(sorted({'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers', 'peft'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, root / "formats")))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.stdout.strip() == "[]"
