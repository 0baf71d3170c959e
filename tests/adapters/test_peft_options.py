# SPDX-License-Identifier: Apache-2.0
"""Every kind of PEFT, on every layer that PEFT gives it, with every option that changes the weight: merged as PEFT merges it.

All trained numbers are random. What no weight can hold, or no file tells, is refused with the reason. The table is whole:
a field of a configuration that the reader looks at and no case sets fails a test, and so does a layer that PEFT has learnt.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

import surgery
from surgery_formats.adapters.peft.kinds import switches
from surgery_formats.adapters.peft.read_config import NOT_READ
from surgery_formats.errors import SurgeryError
from tests.oracles import disk, measure, models, peft_oracle
from tests.oracles.catalog_options import CASES, KINDS, NOT_INSTALLED
from tests.oracles.option_walks import ALL, CONV1D, EXPERTS, LINEAR, Fields

CLASSES = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
IDS = torch.randint(0, 21, (2, 8), generator=torch.Generator().manual_seed(7))


class Layers(nn.Module):
    """A layer of each class that a kind of PEFT can wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(21, 16)
        self.square = nn.Linear(16, 16)
        self.wide = nn.Linear(16, 24)
        self.tall = nn.Linear(24, 16, bias=False)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.conv1 = nn.Conv1d(16, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.grouped = nn.Conv2d(8, 16, 3, groups=2, padding=1)
        self.conv3 = nn.Conv3d(2, 4, (2, 3, 1))

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (batch, 8) -> (batch, 36)."""
        x = self.embed(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.norm(x + self.tall(torch.tanh(self.wide(self.square(x)))))
        planes = self.grouped(self.point(self.conv2(self.conv1(x.transpose(1, 2))[:, None])))  # (batch, 16, 8, 8)
        cubes = self.conv3(planes.reshape(len(x), 2, 8, 8, 8))
        return torch.cat([x.mean(1), planes.mean((2, 3)), cubes.mean((2, 3, 4))], 1)


@dataclass(frozen=True)
class Base:
    """A base, how to load it from a folder, and how to run it."""

    folder: Path
    load: Callable[[Path, torch.dtype], Any]
    run: Callable[[Any], Tensor]


def load_layers(folder: Path, dtype: torch.dtype) -> Layers:
    model = Layers().to(dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in disk.read_tensors(folder).items()})
    return model.eval()


@torch.no_grad()
def run_layers(model: Any) -> Tensor:
    return model(IDS).double()


def of_arch(arch: str, folder: Path) -> Base:
    return Base(
        models.build_base(arch, folder),
        lambda path, dtype: models.load(arch, path, str(dtype).removeprefix("torch.")),
        lambda model: models.run(arch, model),
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    folder = tmp_path_factory.mktemp("bases")
    model, generator = Layers(), torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(
            0.12 * noise if parameter.ndim > 1 else 1 + 0.1 * noise if "norm.w" in name else 0.05 * noise
        )
    (folder / "layers").mkdir()
    disk.write_safetensors(folder / "layers" / "model.safetensors", dict(model.state_dict()))
    layers = Base(folder / "layers", load_layers, run_layers)
    return {CONV1D: of_arch("gpt2", folder / "gpt2"), EXPERTS: of_arch("mixtral", folder / "mixtral"), "": layers}


def wrapped(base: Base, kind: str, layers: str, fields: Fields) -> Any:
    """The base with an adapter whose trained numbers are all random."""
    where = {"target_parameters" if layers == EXPERTS else "target_modules": layers.split(",")}
    model = peft.get_peft_model(base.load(base.folder, torch.float32), CLASSES[kind](**{**where, **fields}))
    peft_oracle.randomise(model, torch.Generator().manual_seed(5))
    return model.eval()


def stored(merged: Any, base: Base, folder: Path) -> Mapping[str, Tensor]:
    """A merged model's tensors by their names on the disk."""
    if isinstance(merged, Layers):
        return merged.state_dict()
    merged.save_pretrained(folder)
    return disk.read_tensors(folder)


@pytest.mark.parametrize(
    ("kind", "layers", "option", "fields"),
    CASES,
    ids=[f"{kind}-{layers}-{option}" for kind, layers, option, _ in CASES],
)
def test_a_merge_is_pefts(
    kind: str, layers: str, option: str, fields: Fields, bases: dict[str, Base], tmp_path: Path
) -> None:
    walk, base = KINDS[kind], bases.get(layers, bases[""])
    with peft_oracle.quiet():
        wrapped(base, kind, layers, fields).save_pretrained(tmp_path / "adapter")
    why = next((walk.refused[key] for key in (f"{layers} {option}", option, layers) if key in walk.refused), None)
    if why is not None:
        with pytest.raises(SurgeryError, match=why) as error:
            surgery.merge(base.folder, tmp_path / "adapter", output=tmp_path / "merged")
        assert re.search("(?i)(keep|load|save|merge) (it|the adapter) (beside|with|where)", str(error.value))
        return
    dtype, bound = (torch.float32, 5e-5) if option in walk.half else (torch.float64, 5e-6)
    with peft_oracle.quiet():
        model = peft.PeftModel.from_pretrained(base.load(base.folder, dtype), str(tmp_path / "adapter")).eval()
        attached, merged = base.run(model), model.merge_and_unload()
        logits, expected = base.run(merged), stored(merged, base, tmp_path / "peft")
    surgery.merge(base.folder, tmp_path / "adapter", output=tmp_path / "merged")
    found, before = disk.read_tensors(tmp_path / "merged"), disk.read_tensors(base.folder)
    assert any(not torch.equal(found[name], tensor) for name, tensor in before.items())
    for name, tensor in expected.items():
        assert measure.relative_error(found[name], tensor) < bound, name
    assert measure.relative_error(base.run(base.load(tmp_path / "merged", dtype)), logits) < bound
    if not fields.get("sample_at_inference"):  # which draws anew whenever it runs
        assert measure.relative_error(logits, attached) < bound


OTHER_SHAPES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "no axis": lambda tensor: tensor.reshape(-1)[0],
    "one before": lambda tensor: tensor[None],
    "one behind": lambda tensor: tensor[..., None],
    "nothing": lambda tensor: tensor.reshape(-1)[:0],
    "no rows": lambda tensor: tensor[:0],
    "a row less": lambda tensor: tensor[:-1],
}
COUNTED = {"FOURIERFT", "WAVEFT", "UNILORA", "LN_TUNING"}
"""Whose tensors have as many numbers as they like: one less is another adapter (a whole weight may be a vocabulary)."""


