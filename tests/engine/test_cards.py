# SPDX-License-Identifier: Apache-2.0
"""Model cards: what huggingface_hub's own classes read in them and would write, whatever the base's card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCardData
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.engine.card_yaml import fenced, read_metadata
from tests.support.cards import check_card
from tests.support.kit import ROOT, environment, make_base, make_lora, spawn

KEYS = (
    "base_model",
    "license",
    "license_name",
    "language",
    "library_name",
    "pipeline_tag",
    "base_model_relation",
    "thumbnail",
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=30)
OTHER_THINGS = [
    "no",
    "yes",
    "true",
    "1.0",
    "0x1f",
    "1e3",
    "null",
    "~",
    "2024-01-01",
    "a: b",
    "- a",
    "# a",
    "'",
    '"',
    "é",
    "<",
    "=",
    "12:30",
]
WORDS = st.one_of(TEXTS, st.sampled_from(OTHER_THINGS))
LISTS = st.lists(WORDS, min_size=1, max_size=3, unique=True)
METADATA = st.builds(
    lambda fields, tags: fields | {"tags": tags}, st.dictionaries(st.sampled_from(KEYS), st.one_of(WORDS, LISTS)), LISTS
)


@given(METADATA)
def test_metadata_is_written_as_huggingface_hub_writes_it(metadata: dict[str, object]) -> None:
    written = fenced(metadata)
    assert written == f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n"
    if json.dumps(metadata, ensure_ascii=False).isprintable():  # PyYAML folds U+0085 and the like when it reads them
        assert yaml.safe_load(written[4:-4]) == metadata


@given(st.dictionaries(st.sampled_from(KEYS), st.lists(WORDS.filter(str.isprintable), min_size=1, max_size=3)))
def test_what_was_written_is_read(metadata: dict[str, object]) -> None:
    assert read_metadata(fenced(metadata) + "# A model\n") == metadata


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("language: no", {"language": "no"}),
        ("license: 'mit' # as it was", {"license": "mit"}),
        ("inference: false\nlicense_name: '1.0'\nsize: 1.5", {"inference": False, "license_name": "1.0", "size": 1.5}),
        ("date: 2024-01-01", {"date": "2024-01-01"}),
        ("empty:\nlicense: mit", {"license": "mit"}),
        ("license: \"a\\x1b[2Jb\"\nlanguage: en", {"language": "en"}),
        ("license: \"mit\u202e\"\nlanguage: en", {"language": "en"}),
        ("a: &a [x]\nb: *a", {}),
        ("a: !!python/object/apply:os.system ['true']", {}),
        ("license: [", {}),
        ("- a\n- b", {}),
        (f"a: {'[' * 5000}", {}),
        (f"a: {'[' * 9}x{']' * 9}", {}),
        ("a: [" + "x," * 30_000 + "]", {}),
        ("? [a]\n: b", {}),
        ("1: b\nlicense: mit", {"license": "mit"}),
    ],
)  # fmt: skip
def test_what_a_foreign_card_says_is_data(text: str, read: dict[str, object]) -> None:
    assert read_metadata(f"---\n{text}\n---\n# x\n") == read


def test_what_is_no_head_is_none() -> None:
    assert read_metadata("# A model\n---\nlicense: mit\n---\n") == {}
    assert read_metadata("---\nlicense: mit\n") == {}
    assert read_metadata("") == {}


HOSTILE = """---
license: "mit\\n---\\n# not a title"
language: no
pipeline_tag: {a: b}
tags: evil`|<script>
license_link: "https://example.org/|`<img>"
base_model: someone/else
---
# The base
"""


@pytest.mark.parametrize("carded", [False, True], ids=["no card", "a hostile card"])
def test_every_card_is_one_for_huggingface_hub(carded: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    loras = [make_lora(tmp_path / name) for name in ("a`|<b>", "b")]
    if carded:
        (base / "README.md").write_text(HOSTILE)
    surgery.merge(base, loras, output=tmp_path / "merged")
    surgery.combine(loras, output=tmp_path / "combined", base=base)
    surgery.resize(loras[0], rank=2, output=tmp_path / "resized")
    surgery.convert(loras[0], "mlx", output=tmp_path / "mlx", base=base)
    surgery.convert(tmp_path / "mlx", "peft", output=tmp_path / "converted", base=base)
    surgery.extract_lora(base, tmp_path / "merged", rank=8, output=tmp_path / "extracted")
    for name, relation in {
        "merged": None,
        "combined": None,
        "resized": None,
        "converted": None,
        "extracted": None,
    }.items():
        card = tmp_path / name / "README.md"
        data = check_card(card)
        assert data.library_name == ("transformers" if name == "merged" else "peft")
        assert data.get("base_model_relation") is relation  # these folders have no name on the hub
        assert data.license is None
        assert data.language == ("no" if carded and name != "resized" else None)
        assert data.pipeline_tag == "text-generation"
        assert "|" not in card.read_text().split("# ")[-1].split("\n")[0].replace("\\|", "")
        assert "\n# not a title" not in card.read_text()
        surgery.verify(tmp_path / name)


def test_the_base_is_named_with_its_relation(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--base" / "snapshots" / "0123"
    cache.parent.mkdir(parents=True)
    make_base(cache)
    (cache / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, no]\ntags: [chat]\n---\n")
    lora = make_lora(tmp_path / "lora", base_model_name_or_path="org/base")
    surgery.merge(cache, lora, output=tmp_path / "merged")
    surgery.combine([(lora, 0.5)], output=tmp_path / "combined", base=cache)
    surgery.resize(lora, rank=2, output=tmp_path / "resized")
    (lora / "README.md").write_text("---\nlicense: mit\nbase_model: its/own\n---\n")
    surgery.convert(lora, "peft", output=tmp_path / "converted", base=cache)
    told = {name: check_card(tmp_path / name / "README.md") for name in ("merged", "combined", "resized", "converted")}
    assert {data.base_model for data in told.values()} == {"org/base"}
    assert [data.get("base_model_relation") for data in told.values()] == ["merge", "adapter", "adapter", "adapter"]
    assert [data.license for data in told.values()] == ["apache-2.0", "apache-2.0", None, "mit"]
    assert told["merged"].language == ["en", "no"]
    assert told["merged"].tags == ["merge", "chat"]


def test_a_card_is_the_same_with_the_extra_and_without(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['huggingface_hub'] = None\n")
    base, lora = ROOT / "examples" / "base", ROOT / "examples" / "lora"
    surgery.merge(base, lora, output=tmp_path / "with")
    path = {"PYTHONPATH": f"{tmp_path}:{environment()['PYTHONPATH']}"}
    done = spawn("merge", base, lora, "-o", tmp_path / "without", **path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "with" / "README.md").read_bytes() == (tmp_path / "without" / "README.md").read_bytes()
