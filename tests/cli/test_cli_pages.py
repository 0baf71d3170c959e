# SPDX-License-Identifier: Apache-2.0
"""``--html`` and ``--csv``: what the screen shows as files, which replace nothing that they were not asked to."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import click
import pytest

import surgery
from surgery_cli.group import COMMANDS
from surgery_cli.group import surgery as program
from tests.support.kit import Run
from tests.support.page_reader import check_page

LORA, BASE = str(Path("examples/lora").resolve()), str(Path("examples/base").resolve())
PAGES = (
    "report",
    "inspect",
    "extract-lora",
    "diff",
    "verify",
    "eval",
    "check",
    "merge",
    "convert",
    "combine",
    "layers",
    "bench",
    "strip",
    "apply",
    "prompt show",
    "prompt nearest",
    "prompt bake",
    "prompt combine",
    "prompt convert",
    "prompt transfer",
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(run: Run, code: int, *words: str) -> str:
    result = run(*words)
    assert result.exit_code == code, result.stderr
    return result.stderr


@pytest.mark.parametrize("name", PAGES)
def test_commands_whose_result_can_be_looked_at(name):
    command: click.Command = program
    for word in name.split():
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None
        command = found
    names = [param.name for param in command.params]
    assert {"html_file", "csv_file"} <= set(names)
    assert names.count("overwrite") == 1
    assert names.index("csv_file") > names.index("html_file")
    assert name.partition(" ")[0] in COMMANDS


def test_the_page_is_the_summary_that_the_screen_shows(run: Run):
    shown = run("report", LORA, "--base", BASE, "--html", "a.html", "--csv", "a.csv", "--md", "a.md")
    summary = surgery.report(LORA, base=BASE).summary()
    assert Path("a.html").read_text() == summary.asked("report", ["lora"]).as_html()
    assert Path("a.md").read_text() == summary.as_markdown()
    with Path("a.csv").open(newline="") as file:
        assert next(csv.reader(file))[0] == "adapter"
    assert shown.stdout == run("report", LORA, "--base", BASE).stdout
    assert shown.stderr == "wrote a.html\nwrote a.csv\nwrote a.md\n"


def test_a_page_names_what_the_command_was_given(run: Run):
    Path("base").symlink_to(BASE)
    run("merge", "base", f"{LORA}=0.5", "-o", "merged", "--html", "merge.html")
    shown = run("diff", BASE, "merged", "--html", "diff.html").stdout
    assert [line.split() for line in shown.splitlines()[:2]] == [["A", "base"], ["B", "merged"]]
    assert run("diff", LORA, LORA, "--html", "same.html").stdout.startswith("A ")
    run("verify", "merged", "--html", "verify.html")
    run("prompt", "show", str(Path(LORA).parent / "prompt"), "--html", "prompt.html")
    pages = {
        name: check_page(Path(f"{name}.html").read_text()) for name in ("merge", "diff", "same", "verify", "prompt")
    }
    assert {name: page.all("title")[0].text for name, page in pages.items()} == {
        "merge": "Merge: base, lora",
        "diff": "Differences: base, merged",
        "same": "Differences: lora",
        "verify": "Verification: merged",
        "prompt": "prompt",
    }
    assert "Written by surgery prompt show, version" in pages["prompt"].all("footer")[0].text


def test_quiet_and_json_write_it_too(run: Run):
    assert run("inspect", LORA, "-q", "--html", "a.html").stderr == ""
    told = run("inspect", LORA, "--json", "--html", "b.html")
    assert json.loads(told.stdout)["command"] == "inspect"
    assert check_page(Path("a.html").read_text()).all("table")
    assert Path("a.html").read_bytes() == Path("b.html").read_bytes()


def test_all_of_it_is_there_with_v(run: Run):
    run("inspect", LORA, "--html", "a.html")
    run("inspect", LORA, "-v", "--html", "b.html")
    few, all_ = (len(check_page(Path(name).read_text()).all("tr")) for name in ("a.html", "b.html"))
    assert all_ > few


def test_nothing_is_replaced_unasked_and_nothing_computed_before_that_is_known(run: Run):
    Path("a.html").write_text("mine")
    failed = refused(run, 2, "merge", BASE, LORA, "-o", "out", "--html", "a.html")
    assert "a.html: already exists" in failed
    assert not Path("out").exists()
    assert Path("a.html").read_text() == "mine"
    run("merge", BASE, LORA, "-o", "out", "--html", "a.html", "--overwrite")
    assert len(check_page(Path("a.html").read_text()).all("figure")) == 2
    run("inspect", LORA, "--csv", "a.csv")
    refused(run, 2, "inspect", LORA, "--csv", "a.csv")
    run("inspect", LORA, "--csv", "a.csv", "--overwrite")


@pytest.mark.parametrize(
    ("page", "code", "said"),
    [("/proc/a.html", 7, "/proc/a.html: cannot be written"), ("s3://bucket/a.html", 4, "use a folder of a disk")],
)
def test_a_place_that_cannot_be_written_is_noticed_before_anything_is_computed(run: Run, page, code, said):
    assert said in refused(run, code, "merge", BASE, LORA, "-o", "out", "--html", page)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--html", "model.safetensors"), 2, "the name of the file ends in .html"),
        (("--csv", "a.html"), 2, "the name of the file ends in .csv"),
        (("--html", "no/a.html"), 3, "no such folder to write into"),
        (("--html", ""), 2, "the path is empty"),
        (("--html", "lora/a.html", "--overwrite"), 4, "the output lies in the input"),
    ],
)
def test_names_that_are_refused(run: Run, words, code, said):
    Path("lora").symlink_to(LORA)
    assert said in refused(run, code, "inspect", "lora", *words)


def test_a_page_that_the_disk_cannot_hold_ends_with_its_own_code(run: Run):
    Path("a.html").mkdir()
    assert "already exists" in refused(run, 2, "inspect", LORA, "--html", "a.html", "--overwrite")


def test_the_page_of_a_recipe_has_what_each_step_says_with_v(run: Run):
    Path("base").symlink_to(BASE)
    Path("r.yaml").write_text(
        f"inputs: {{base: base, lora: {LORA}}}\nsteps:\n  - {{verb: merge, base: base, adapters: lora, output: out}}\n"
    )
    run("apply", "r.yaml", "-v", "--html", "a.html")
    assert len(check_page(Path("a.html").read_text()).all("figure")) == 2
    words = ("apply", "r.yaml", "--dry-run", "--input", "base=base", "--html", "base/a.html")
    assert "the output lies in the input base" in refused(run, 4, *words)


def test_json_has_what_pages_draw(run: Run):
    def told(*words: str) -> dict[str, object]:
        result = run(*words, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)["result"]

    run("resize", LORA, "--rank", "4", "-o", "less")
    assert len(told("inspect", LORA, "--spectrum")["deltas"]) == 42
    assert told("diff", LORA, "less")["modules"][0]["conflict"]["inputs"] == pytest.approx(1)
    assert len(told("combine", LORA, "less", "--dry-run")["conflicts"]) == 42
    run("merge", BASE, LORA, "-o", "merged")
    values = [tensor["values"] for tensor in told("diff", BASE, "merged", "--intruders")["tensors"]]
    assert sum("intruders" in value for value in values if value) == 42
    table = told("extract-lora", BASE, "merged", "--dry-run", "--table")["table"]
    assert table[-1]["layers"] == "auto"
