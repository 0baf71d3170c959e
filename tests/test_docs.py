# SPDX-License-Identifier: Apache-2.0
"""The documents say what is true: examples run, links resolve, the command line's page is the command line's help."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import surgery
from surgery_cli.group import COMMANDS
from surgery_cli.group import surgery as surgery_command
from surgery_formats.adapters.registry import BUILT_IN
from surgery_formats.containers.registry import BUILT_IN as CONTAINERS
from tests.oracles.cases import CASES
from tests.support.base_merges import COMBINATIONS as BASES
from tests.support.bases import KINDS as KINDS_OF_BASES
from tests.support.bases import LAYOUTS
from tests.support.exported_types import page as page_of_types
from tests.support.fp8_bases import FP8_COMBINATIONS, STYLES, WAYS
from tests.support.peft_kinds import COMBINATIONS, KINDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "examples" / "README.md"])
RUN = re.compile(r"^```(python|console) run\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)

# Folders of the machines this is made on; the tools of a finished project have no business with them. One is in our images.
MACHINE = re.compile(r"(?<![\w./-])/(?!tmp/huggingface\b)(?:root|work|tmp|home/\w+|Users/\w+)/[\w.-]+")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def script(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look their types up
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_command_line_is_its_help():
    made = script("docs/make_cli.py")
    assert made.PAGE.read_text(encoding="utf-8") == made.render(), "run: python docs/make_cli.py"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str):
    assert f"## surgery {command}\n" in (ROOT / "docs" / "cli.md").read_text()
    assert f"`surgery {command}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("format", BUILT_IN, ids=lambda one: one.name)
def test_every_format_is_documented(format):
    """In the table that a newcomer begins with, with what it takes to write it."""
    page = (ROOT / "docs" / "formats.md").read_text().partition("## Find yours\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in page.splitlines() if row.startswith("| ")]
    needs = [row[3] for row in rows if f"`{format.name}`" in row[2]]
    assert needs
    assert needs[0] == ("`--base`" if format.needs_base else "")


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda one: one.name)
def test_every_container_is_documented_as_it_is_written(container):
    row = re.search(
        rf"^\| `{container.name}` \|[^|]*\| yes \| (.*) \|$", (ROOT / "docs" / "formats.md").read_text(), re.M
    )
    assert row
    assert row[1].startswith("yes" if container.written_as == container.name else f"as `{container.written_as}`")


def test_the_page_of_kinds_is_of_the_combinations_that_are_tested():
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (\d+) \| (\d+) \|", (ROOT / "docs" / "kinds.md").read_text(), re.M)
    told = {kind: (layers, int(count), int(types)) for kind, layers, count, types in rows}
    for kind in KINDS:
        own = [one for one in COMBINATIONS if one.kind is kind]
        layers = ", ".join(dict.fromkeys(one.layer for one in own))
        assert told.pop(kind.name) == (layers, len(own), len({one.model_type for one in own})), "tools/kinds_page.py"
    assert not told


def test_the_page_of_bases_is_of_the_combinations_that_are_tested():
    page = (ROOT / "docs" / "bases.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+) \| (?:none|`[^|]+`) \| [^|]+ \| (.+) \|$", page, re.M))
    for network, kind in KINDS_OF_BASES.items():
        for cell, layout in zip(rows.pop(kind.title).split(" | "), LAYOUTS, strict=True):
            own = [one for one in BASES if (one.network, one.layout) == (network, layout)]
            assert cell == str(len(own)), "tools/bases_page.py"
    assert rows.keys() <= STYLES.keys()  # of the other table
    for style in STYLES:
        (counts,) = re.findall(rf"^\| {style} \| [^|]+ \| (.+) \|$", page, re.M)
        assert [int(count) for count in counts.split(" | ")] == [
            len([one for one in FP8_COMBINATIONS if (one.style, one.way) == (style, way)]) for way in WAYS
        ]


def test_the_page_of_model_types_is_of_the_cases_that_are_tested():
    assert (ROOT / "docs" / "models.md").read_text() == page_of_types(), "python tools/models_page.py"


def test_the_container_in_the_guide_is_the_one_in_the_tests():
    toy = (ROOT / "tests" / "plugins" / "toy_container" / "toy_container.py").read_text()
    assert toy[toy.index("import json") :].rstrip() in (ROOT / "docs" / "adding.md").read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if RUN.search(page.read_text())], ids=name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The blocks of one page, in order: programs of their own, and sessions, in a folder where `examples` lies."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    for found in RUN.finditer(text):
        if found[1] == "console":
            for command in found[2].split("$ surgery ")[1:]:
                words, _, shown = command.partition("\n")
                ran = says(words, shown)
                refused = re.search(r"^error: |^verdict +(?!honoured| )", shown, re.MULTILINE)
                assert (ran.exit_code == 0) == (not refused), f"{page}: surgery {words}\n{ran.output}"
            continue
        line = text[: found.start(2)].count("\n")
        # so that a traceback shows the page's line
        code = compile("\n" * line + found[2], str(page), "exec", dont_inherit=True)
        exec(code, {"__name__": "example"})


def says(words: str, shown: str) -> Result:
    """Runs a command of a session. It must say every line that is shown, but for times; ``...`` stands for lines left out."""
    ran = CliRunner().invoke(surgery_command, shlex.split(words), prog_name="surgery")
    said = [untimed(line) for line in ran.output.splitlines()]
    missing = [line for line in shown.splitlines() if line not in ("", "...") and untimed(line) not in said]
    assert missing == [], f"surgery {words} says:\n{ran.output}"
    return ran


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example, and the two faulty adapters that the README shows."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    tensors = load_file(tmp_path / "examples" / "lora" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight"
    for folder, changed in (("wrong-base-lora", {key: torch.zeros(8, 99)}), ("half-a-lora", {key: None})):
        shutil.copytree(tmp_path / "examples" / "lora", tmp_path / folder)
        kept = {one: value for one, value in (tensors | changed).items() if value is not None}
        save_file(kept, tmp_path / folder / "adapter_model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_shows_what_the_command_says(shipped: Path):
    sessions = [block for block in FENCED.findall((ROOT / "README.md").read_text()) if "$ surgery" in block]
    commands = [part for block in sessions for part in block.strip("`\n").split("$ surgery ")[1:]]
    assert len(commands) == 12
    for part in commands:
        words, _, shown = part.partition("\n")
        shutil.rmtree("merged", ignore_errors=True)
        ran = says(words, shown)
        assert ran.exit_code in (0, 3, 4), ran.output
        assert Path("merged").exists() == (ran.exit_code == 0 and words.startswith("merge"))


def untimed(line: str) -> str:
    return re.sub(r"in \d+\.\d\d s$", "in ... s", line).rstrip()


def test_the_readme_and_the_guides_have_examples():
    assert {name(page) for page in PAGES if RUN.search(page.read_text())} >= {
        "README.md",
        "docs/adding.md",
        "docs/guarantees.md",
        "docs/precision.md",
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path):
    broken = []
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        where = page if not path else (page.parent / path)
        if not where.exists() or (anchor and anchor not in anchors(where)):
            broken.append(target)
    assert broken == []


def test_every_home_of_a_word_is_there():
    """The last column of the glossary: files and folders, from the top or from inside a package."""
    cells = re.findall(r"\| ([^|\n]*) \|$", (ROOT / "docs/words.md").read_text(), re.MULTILINE)
    homes = {home for cell in cells for home in re.findall(r"`([^`]+)`", cell)}
    packages = [ROOT / folder for folder in (".", "formats", "formats/surgery_formats", "surgery", "cli/surgery_cli")]
    assert len(homes) > 100
    assert [home for home in sorted(homes) if not any([*package.glob(home)] for package in packages)] == []


_NAMING = ["CONTRIBUTING.md", "docs/adding.md", "docs/words.md", "docs/guarantees.md", "tools/reader_questions.md"]


@pytest.mark.parametrize("page", _NAMING)
def test_every_file_that_is_named_is_there(page: str):
    """Names in backticks that have a slash and an ending; from the top, or from any folder."""
    text = FENCED.sub("", (ROOT / page).read_text())
    named = {
        one
        for code in re.findall(r"`([^`\n]+)`", text)
        for one in re.findall(r"[\w./-]+/[\w-]+\.(?:py|md|toml|ipynb)", code)
    }
    folders = ["docs", "examples", "surgery", "formats", "cli", "tests", "tools", "findings", "benchmarks"]
    there = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.*")}
    assert named
    assert [one for one in sorted(named) if not any(path == one or path.endswith(f"/{one}") for path in there)] == []


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_counts_no_more_merges_than_there_are():
    said = re.search(r"more than (\d+) merges \((\d+) model classes", (ROOT / "README.md").read_text())
    assert said is not None
    assert int(said[1]) < len(CASES)
    assert int(said[2]) <= len({case.arch for case in CASES.values()})


def test_the_readme_shows_what_the_changelog_and_the_code_call_this_version():
    assert f"## [{surgery.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_first_screen_has_the_two_commands():
    first = (ROOT / "README.md").read_text().splitlines()[:15]
    assert any(line.startswith("make demo") for line in first)
    assert any(line.startswith("make test") for line in first)


def test_the_first_picture_is_of_what_the_commands_give(tmp_path: Path):
    """With the numbers of this tree; `python tools/first_picture.py` draws it again."""
    first_picture = script("tools/first_picture.py")
    assert first_picture.PICTURE.read_text() == first_picture.draw(first_picture.jobs(tmp_path))


def test_the_page_of_the_comparison_has_what_was_observed():
    """Every row, in the words in which `benchmarks/peers.py` found it again."""
    page = (ROOT / "docs" / "comparison.md").read_text()
    observed = json.loads((ROOT / "benchmarks" / "peers_expected.json").read_text())
    for rows in observed.values():
        for title, cells in rows.items():
            assert f"| {title} | {' | '.join(cells.values())} |" in page, "paste what it prints"


def test_exit_codes_are_the_commands_own():
    told = re.compile(r"Exit codes: (.*?)130\s+interrupted", re.DOTALL)

    def codes(text: str) -> list[str]:
        return re.findall(r"\b\d+\b", told.search(text)[1])

    assert codes((ROOT / "README.md").read_text()) == codes((ROOT / "docs" / "cli.md").read_text())


def tracked() -> list[Path]:
    """Files of the repository; without git, every file that could be one."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(words, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        folders = ("surgery", "formats", "cli", "docs", "tests", "examples", "benchmarks")
        listed = [str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*")]
        listed += [path.name for path in ROOT.glob("*.*")]
    return [ROOT / one for one in listed if one and (ROOT / one).is_file() and "__pycache__" not in one]


def test_no_file_names_a_folder_of_the_machine_it_was_made_on():
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" in data[:4096]:
            continue
        found += [f"{name(path)}: {hit}" for hit in MACHINE.findall(data.decode("utf-8", "replace"))]
    assert found == []


def test_machine_folders_are_recognised():
    """The test above can fail."""
    for folder in ("root", "work", "tmp", "home/me", "Users/me"):
        assert MACHINE.search(f'path = "/{folder}/thing.py"')
        assert MACHINE.search(f"/{folder}/huggingfaces")
    assert not MACHINE.search("https://example.org/work/thing and a/root/b; HF_HOME=/tmp/huggingface")
