# SPDX-License-Identifier: Apache-2.0
"""A configuration of other layers says of each layer what it was, as transformers understands it, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from surgery_formats.errors import FitError
from surgery_formats.models.rebuilt.layer_config import LayerConfig, layer_config
from surgery_formats.models.rebuilt.stack import COUNTS, LayerStack

COUNT = 12
ORDERS = ((1, 2, 5, 0, 7, 3), (0, 1, 2, 3, 4), (3, 4, 5, 6, 7, 8), (0, 1, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11))
NUMBERS = ("full_attn_idxs", "moe_layers", "rope_scaling_layers", "window_block_indexes")
"""Lists of numbers of layers."""
DEMANDS = ("not homogeneous", "must contain at least one")
"""What types of their own want of all layers together, and say."""


def by_layer(config: Any) -> dict[str, list[Any]]:
    """What a configuration has an entry for each layer of."""
    return {
        key: list(value)
        for key, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == COUNT and key not in NUMBERS
    }


def made(told: Mapping[str, Any], order: Sequence[int], contents: Sequence[Any] = (0,) * COUNT) -> LayerConfig:
    return layer_config(told, LayerStack("layers.", COUNT), order, contents)


def types() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every type of one stack that transformers makes with so many layers."""
    for name in CONFIG_MAPPING:
        try:
            cls = CONFIG_MAPPING[name]
            key = next((key for key in COUNTS if isinstance(cls().to_dict().get(key), int)), None)
            told = cls(**{key: COUNT}).to_dict() if key else {}
        except Exception:  # those that want more than that are not asked
            continue
        if told and not told.get("is_encoder_decoder"):
            yield name, cls, told


def test_layers_are_what_they_were_in_every_type_of_transformers():
    """Of what config.json lists, and of every list that it could leave out: by itself, and all of them."""
    wrong, right, refused = set(), set(), set()
    for name, cls, whole in types():
        lists = [key for key in by_layer(cls.from_dict(copy.deepcopy(whole))) if key in whole]
        for gone in ((), *((key,) for key in lists), tuple(lists)):
            told = {key: value for key, value in whole.items() if key not in gone}
            before = by_layer(cls.from_dict(copy.deepcopy(told)))
            contents = [
                repr([value[number] for key, value in before.items() if "mlp" in key]) for number in range(COUNT)
            ]
            for order in ORDERS:
                try:
                    found = made(copy.deepcopy(told), order, contents)
                except FitError:
                    refused.add(name)
                    continue
                try:
                    after = vars(cls.from_dict(copy.deepcopy(dict(found.config))))
                except Exception as error:  # what transformers cannot load is wrong
                    if not any(demand in str(error) for demand in DEMANDS):
                        wrong.add((name, gone, str(error)[:90]))
                    continue
                for key, value in before.items():
                    if list(after[key] or ()) != [value[number] for number in order]:
                        wrong.add((name, gone, key))
                right.add(name)
    assert not wrong
    assert len(right) > 100
    assert {"gemma2", "gemma3_text", "qwen2", "smollm3", "gpt_oss", "mixtral"} <= right - refused


@pytest.mark.parametrize(
    ("kind", "order", "warned"),
    [
        ("gemma2", (0, 1, 4, 5), False),
        ("gemma2", (0, 2, 1, 3), True),
        ("gpt_oss", (1, 2, 3), True),
        ("gemma3_text", (0, 1, 2), False),
        ("gemma3_text", (3, 4, 5), True),
        ("smollm3", (3, 4), True),
    ],
)
def test_a_list_that_no_longer_follows_the_pattern_is_told_of(kind: str, order: tuple[int, ...], warned: bool):
    """transformers 5 lists the types of all models; llama.cpp counts on the pattern all the same."""
    told = CONFIG_MAPPING[kind](num_hidden_layers=COUNT).to_dict()
    assert any(isinstance(told.get(key), list) for key in ("layer_types", "no_rope_layers"))
    assert bool(made(told, order).warnings) is warned


def test_a_list_that_never_followed_the_pattern_is_nobodys_surprise():
    told = {"model_type": "gemma2", "num_hidden_layers": COUNT, "layer_types": ["full_attention"] * COUNT}
    assert not made(told, (0, 2)).warnings


def test_settings_of_single_layers_go_by_the_new_numbers():
    told = {"num_hidden_layers": COUNT, "per_layer_config": {"02": {"head_dim": 8}, "11": {"head_dim": 4}}}
    found = made(told, (2, 0, 2, 11)).config["per_layer_config"]
    assert found == {"0": {"head_dim": 8}, "2": {"head_dim": 8}, "3": {"head_dim": 4}}
    with pytest.raises(FitError, match="a per_layer_config for other layers than the 12"):
        made(told | {"per_layer_config": {"12": {}}}, (0, 1))


def test_a_backbone_gives_out_its_last_layer_and_others_are_refused():
    told = CONFIG_MAPPING["dinov2"](num_hidden_layers=COUNT).to_dict()
    found = made(told, (0, 1, 5)).config
    assert (found["out_indices"], found["stage_names"][-1]) == ([3], "stage3")
    with pytest.raises(FitError, match="layers whose outputs are taken"):
        made(CONFIG_MAPPING["dinov2"](num_hidden_layers=COUNT, out_indices=[3, 12]).to_dict(), (0, 1, 5))


def test_gemma_4_ends_with_a_layer_that_attends_to_everything():
    """transformers makes it one, without a word in the model's output."""
    told = CONFIG_MAPPING["gemma4_text"](num_hidden_layers=COUNT).to_dict()
    assert made(told, (0, 1, 5)).config["layer_types"][-1] == "full_attention"
    with pytest.raises(FitError, match="the last layer would be one with a window"):
        made(told, (0, 1, 2))


def test_numbers_of_layers_that_are_not_known_are_refused():
    with pytest.raises(FitError, match="'odd_layer_ids', and whether it is one of layers is not known"):
        made({"num_hidden_layers": COUNT, "odd_layer_ids": [1, 3]}, (0, 1))
    told = {"num_hidden_layers": COUNT, "window_block_indices": [1, 3, 4]}
    assert made(told, (3, 0, 4)).config["window_block_indices"] == [0, 2]
