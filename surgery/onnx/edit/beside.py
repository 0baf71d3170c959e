# SPDX-License-Identifier: Apache-2.0
"""What programs need to run a graph, and what its licence asks for: the files beside it that go along with it.

They are known by name. A graph may lie in anybody's working folder, and nothing else of that belongs into an output.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from surgery.engine.plan import SideFile
from surgery_formats.containers.weight_files import holds_weights
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.files.raw import stays_inside

__all__ = ["files_beside"]

_NAMES = (
    "config.json", "generation_config.json", "genai_config.json", "ort_config.json", "quantize_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "image_processor_config.json",
    "feature_extractor_config.json",
    "tokenizer*", "vocab*", "merges.txt", "dict.txt", "bpe.codes", "special_tokens_map.json", "added_tokens.json",
    "normalizer.json", "tekken.json", "chat_template*", "*.model", "*.tiktoken", "*.spm",
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json",
    "LICEN[CS]E*", "NOTICE*",
)  # fmt: skip
_LARGEST = 1 << 28  # bytes


def files_beside(folder: Path, *more: str) -> Iterator[SideFile]:
    """Configuration, tokenizer, processor and licence in a graph's folder, and `more`; links that lead out of it are none."""
    for path in sorted(folder.iterdir()):
        name = path.name
        if (
            holds_weights(name)
            or not is_safe_name(name)
            or not any(fnmatchcase(name, known) for known in (*_NAMES, *more))
        ):
            continue
        if path.is_file() and stays_inside(path) and path.stat().st_size <= _LARGEST:
            yield SideFile(name, source=path)
