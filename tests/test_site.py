# SPDX-License-Identifier: Apache-2.0
"""The site that `make docs` builds: without a warning, with every page of docs/, and asking no other server for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import surgery

pytest.importorskip("material", reason="the extra docs is not installed")
pytest.importorskip("mkdocstrings_handlers.python", reason="the extra docs is not installed")

ROOT = Path(__file__).resolve().parents[1]
QUIET = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # Material's word on its successor
FETCHED = re.compile(r"<(?:script|img|link(?=[^>]*rel=\"?(?:stylesheet|preconnect|icon)))[^>]*(?:src|href)=\"?https?:")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=QUIET)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def test_every_page_is_there(site: Path):
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        assert (site / ("" if name.name == "index" else name) / "index.html").is_file(), name


def test_no_page_asks_another_server(site: Path):
    assert [page for page in site.rglob("*.html") if FETCHED.search(page.read_text())] == []
    assert FETCHED.search('<link rel="stylesheet" href="https://fonts.example/a.css">')  # it can fail
    assert not (site / "theme").exists()


def test_the_reference_has_every_public_name(site: Path):
    page = (site / "reference" / "index.html").read_text()
    assert [name for name in surgery.__all__ if name[0] != "_" and f'id="surgery.{name}"' not in page] == []


def test_the_search_has_a_name_for_those_who_do_not_see_it(site: Path):
    dialogs = [
        tag for page in site.rglob("*.html") for tag in re.findall(r"<[^>]*role=.?dialog[^>]*>", page.read_text())
    ]
    assert len(dialogs) > 10
    assert [tag for tag in dialogs if "aria-label" not in tag] == []


def test_every_page_has_the_script_that_lets_the_keyboard_scroll(site: Path):
    script = (site / "site.js").read_text()
    assert "pre > code" in script
    assert ".md-typeset__scrollwrap" in script
    assert [page for page in site.rglob("index.html") if "site.js" not in page.read_text()] == []


def test_marks_for_the_tests_are_not_shown(site: Path):
    assert "console run" not in (site / "tutorial" / "index.html").read_text()
