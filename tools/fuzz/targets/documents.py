# SPDX-License-Identifier: Apache-2.0
"""Documents beside weights: configurations, recipes, manifests, journals, tokenizers, modules, calibration, batches, sounds."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from surgery.engine.calibration_file import open_calibration, raw_inputs
from surgery.engine.plan import SideFile
from surgery.engine.undo.sidecar import open_sidecar
from surgery.onnx.export.genai_tokenizer import with_special_tokens
from surgery.onnx.graph.contract import from_metadata
from surgery.onnx.graph.inserted import inserted_in
from surgery.onnx.run.batch_file import read_batch
from surgery.onnx.run.inputs import given_inputs, needs_text, said
from surgery.onnx.run.spectrogram import read_sound
from surgery.onnx.run.tokenizer import open_tokenizer, stop_tokens
from surgery.prompts.token_files import first_id, token_files
from surgery.recipes.document import Collection, Value, read_document
from surgery.recipes.placing import placed_steps
from surgery.recipes.reading import read_recipe
from surgery.verification.written_files import check_added
from surgery_formats.adapters.nemo.config import nemo_config
from surgery_formats.errors import FitError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.files.output.journal import parse_line
from surgery_formats.files.output.manifest import MANIFEST, is_safe_name, verify_folder
from surgery_formats.models.families.parameters import model_of
from surgery_formats.models.families.registry import family_of
from surgery_formats.models.rebuilt.tokenizer import smaller_tokenizer, token_ids, tokenizer_size, with_token_ids
from surgery_formats.models.sentence_modules import read_sentence_modules
from surgery_formats.models.sets_beside import is_whole_set, sets_beside

from .. import ROOT
from ..golden import golden_files
from ..target import Case, DisagreementError, Seed, Target
from ..world import CONFIG, safetensors_bytes, world

__all__ = ["targets"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def targets() -> list[Target]:
    """One for each kind of document."""
    yaml = ("yaml",)
    return [
        Target("document:config", _config, _configs, on_disk=False, share=2),
        Target("document:yaml", _yaml, _recipes, needs=yaml, share=0.5),
        Target("document:recipe", _recipe, _recipes, needs=yaml, share=0.5),
        Target("document:manifest", _manifest, _merged),
        Target("document:journal", _journal, _journals, on_disk=False),
        Target("document:rounding", _rounding, partial(_file, "merged", "base.rounding")),
        Target("document:contract", _contract, _contracts, on_disk=False),
        Target("document:tokenizer", _tokenizer, _tokenizers),
        Target("document:tokenizers", _opened_tokenizer, _tokenizers, needs=("tokenizers",), share=0.5),
        Target("document:sentence-modules", _sentence, _sentences),
        Target("document:calibration", _calibration, _calibrations),
        Target("document:batch", _batch, _batches),
        Target("document:sound", _sound, _sounds),
        Target("document:nemo-config", _nemo, partial(golden_files, ".yaml"), on_disk=False),
    ]


def _file(folder: str, name: str) -> Sequence[Seed]:
    return [Seed(folder, {name: world()[folder][name]})]


# --- configurations and recipes -------------------------------------------------------------------------------------------


def _configs() -> Sequence[Seed]:
    """Configurations of the families: those of golden models, and tests' own."""
    known: Mapping[str, Any] = json.loads((ROOT / "tests/containers/golden/configs.json").read_text())
    seeds = [Seed(name, {"config.json": json.dumps(config).encode()}) for name, config in known.items()]
    golden = [seed for seed in golden_files("config.json") if "config.json" in seed.files]
    return [Seed("llama", {"config.json": json.dumps(CONFIG).encode()}), *seeds, *golden]


def _config(case: Case) -> str:
    config = parse_object(case.raw, file="config.json")
    assert family_of(config).names
    names = frozenset(("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"))
    model = model_of(config, names if case.draw.random() < 0.5 else frozenset())
    assert len(model.layers) >= 0
    return "read"


