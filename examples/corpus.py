# SPDX-License-Identifier: Apache-2.0
"""The texts of the example: two kinds that every Python installation carries.

* *source*: program code, the modules and tests of the standard library without their docstrings;
* *target*: English prose with reST mark-up, the language reference behind ``help("while")``
  (``pydoc_data/topics.py``) and, for training alone, those docstrings.

The held-out files and topics are named here. They were drawn once, by the SHA-256 of their names, from the
library modules of 4 to 14 kB (without a licence notice of their own) and from all topics. Training texts that
repeat held-out text elsewhere are left out as well.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HELD_OUT_MODULES", "HELD_OUT_TOPICS", "Corpus", "load_corpus"]

HELD_OUT_MODULES = (
    "sched.py",
    "copyreg.py",
    "xml/sax/xmlreader.py",
    "email/contentmanager.py",
    "idlelib/autocomplete.py",
    "email/_encoded_words.py",
    "opcode.py",
    "timeit.py",
    "dbm/__init__.py",
)
HELD_OUT_TOPICS = (
    "numeric-types",
    "with",
    "while",
    "power",
    "class",
    "augassign",
    "for",
    "specialattrs",
    "bltin-null-object",
    "break",
    "sequence-types",
    "await",
    "try",
    "typesseq",
)
# Not text for this purpose: other people's packages, the target text itself, tables of character codes.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "pydoc_data", "encodings", "__pycache__"})
_DEV_MODULES, _DEV_TOPICS = 0.03, 0.25  # shares set aside to choose the best step; never the held-out texts
_LONG_LINE = 40  # characters; shorter lines repeat by chance
_REMOVED = "\0"  # no line of a source file: Python refuses null bytes
_SHARED_LINES = 8  # this many long lines in common with a held-out text make a file a near copy of it


@dataclass(frozen=True)
class Corpus:
    """Texts by purpose; every item is one document."""

    source_train: tuple[str, ...]
    source_dev: tuple[str, ...]
    source_held_out: str
    target_train: tuple[str, ...]  # topics of the language reference
    docstrings: tuple[str, ...]  # of the modules in source_train, tests excepted
    target_dev: tuple[str, ...]
    target_held_out: str


def _is_dev(name: str, share: float) -> bool:
    return int(hashlib.sha256(f"dev {name}".encode()).hexdigest()[:8], 16) < share * 2**32


def _dev_topics(topics: dict[str, str]) -> list[str]:
    """Small ones, since the few long topics are most of the training text."""
    return [name for name in sorted(topics) if len(topics[name]) < 8000 and _is_dev(name, _DEV_TOPICS)]


def _long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= _LONG_LINE}


def _modules(stdlib: Path) -> dict[str, tuple[str, str]]:
    """Code and docstrings of every readable ``.py`` file of the library, by its path inside it."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or "_sysconfigdata" in path.name:
            continue
        try:
            found[relative.as_posix()] = _split(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, SyntaxError):
            continue  # some test files are deliberately not UTF-8 or not Python
    return found


def _split(source: str) -> tuple[str, str]:
    """A module's code without docstrings, and the docstrings that have more than one line."""
    lines, docs = source.split("\n"), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if (doc := ast.get_docstring(node)) is None:
            continue
        if "\n" in doc:
            docs.append(doc)
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno or node.body[0].lineno
        indent = len(lines[first]) - len(lines[first].lstrip())
        if node.body[0].col_offset == indent:  # else it shares its line with other code
            alone = len(node.body) == 1 and not isinstance(node, ast.Module)
            lines[first:last] = [" " * indent + "pass" if alone else _REMOVED, *[_REMOVED] * (last - first - 1)]
    return "\n".join(line for line in lines if line != _REMOVED), "\n\n".join(docs)


def _topics(stdlib: Path) -> dict[str, str]:
    """``pydoc_data/topics.py`` holds one literal dictionary, from topic to text; it is parsed, not run."""
    tree = ast.parse((stdlib / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "topics" for t in node.targets):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return topics
    raise ValueError(f"{stdlib}/pydoc_data/topics.py holds no dictionary called topics")


def _without(text: str, seen: set[str]) -> str:
    """``text`` less the paragraphs in ``seen``, to which its own are added (topics quote each other)."""
    kept = []
    for paragraph in text.split("\n\n"):
        if (key := paragraph.strip()) not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def load_corpus(stdlib: Path | None = None) -> Corpus:
    """Read the standard library of the running Python, or of the folder given, and split it."""
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    modules, topics = _modules(stdlib), _topics(stdlib)
    source_held_out = "\n".join(modules.pop(name)[0] for name in HELD_OUT_MODULES)
    target_held_out = "\n".join(topics.pop(name) for name in HELD_OUT_TOPICS)

    held_out = _long_lines(source_held_out + target_held_out)
    modules = {
        name: (code, docs)
        for name, (code, docs) in modules.items()
        if len(_long_lines(code + docs) & held_out) < _SHARED_LINES
    }
    seen = {paragraph.strip() for paragraph in target_held_out.split("\n\n")}
    target_dev = [_without(topics.pop(name), seen) for name in _dev_topics(topics)]
    target_train = [_without(text, seen) for text in topics.values()]
    train = {name: texts for name, texts in modules.items() if not _is_dev(name, _DEV_MODULES)}
    return Corpus(
        source_train=tuple(code for code, _ in train.values()),
        docstrings=tuple(docs for name, (_, docs) in train.items() if docs and "test" not in name),
        source_dev=tuple(code for name, (code, _) in modules.items() if _is_dev(name, _DEV_MODULES)),
        source_held_out=source_held_out,
        target_train=tuple(filter(None, target_train)),
        target_dev=tuple(filter(None, target_dev)),
        target_held_out=target_held_out,
    )
