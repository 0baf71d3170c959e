# SPDX-License-Identifier: Apache-2.0
"""Rules of the house that no linter knows, as ``tools/house.py`` counts them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tools.house import (
    Module,
    circles,
    function_lengths,
    import_graph,
    kind_tests,
    read_modules,
    reused_classes,
    silent_tests,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def product() -> dict[str, Module]:
    return read_modules(ROOT)


def test_only_formats_test_for_a_kind_of_update_and_nothing_for_a_kind_of_storage(product: dict[str, Module]) -> None:
    tests = kind_tests(product)
    assert {name: count for name, count in tests.items() if ".adapters." not in name} == {}


@pytest.mark.parametrize(
    "test",
    [
        "isinstance(update, LoRA)",
        "isinstance(update, int | LoRA)",
        "type(update) is LoRA",
        "update.kind == 'LoRA'",
        "update.kind == LoRA.kind",
        "update.kind in ('LoRA', 'DoRA')",
        "[u for u in chain if isinstance(u, (str, LoRA))]",
    ],
)
def test_a_test_for_a_kind_is_counted(test: str, tmp_path: Path) -> None:
    updates = "class LoRA:\n    kind: ClassVar[str] = 'LoRA'\n"
    for name, text in {"formats/surgery_formats/updates/lora.py": updates, "surgery/one.py": f"x = {test}\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert kind_tests(read_modules(tmp_path)) == {"surgery.one": 1}


def test_every_class_has_a_name_of_its_own_and_no_imports_form_a_circle(product: dict[str, Module]) -> None:
    assert reused_classes(product) == {}
    assert circles(import_graph(product)) == []


def test_no_file_is_longer_than_400_lines() -> None:
    rooms = ("surgery", "formats", "cli", "tests", "tools", "benchmarks", "examples", "findings")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert {str(path.relative_to(ROOT)): lines for path in files if (lines := path.read_text().count("\n")) > 400} == {}


def test_every_function_fits_on_a_screen() -> None:
    """60 lines beside the docstring; a longer one is several stages, or knows what its parts should know."""
    lengths = function_lengths(read_modules(ROOT))
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}


def test_lines_of_a_function_are_those_of_its_body(tmp_path: Path) -> None:
    (tmp_path / "surgery").mkdir()
    body = "    if x:\n\n        # why\n        return (\n            x\n        )\n    return 0\n"
    text = f'def bare(x):\n{body}\n\ndef told(x):\n    """Say.\n\n    More.\n    """\n{body}\n\ndef empty():\n    """."""\n'
    (tmp_path / "surgery/one.py").write_text(text)
    assert [*function_lengths(read_modules(tmp_path)).values()] == [7, 7, 0]


def test_every_test_asserts_something() -> None:
    """Not to raise is no claim: a test that only runs the product passes, whatever comes out."""
    assert silent_tests(ROOT) == []


def test_a_test_that_asserts_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        "def helper(x):\n    other(x)\ndef other(x):\n    assert x\ndef test_a():\n    helper(1)\ndef test_b():\n    run(1)\n"
        "def test_c():\n    with pytest.raises(ValueError):\n        run(1)\ndef test_d():\n    numpy.testing.assert_equal(1, 1)\n"
    )
    assert silent_tests(tmp_path) == ["tests/test_it.py: test_b"]


def test_every_file_of_tests_has_a_name_of_its_own() -> None:
    """pytest takes two of one name for the same module, and collects neither: a run of both rooms ends before it begins."""
    times = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in times.items() if count > 1] == []


def test_every_decision_has_a_number_of_its_own() -> None:
    """Two branches that each take the next free number meet here."""
    files = sorted((ROOT / "docs/adr").glob("*.md"))
    numbers = [int(file.name.partition("-")[0]) for file in files]
    assert [number for number, times in Counter(numbers).items() if times > 1] == []
    wrong = [
        file.name
        for file, number in zip(files, numbers, strict=True)
        if not file.read_text().startswith(f"# {number}. ")
    ]
    assert wrong == []