_RECIPES = (
    b"""inputs:
  base: llama-3.2-1b/   # a path
  tuned: {path: other/, files: 0123456789abcdef}
steps:
  - verb: combine
    adapters: {style-lora/: 0.7, "facts-lora/": -5e-1}
    method: svd
    rank: 32
    as: both
  - verb: layers
    base: base
    drop: 20-23
    adapter: both
    as: shallow
  - verb: merge
    base: shallow
    adapters: [shallow.adapter]
    dtype: bf16
    only_touched: yes
output: merged/
""",
    b"""steps:
- {verb: extract-lora, base: a/, tuned: b/, max-error: 1e-3, rank_pattern: {'mlp.*': 8}, as: lora}
- {verb: convert, adapter: lora, to: kohya}
- verb: prompt-bake
  prompt: p/
  base: a/
  name: "x: y"
  text: |
    two
    lines
output: ~
""",
    b'{"inputs": {"base": "a"}, "steps": [{"verb": "merge", "base": "base", "adapters": ["l"]}], "version": "0.1.0"}',
)


def _recipes() -> Sequence[Seed]:
    return [Seed(f"recipe {number}", {"recipe.yaml": raw}) for number, raw in enumerate(_RECIPES)]


def _recipe(case: Case) -> str:
    recipe = read_recipe(case.path)
    assert placed_steps(recipe)
    return "read"


def _yaml(case: Case) -> str:
    """What is read has the form that PyYAML gives it, and the same texts."""
    import yaml

    mine = _form(read_document(case.path))
    theirs = yaml.load(case.raw.decode(), Loader=yaml.BaseLoader)
    if mine != theirs:
        raise DisagreementError(f"{mine!r:.300} is not {theirs!r:.300}")
    return "the same"


def _form(value: Value) -> Any:
    if not isinstance(value, Collection):
        return value.text
    items = value.items
    return {key: _form(one) for key, one in items.items()} if isinstance(items, dict) else [_form(one) for one in items]


def _nemo(case: Case) -> str:
    try:
        text = case.raw.decode()
    except UnicodeDecodeError as error:
        raise FitError("no text") from error
    config = nemo_config(text, Path("model_config.yaml"), 4.0 if case.draw.random() < 0.3 else None)
    assert config.heads % config.groups == 0
    return "read"


# --- accounts of outputs --------------------------------------------------------------------------------------------------


def _merged() -> Sequence[Seed]:
    return [Seed(name, world()[name], alone=False) for name in ("merged", "graph")]


def _manifest(case: Case) -> str:
    checks: list[Any] = []
    if case.draw.random() < 0.5:
        verify_folder(case.path)
    else:
        check_added(case.path, checks)
    if (case.path / MANIFEST).is_file():
        read_recipe(case.path / MANIFEST)
    return "read"


_LINE = {"plan": "p", "name": "model.safetensors", "size": 8, "record": {"xxh3": "0" * 32, "sha256": "0" * 64}}


def _journals() -> Sequence[Seed]:
    return [Seed("journal", {"journal": json.dumps(_LINE).encode()})]


def _journal(case: Case) -> str:
    found = [parse_line(line, "p") for line in case.raw.split(b"\n")]
    for record in filter(None, found):
        assert is_safe_name(record.name)
    return "read" if any(found) else "nothing"


def _rounding(case: Case) -> str:
    sidecar = open_sidecar(case.path)
    for key in sidecar.parts:
        segments = sidecar.segments(key)
        for _ in range(len(segments)):
            segments.take()
    return "read"


def _contracts() -> Sequence[Seed]:
    import onnx

    seeds = []
    for name in ("graph", "swap"):
        props = onnx.load_model_from_string(world()[name]["model.onnx"]).metadata_props
        seeds += [
            Seed(f"{name} {entry.key}", {entry.key: entry.value.encode()}) for entry in props if entry.value[:1] == "{"
        ]
    return seeds


def _contract(case: Case) -> str:
    text = case.raw.decode("utf-8", "replace")
    for key in ("surgery.contract", "surgery.inserted"):
        if case.draw.random() < 0.7:
            from_metadata({key: text}, "model.onnx")
            inserted_in({key: text}, "model.onnx")
    return "read"


# --- tokenizers -----------------------------------------------------------------------------------------------------------


def _tokenizers() -> Sequence[Seed]:
    files = {name: world()["base"][name] for name in TOKENIZER_FILES}
    word_level = {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 2}, "unk_token": "<unk>"}
    unigram = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["a", -1.5], ["ab", -2.0]],
        "byte_fallback": False,
    }
    seeds = [Seed("BPE", {**files, "chat_template.jinja": b"{{ messages[0].content }}"}, alone=False)]
    for model in (word_level, unigram):
        whole = {**json.loads(files["tokenizer.json"]), "model": model, "post_processor": None, "added_tokens": []}
        seeds.append(Seed(str(model["type"]), {**files, "tokenizer.json": json.dumps(whole).encode()}, alone=False))
    return seeds


