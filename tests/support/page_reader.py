# SPDX-License-Identifier: Apache-2.0
"""An HTML page read strictly: every element that needs an end has one, and what a page of ours promises is looked at."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

__all__ = ["Element", "check_page", "read_page"]

_VOID = frozenset(("meta", "link", "br", "img", "input", "hr"))
_TAGS = (
    "html head meta title style body main h1 footer div p strong code span dl dt dd table caption thead tbody tr th td figure "
    "figcaption svg desc path line rect text ul li details summary pre"
)
_ATTRIBUTES = (
    "lang charset http-equiv content name class role tabindex aria-label aria-hidden viewbox scope open x y x1 x2 y1 y2 width "
    "height d text-anchor transform"
)


@dataclass
class Element:
    """An element with what is in it; `text` is that of all its descendants."""

    tag: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, *tags: str) -> list[Element]:
        """Descendants with one of these tags, in order."""
        found = []
        for child in self.children:
            found += [child] if child.tag in tags else []
            found += child.all(*tags)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> ends <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:40]}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"an instruction: {data[:40]}")


def read_page(text: str) -> Element:
    """The root of a page, or of a fragment."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root], [element.tag for element in reader.open]
    return reader.root


def check_page(text: str, *, whole: bool = True) -> Element:
    """What holds for every page: nothing acts, nothing is loaded, and everything is told in words."""
    root = read_page(text)
    for element in root.all(*{entry.tag for entry in _every(root)}):
        assert element.tag in _TAGS.split(), element.tag
        assert element.attributes.keys() <= set(_ATTRIBUTES.split()), element.attributes
    (style,) = root.all("style")
    assert not re.search(r"url\(|@import|expression|</", style.text)
    if whole:
        _check_head(text, root, style)
    for table in root.all("table"):
        (caption,) = table.all("caption")
        assert caption.text.strip()
        headings = table.all("thead")[0].all("th")
        assert all(heading.attributes["scope"] == "col" and heading.text.strip() for heading in headings)
        for row in table.all("tbody")[0].all("tr"):
            cells = row.all("th", "td")
            assert len(cells) == len(headings)
            assert all(cell.attributes["scope"] == "row" and cell.text.strip() for cell in cells if cell.tag == "th")
    for figure in root.all("figure"):
        assert figure.all("figcaption")[0].text.strip()
        assert len(figure.all("table")) == 1
    for picture in root.all("svg"):
        if picture.attributes.get("aria-hidden") == "true":
            continue
        assert picture.attributes["role"] == "img"
        assert picture.attributes["aria-label"] == picture.children[0].text
        assert [child.tag for child in picture.children[:2]] == ["title", "desc"]
    return root


def _check_head(text: str, root: Element, style: Element) -> None:
    assert text.startswith("<!DOCTYPE html>\n")
    assert root.children[0].attributes["lang"] == "en"
    assert len(root.all("h1")) == 1
    policy = next(meta.attributes["content"] for meta in root.all("meta") if "http-equiv" in meta.attributes)
    digest = base64.b64encode(hashlib.sha256(style.text.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _every(element: Element) -> list[Element]:
    return [inner for child in element.children for inner in (child, *_every(child))]
