# SPDX-License-Identifier: Apache-2.0
"""Inspect: nothing is lost or counted twice in the tree, and adapters say what they do."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.verbs.inspect import AdapterReport, CheckpointReport, inspect_adapter
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.containers.base import Shard
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError, NotFoundError
from surgery_formats.files.raw import open_file
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.module_tree import leaves, module_graph
from surgery_formats.tensors.tensor import StoredTensor
from tests.oracles import models
from tests.support import header_only

GOLDEN = Path(__file__).parents[1] / "golden"
ARCHS = [name for name, arch in models.ARCHS.items() if arch.config is not None]


def checkpoint(path: Path) -> CheckpointReport:
    found = surgery.inspect(path)
    assert isinstance(found, CheckpointReport)
    return found


def adapter(path: Path) -> AdapterReport:
    found = surgery.inspect(path)
    assert isinstance(found, AdapterReport)
    return found


def component_of(shapes: dict[str, tuple[int, ...]], **config: Any) -> Component:
    """A component of tensors that lie nowhere."""
    file = open_file(__file__)
    at, tensors = 0, []
    for name, shape in shapes.items():
        nbytes = 4 * math.prod(shape)
        tensors.append(StoredTensor(name, DType.F32, shape, file, at, nbytes))
        at += nbytes
    return Component("", Path(), (Shard(Path(__file__), "torch", file, tuple(tensors)),), None, "", config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ARCHS)
def test_counts_are_those_of_the_model(arch: str, tmp_path: Path) -> None:
    """Parameters are the loaded model's, ties once; every stored tensor is in the tree with its bytes."""
    base = models.build_base(arch, tmp_path / "base", dtype="bfloat16", seed=1)
    found = checkpoint(base)
    model = models.load(arch, base, "float32")
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())

    part = found.components[0]
    stored = open_checkpoint(base).main.tensors
    tensors = list(leaves(part.tree))
    assert sum(node.repeated for node in tensors if node.nbytes or not node.tied) == len(stored)
    assert part.tree.nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert sum(total.parameters for total in part.roles.values()) == found.parameters
    assert sum(total.nbytes for total in part.dtypes.values()) == part.tree.nbytes
    assert found.nbytes == sum(os.stat(base / file.name).st_size for file in part.files)
    for _, node in part.tree.walk():
        if node.children:
            assert node.parameters == sum(child.parameters for child in node.children)
            assert node.nbytes == sum(child.nbytes for child in node.children)
            assert all(child.name.startswith(node.name) for child in node.children)
            assert all(child.repeated % node.repeated == 0 for child in node.children)
    assert part.family == json.loads((base / "config.json").read_text())["model_type"] or found.notes


@given(
    st.dictionaries(
        st.lists(
            st.sampled_from(["a", "b", "layers", "0", "1", "2", "3", "10", "01", "²", ""]), min_size=1, max_size=6
        ).map(".".join),
        st.sampled_from([(2,), (3, 2), (), (0, 4)]),
        max_size=25,
    )
)
def test_no_tensor_is_lost_or_counted_twice(shapes: dict[str, tuple[int, ...]]) -> None:
    """Whatever the names: a ranged name stands for exactly the tensors that it spells out."""
    tree = module_graph(component_of(shapes))
    assert tree.parameters == sum(math.prod(shape) for shape in shapes.values())
    spelled: list[tuple[str, tuple[int, ...]]] = []
    for node in leaves(tree):
        names = spell_out(node.name)
        assert len(names) == node.repeated
        assert node.shape is not None
        spelled += [(name, node.shape) for name in names]
    assert sorted(spelled) == sorted(shapes.items())


def spell_out(name: str) -> list[str]:
    """``a.0-1.b`` -> ``a.0.b``, ``a.1.b``."""
    found = [""]
    for i, segment in enumerate(name.split(".")):
        numbers = [segment]
        if segment[:1].isascii() and segment[:1].isdigit() and ("-" in segment or "," in segment):
            runs = [run.split("-") for run in segment.split(",")]
            numbers = [str(n) for run in runs for n in range(int(run[0]), int(run[-1]) + 1)]
        found = [f"{head}{'.' if i else ''}{number}" for head in found for number in numbers]
    return found