def _tokenizer(case: Case) -> str:
    files = {
        name: case.path / name for name in (*TOKENIZER_FILES, "chat_template.jinja") if (case.path / name).is_file()
    }
    choice = case.draw.random()
    if choice < 0.3:
        first = first_id(files)
        made = token_files(files, CONFIG, 2, 20 if first is None else first, "p")
        assert all(json.loads(raw) is not None for name, raw in made.files.items() if name.endswith(".json"))
    elif choice < 0.6:
        smaller = smaller_tokenizer(files, {0, 1, 2}, token_ids(CONFIG))
        with_token_ids(CONFIG, {0: 1})
        assert smaller is not None
    elif choice < 0.7:
        assert tokenizer_size(files) >= 0
        stop_tokens(case.path)
    elif choice < 0.9:
        with_special_tokens([SideFile(name, source=path) for name, path in files.items()])
    else:
        for what, inside in sets_beside(case.path).items():
            is_whole_set(what, inside)
    return "read"


def _opened_tokenizer(case: Case) -> str:
    tokenizer = open_tokenizer(case.path)
    assert isinstance(tokenizer.decode(tokenizer.encode("ab <s> c")[:50]), str)
    return "read"


# --- modules, calibration, batches, sounds --------------------------------------------------------------------------------


def _sentences() -> Sequence[Seed]:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    pooling = {"word_embedding_dimension": 8, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    dense = {
        "in_features": 8,
        "out_features": 4,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    weights = {"linear.weight": numpy.ones((4, 8)), "linear.bias": numpy.ones(4)}
    files = {
        "modules.json": json.dumps(modules).encode(),
        "1_Pooling/config.json": json.dumps(pooling).encode(),
        "2_Dense/config.json": json.dumps(dense).encode(),
        "2_Dense/model.safetensors": safetensors_bytes(weights),
    }
    return [Seed("modules", files, alone=False)]


def _sentence(case: Case) -> str:
    sets_beside(case.path)
    read_sentence_modules(case.path, 8)
    return "read"


def _calibrations() -> Sequence[Seed]:
    raw = {"model.layers.0.mlp.down_proj.activations": numpy.ones((8, 4))}
    gram = {"a.b.gram": numpy.eye(4), "a.b.mean": numpy.ones(4), "a.c.gram": numpy.eye(2)}
    return [
        Seed(str(number), {"c.safetensors": safetensors_bytes(tensors)}) for number, tensors in enumerate((raw, gram))
    ]


def _calibration(case: Case) -> str:
    found = open_calibration(case.path)
    for parts in found.modules.values():
        for stored in parts.values():
            if len(stored.shape) == 2 and stored.numel < 1 << 20:
                list(raw_inputs(stored, judging=case.draw.choice((None, True, False))))
    return "read"


def _batches() -> Sequence[Seed]:
    lines = [
        {"prompt": "a"}, {"pair": ["a", "b"]}, {"ids": [1, 2, 3]}, {"messages": [{"role": "user", "content": "hello"}]},
    ]  # fmt: skip
    each = [Seed(f"line {number}", {"b.jsonl": json.dumps(line).encode()}) for number, line in enumerate(lines)]
    together = "\n".join(map(json.dumps, lines)).encode()
    return [*each, Seed("all", {"b.jsonl": together}), Seed("text", {"b.txt": b"one\n\ntwo\r\nthree\n"})]


def _batch(case: Case) -> str:
    for given in given_inputs(read_batch(case.path)):
        needs_text(given)
        said(given)
    return "read"


def _sounds() -> Sequence[Seed]:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(2)
        sound.setsampwidth(2)
        sound.setframerate(16000)
        sound.writeframes(bytes(400))
    array = io.BytesIO()
    numpy.save(array, numpy.zeros((4, 10), numpy.float32))
    return [Seed("wav", {"a.wav": buffer.getvalue()}), Seed("npy", {"a.npy": array.getvalue()})]


def _sound(case: Case) -> str:
    assert read_sound(case.path, 4, 10).shape == (4, 10)
    return "read"
