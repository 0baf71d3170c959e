# SPDX-License-Identifier: Apache-2.0
"""Side files that belong together: a tokenizer with its template, a processor, the modules of sentence-transformers.

Of such a set no half is right: a template names tokens that its own tokenizer has, and a pooling layer belongs to the
model that was trained with it. So an output has each set from one place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from surgery_formats.containers.weight_files import is_weight_file
from surgery_formats.errors import SurgeryError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.files.equal_ranges import equal_ranges
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.files.places import entries, is_file, is_own_folder
from surgery_formats.files.raw import open_file, stays_inside

__all__ = ["CODE", "SetName", "is_whole_set", "same_bytes", "sets_beside"]

SetName = str
"""``tokenizer``, ``processor`` or ``sentence-transformers``."""
CODE = ".py"
"""The ending of files of code, which a folder keeps although another has the rest of a set."""

_SETS: Mapping[SetName, re.Pattern[str]] = {
    "tokenizer": re.compile(
        r"(special_tokens_map|added_tokens|vocab|chat_template|tekken|normalizer)\.json"
        r"|chat_template\.jinja|(additional_chat_templates|chat_templates)/[^/]+"
        r"|(vocab|merges|dict)\.txt|bpe\.codes|vocab\.bpe|[^/]+\.(model|tiktoken|spm)"
        r"|[^/]*token[^/]*"
    ),
    "processor": re.compile(
        r"(preprocessor|processor|video_preprocessor|image_processor|feature_extractor)_config\.json|processing_\w+\.py"
    ),
    "sentence-transformers": re.compile(r"modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json"),
}
_FOLDERS = ("additional_chat_templates", "chat_templates")  # of templates by name, where a tokenizer has several
_VOCABULARY = re.compile(r"(tokenizer|vocab|tekken)\.json|vocab\.(txt|bpe)|[^/]+\.(model|tiktoken|spm)")
_MODULES = "modules.json"
_LIMIT = 1 << 20  # bytes of it


def sets_beside(folder: Path) -> dict[SetName, dict[str, Path]]:
    """The sets that lie in a folder: files by their name relative to it. Links that lead out of it are none."""
    found: dict[SetName, dict[str, Path]] = {}
    for name, path in _files(folder):
        what = next((what for what, pattern in _SETS.items() if pattern.fullmatch(name)), None)
        if what is not None and not is_weight_file(name):
            found.setdefault(what, {})[name] = path
    if "sentence-transformers" in found:
        for module in _modules(folder):
            found["sentence-transformers"] |= dict(_files(folder / module, f"{module}/"))
    return found


def is_whole_set(what: SetName, names: Iterable[str]) -> bool:
    """Whether these files are a set by themselves: a tokenizer has a vocabulary, and is no template alone."""
    return what != "tokenizer" or any(_VOCABULARY.fullmatch(name) for name in names)


def same_bytes(path: Path, other: Path) -> bool:
    """Whether two files hold the same."""
    one, two = open_file(path), open_file(other)
    return one.size == two.size and equal_ranges(one, 0, two, 0, one.size)


def _files(folder: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Files of a folder, and of the folders of templates in it."""
    if not folder.is_dir():
        return
    for path in entries(folder):
        name = f"{prefix}{path.name}"
        if is_own_folder(path) and not prefix and path.name in _FOLDERS:
            yield from _files(path, f"{name}/")
        elif is_file(path) and not path.name.startswith(".") and is_safe_name(name) and stays_inside(path):
            yield name, path


def _modules(folder: Path) -> Iterator[str]:
    """Folders that modules.json names, if they are plain folders of this one."""
    try:
        file = open_file(folder / _MODULES)
        listed = parse_object(b'{"": %s}' % file.read(0, min(file.size, _LIMIT)), file=file.path)[""]
    except SurgeryError:  # whoever loads the model says so
        return
    if not isinstance(listed, list):
        return
    for module in listed:
        name = module.get("path") if isinstance(module, dict) else None
        if (
            isinstance(name, str)
            and name
            and "/" not in name
            and is_safe_name(name)
            and not (folder / name).is_symlink()
        ):
            yield name