def test_equal_layers_are_one_node_and_unequal_ones_are_not() -> None:
    shapes: dict[str, tuple[int, ...]] = {f"model.layers.{i}.self_attn.q_proj.weight": (4, 4) for i in range(6)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (8, 4) for i in (0, 1, 3, 4, 5)}
    shapes |= {f"model.layers.2.mlp.experts.{i}.up_proj.weight": (2, 4) for i in range(3)}
    tree = module_graph(component_of(shapes, model_type="llama"))
    nodes = {node.name: node for _, node in tree.walk()}
    assert nodes["model.layers.0-1,3-5"].repeated == 5
    assert nodes["model.layers.0-1,3-5"].role == "block"
    assert nodes["model.layers.0-1,3-5"].parameters == 5 * (16 + 32)
    experts = nodes["model.layers.2.mlp.experts.0-2.up_proj.weight"]
    assert (experts.repeated, experts.role, experts.shape, experts.parameters) == (3, "expert", (2, 4), 24)


def test_buffers_count_no_parameters() -> None:
    """GPT-2's causal mask ends in ``attn.bias`` and so does the bias of ``c_attn``: only one of them is computed."""
    shapes = {"h.0.attn.bias": (1, 1, 8, 8), "h.0.attn.c_attn.bias": (6,), "h.0.attn.c_attn.weight": (2, 6)}
    tree = module_graph(component_of(shapes, model_type="gpt2"))
    assert {node.name: (node.role, node.parameters) for node in leaves(tree)} == {
        "h.0.attn.bias": ("buffer", 0),
        "h.0.attn.c_attn.bias": ("attention", 6),
        "h.0.attn.c_attn.weight": ("attention", 12),
    }


def test_a_name_of_a_thousand_levels_is_shown() -> None:
    name = ".".join(["a", "b"] * 50_000)
    assert [node.name for node in leaves(module_graph(component_of({name: (1,), f"{name}.c": (1,)})))] == [
        name,
        f"{name}.c",
    ]


def test_facts_files_and_roles_of_a_real_shape(tmp_path: Path) -> None:
    found = checkpoint(header_only.llama(tmp_path / "llama", "1b", tied=True))
    part = found.components[0]
    assert part.facts == {
        "layers": 16,
        "hidden": 2048,
        "intermediate": 8192,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 64,
        "vocabulary": 128256,
    }
    assert (part.model_type, part.family, part.ties) == (
        "llama",
        "llama",
        {"lm_head.weight": "model.embed_tokens.weight"},
    )
    nodes = {node.name: node for _, node in part.tree.walk()}
    assert nodes["model.layers.0-15"].repeated == 16
    assert nodes["model.layers.0-15.self_attn.k_proj.weight"].shape == (512, 2048)
    assert nodes["lm_head.weight"].tied == "model.embed_tokens.weight"
    assert nodes["lm_head.weight"].nbytes == 0
    assert part.dtypes.keys() == {"BF16"}
    assert part.roles["mlp"].parameters == 16 * 3 * 8192 * 2048


def test_a_tied_head_stored_again_counts_its_bytes_only(tmp_path: Path) -> None:
    base = header_only.llama(tmp_path / "llama", "1b", tied=False)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    part = checkpoint(base).components[0]
    assert part.parameters == 1_235_814_400
    assert part.roles["head"].parameters == 0
    assert part.roles["head"].nbytes == part.roles["embedding"].nbytes == 2 * 128256 * 2048


def test_a_pipeline_has_components() -> None:
    found = checkpoint(GOLDEN / "kohya/sd1/base")
    assert [part.name for part in found.components] == ["text_encoder", "unet"]
    assert found.parameters == sum(part.parameters for part in found.components)
    assert all("/" in file.name for part in found.components for file in part.files)


def test_an_unknown_family_is_said_to_be(tmp_path: Path) -> None:
    base = header_only.llama(tmp_path / "llama", "1b", tied=True)
    (base / "config.json").write_text(json.dumps({"model_type": "never-heard-of", "num_hidden_layers": "16"}))
    found = checkpoint(base)
    assert found.components[0].family == ""
    assert found.components[0].facts == {}
    assert "never-heard-of" in found.notes[0]
    assert found.components[0].roles["attention"].parameters > 0


