# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs.yml: what pages that are read on GitHub need to be pages of a site.

Links out of docs/ become links into the repository, the mark ``run`` of blocks that a test executes goes, two pages are made
(the list of decisions, and the reference of the public names), and the search gets a name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

__all__ = ["on_files", "on_page_markdown", "on_post_page", "on_post_template"]

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ("Result", "Report", "Diff", "Catalogue", "Verification")
RUN = re.compile(r"(?<=^```)(python|console) run$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(\.\.?/[^)\s#]*|adr)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "adr/index.md", content=decisions()))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, /, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """One page as the site has it."""
    source = DOCS / page.file.src_uri
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]  # it would list this page alone
    markdown = RUN.sub(r"\1", markdown)
    return LINK.sub(lambda link: _target(link[1], source.parent, str(config.repo_url)), markdown)


def on_post_page(output: str, /, *, page: Page, config: MkDocsConfig) -> str:
    """The theme's search has no name for those who do not see it."""
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"')


def on_post_template(output: str, /, *, template_name: str, config: MkDocsConfig) -> str:
    """The same of the page for what is not there."""
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"')


def _target(path: str, folder: Path, repository: str) -> str:
    """A link that leads out of docs/, as one into the repository; others as they are."""
    place = (folder / path).resolve()
    if place.is_relative_to(DOCS):
        return "adr/index.md" if place == DOCS / "adr" else path
    kind = "tree" if place.is_dir() else "blob"
    return f"{repository}/{kind}/main/{place.relative_to(ROOT).as_posix()}"


def decisions() -> str:
    """The list of the pages in docs/adr."""
    lines = ["# Decisions", "", "Each begins with the fault it cures, and says what else was weighed.", ""]
    for page in sorted((DOCS / "adr").glob("[0-9]*.md")):
        title = page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        lines.append(f"- [{title}]({page.name})")
    return "\n".join(lines) + "\n"


def reference() -> str:
    """What `surgery` and `surgery_formats` export, in four parts."""
    import surgery
    import surgery_formats

    groups: dict[str, list[str]] = {"Nouns": [], "Verbs": [], "Results": [], "Errors": [], "Parts": []}
    for name in surgery.__all__:
        if not name.startswith("_"):
            groups[_group(getattr(surgery, name))].append(f"surgery.{name}")
    groups["Parts"] = [f"surgery_formats.{name}" for name in surgery_formats.__all__ if name not in surgery.__all__]
    lines = [
        "# Python names",
        "",
        "Made from the docstrings. [In Python](api.md) shows how they are used together.",
        "",
    ]
    for title, names in groups.items():
        lines += [f"## {title}", "", *(f"::: {name}\n" for name in sorted(names, key=str.lower))]
    return "\n".join(lines)


def _group(value: Any) -> str:
    import surgery

    if not isinstance(value, type):
        return "Verbs"
    if issubclass(value, surgery.SurgeryError):
        return "Errors"
    return "Results" if value.__name__.endswith(RESULTS) else "Nouns"