@pytest.mark.parametrize(
    "kind", [kind for kind, walk in KINDS.items() if LINEAR in walk.layers and LINEAR not in walk.refused]
)
def test_a_tensor_of_another_shape_is_refused_or_means_the_same(
    kind: str, bases: dict[str, Base], tmp_path: Path
) -> None:
    base, fields = bases[""], {**KINDS[kind].fields, **next(iter(KINDS[kind].options.values()))}
    with peft_oracle.quiet():
        wrapped(base, kind, LINEAR, fields).save_pretrained(tmp_path / "adapter")
    surgery.merge(base.folder, tmp_path / "adapter", output=tmp_path / "sound")
    config, tensors = disk.adapter(tmp_path / "adapter")
    sound = disk.read_tensors(tmp_path / "sound")
    for key in [key for key in tensors if "wide" not in key and "tall" not in key]:
        for name, change in OTHER_SHAPES.items():
            tensor = tensors[key]
            if not tensor.ndim or (name == "a row less" and kind in COUNTED):
                continue
            bad = disk.write_adapter(tmp_path / "bad", config, {**tensors, key: change(tensor).contiguous()})
            try:
                surgery.merge(base.folder, bad, output=tmp_path / "merged", overwrite=True)
            except SurgeryError:
                continue
            found = disk.read_tensors(tmp_path / "merged")
            assert all(torch.equal(found[other], value) for other, value in sound.items()), (key, name)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "LN_TUNING"])  # which copies any module
def test_peft_has_the_kind_on_no_other_layer(kind: str, bases: dict[str, Base]) -> None:
    walk = KINDS[kind]
    tried = {name for layers in (*walk.layers, *walk.only) for name in layers.split(",")}
    fields = {**walk.fields, **next(iter(walk.options.values()))}
    for layers in ALL:
        if tried.isdisjoint(layers.split(",")):
            with peft_oracle.quiet():
                try:
                    base = bases.get(layers, bases[""])
                    model = wrapped(base, kind, layers, fields)
                    base.run(model)
                except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, NotImplementedError):
                    continue
            assert not any(parameter.requires_grad for parameter in model.parameters()), layers


def test_every_kind_and_every_field_that_is_looked_at_is_tried() -> None:
    known, prompts = (
        switches(),
        {name for name in CLASSES if "num_virtual_tokens" in CLASSES[name].__dataclass_fields__},
    )
    assert KINDS.keys() == CLASSES.keys() - NOT_READ.keys() - prompts - NOT_INSTALLED
    left = {}
    for kind, walk in KINDS.items():
        names = {entry.name for entry in dataclasses.fields(CLASSES[kind])}
        read = names & {*known[kind].understood, *known[kind].refused} - {"modules_to_save"}
        left[kind] = read - {name for case in CASES if case[0] == kind for name in case[3]} - walk.untried
    left["LORA"].discard("target_parameters")  # set for experts
    assert not any(left.values()), {kind: fields for kind, fields in left.items() if fields}
    assert [kind for kind, config in CLASSES.items() if "target_parameters" in config.__dataclass_fields__] == [
        "LORA",
        "ADALORA",  # which inherits the field and has no such layer
    ]