def _train(folder: Path, **fields: Any) -> AdapterReport:
    models.build_base("llama", folder / "base", dtype="float32", seed=1)
    model = models.load("llama", folder / "base", "float32")
    peft.get_peft_model(model, peft.LoraConfig(**fields)).save_pretrained(folder / "adapter")
    return adapter(folder / "adapter")


@pytest.mark.filterwarnings("ignore")
def test_ranks_alphas_and_scales_are_pefts(tmp_path: Path) -> None:
    found = _train(
        tmp_path,
        r=4,
        lora_alpha=8,
        use_rslora=True,
        use_dora=True,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 9},
        alpha_pattern={"v_proj": 3},
    )
    assert found.kinds == {"DoRA": 4}
    assert found.ranks == {4: 3, 9: 1}
    assert found.alphas == {3.0: 2, 8.0: 2}
    assert found.scales == {1.5: 2, 8 / 3: 1, 4.0: 1}
    assert (found.rslora, found.dora) == (True, True)
    assert {entry.name: (entry.rank, entry.scale) for entry in found.modules} == {
        "model.layers.0.self_attn.q_proj.weight": (4, 4.0),
        "model.layers.1.self_attn.q_proj.weight": (9, 8 / 3),
        "model.layers.0.self_attn.v_proj.weight": (4, 1.5),
        "model.layers.1.self_attn.v_proj.weight": (4, 1.5),
    }
    line = {target.pattern: target for target in found.targets}["model.layers.*.self_attn.q_proj"]
    assert (line.count, line.role, line.ranks, line.scales) == (2, "attention", {4: 1, 9: 1}, {4.0: 1, 8 / 3: 1})
    assert any("differs from module to module" in trap for trap in found.traps)
    assert any("rsLoRA" in trap for trap in found.traps)


@pytest.mark.filterwarnings("ignore")
def test_whole_modules_and_token_rows_are_named(tmp_path: Path) -> None:
    found = _train(
        tmp_path,
        r=2,
        lora_alpha=2,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        trainable_token_indices={"embed_tokens": [7, 3]},
    )
    assert [entry.name for entry in found.in_full] == ["lm_head.weight"]
    assert {name: sorted(rows) for name, rows in found.token_rows.items()} == {"model.embed_tokens.weight": [3, 7]}
    assert found.traps == ()


@pytest.mark.filterwarnings("ignore")
def test_a_soft_prompt_is_tokens_by_dim(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base", dtype="float32", seed=1)
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    peft.get_peft_model(models.load("llama", base, "float32"), config).save_pretrained(tmp_path / "prompt")
    found = adapter(tmp_path / "prompt")
    assert found.prompt is not None
    assert (found.prompt.kind, found.prompt.virtual_tokens, found.prompt.dim) == ("PROMPT_TUNING", 5, models.HIDDEN)
    assert found.prompt.prefix is None
    assert found.parameters == 5 * models.HIDDEN
    assert (found.kind, found.modules) == ("PROMPT_TUNING", ())


@pytest.mark.parametrize(
    ("path", "form", "kinds", "scales"),
    [
        ("mlx/llama/lora-keys", "mlx", {"LoRA"}, {2.5}),
        ("mlx/mixtral/lora", "mlx", {"LoRA"}, {20.0}),
        ("mlx/llama/full", "mlx", {"replacement"}, set()),
        ("kohya/sd1/lora/adapter.safetensors", "kohya", {"LoRA"}, {0.5}),
        ("kohya/sd1/dora/adapter.safetensors", "kohya", {"DoRA"}, {0.5}),
        ("kohya/sd1/peft-unet", "peft", {"LoRA"}, {1.5, 1 / 3}),
    ],
)
def test_every_format_is_recognised(path: str, form: str, kinds: set[str], scales: set[float]) -> None:
    found = adapter(GOLDEN / path)
    assert found.format == form
    assert found.kinds.keys() == kinds
    assert found.scales.keys() == scales
    assert sum(target.count for target in found.targets) == len(found.modules)
    assert sum(target.parameters for target in found.targets) == found.parameters
    folder = GOLDEN / path if (GOLDEN / path).is_dir() else (GOLDEN / path).parent
    assert found.nbytes == sum(os.stat(folder / file.name).st_size for file in found.files)


def test_stacked_experts_are_experts() -> None:
    stacks = [entry for entry in adapter(GOLDEN / "mlx/mixtral/lora").modules if entry.experts]
    assert {(entry.experts, entry.role) for entry in stacks} == {(3, "expert")}


def test_an_adapter_beside_a_model_is_an_adapter(tmp_path: Path) -> None:
    folder = header_only.llama(tmp_path / "both", "1b", tied=True)
    lora = header_only.lora(tmp_path / "lora", "1b", 8)
    shutil.copy(lora / "adapter_config.json", folder)
    assert isinstance(surgery.inspect(folder), CheckpointReport)  # a merged model that kept the configuration
    shutil.copy(lora / "adapter_model.safetensors", folder)
    assert isinstance(surgery.inspect(folder), AdapterReport)


def test_a_file_that_holds_a_model_is_a_model(tmp_path: Path) -> None:
    base = header_only.llama(tmp_path / "llama", "1b", tied=True)
    found = checkpoint(base / "model.safetensors")
    assert found.parameters == 1_235_814_400
    assert found.components[0].model_type == ""


def test_what_is_not_there_or_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        surgery.inspect(tmp_path / "nothing")
    with pytest.raises(NotFoundError):
        surgery.inspect(tmp_path)
    lora = header_only.lora(tmp_path / "lora", "1b", 8)
    (lora / "adapter_config.json").write_text('{"peft_type": "NEVER"}')
    with pytest.raises(MalformedError, match="NEVER"):
        surgery.inspect(lora)


def test_tensors_without_use_are_a_trap() -> None:
    """A plugin's reader may leave some; a merge refuses them, a look tells."""
    read = read_adapter(GOLDEN / "mlx/llama/lora-keys")
    site, *others = read.updates
    found = inspect_adapter(replace(read, updates={other: read.updates[other] for other in others}))
    assert any("2 tensors have no use" in trap and site.path.split(".")[-2] in trap for trap in found.traps)


@pytest.mark.parametrize(
    "path", ["mlx/mixtral/base", "kohya/sd1/base", "kohya/sd1/mixed/adapter.safetensors", "mlx/llama/dora"]
)
def test_json_is_strict_and_the_same_twice(path: str) -> None:
    first, second = (json.dumps(surgery.inspect(GOLDEN / path).as_json(), allow_nan=False) for _ in range(2))
    assert first == second
    assert json.loads(first)["type"] in ("checkpoint", "adapter")


def test_neither_torch_nor_numpy_is_imported(tmp_path: Path) -> None:
    """Pickled weights too."""
    torch.save({"model.embed_tokens.weight": torch.zeros(4, 2)}, tmp_path / "pytorch_model.bin")
    paths = [tmp_path, GOLDEN / "mlx/llama/base", GOLDEN / "mlx/llama/dora", GOLDEN / "kohya/sd1/base"]
    paths += [GOLDEN / "kohya/sd1/lora/adapter.safetensors", GOLDEN / "kohya/sd1/peft-unet"]
    code = (
        "import sys, surgery\n"
        f"for path in {list(map(str, paths))!r}: surgery.inspect(path).as_json()\n"
        "print(sorted({'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers', 'peft'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (root, root / "formats")))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.stdout.strip() == "[]"


def test_verbs_are_not_hidden_by_their_modules() -> None:
    """Their modules lie in a room of their own, so importing one leaves the function of its name alone."""
    code = (
        "import surgery, surgery.verbs.inspect, surgery.verbs.merge, surgery.verbs.env\n"
        "from surgery.verbs.report import report\n"
        "print([callable(getattr(surgery, name)) for name in surgery.__all__ if name[0].islower()])\n"
        "assert surgery.report is report"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (root, root / "formats")))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert "False" not in done.stdout
    assert "True" in done.stdout
