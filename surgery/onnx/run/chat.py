# SPDX-License-Identifier: Apache-2.0
"""Chat templates: the text that a conversation is for a model, by the template beside its tokenizer.

Templates are programs of strangers. jinja2 runs them in its sandbox, which reaches no files, no attributes of Python's own and
no modules, with the functions that transformers gives them; in a process of their own, whose time and memory are limited.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

__all__ = ["Message", "render_chats"]

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``."""

_FILE = "chat_template.jinja"
_PROGRAM = Path(__file__).with_name("chat_program.py")
_LIMIT = 1 << 20  # bytes of a template
_LONGEST = 1 << 24  # characters of a conversation
_MEMORY = 1 << 29  # bytes, besides what the conversations take
_SECONDS = 5  # of the processor, and as many more for each so many conversations
_CONVERSATIONS = 1000
_PATIENCE = 12  # times as long by the clock: the machine may be busy
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def render_chats(folder: Path, conversations: Sequence[Sequence[Message]]) -> list[str]:
    """The text of each conversation, up to where the model goes on.

    Raises:
        NotFoundError: no template beside the graph.
        MalformedError: it cannot be read, it fails on these messages, or takes too long, too much memory or too many characters.
        FitError: it refuses a conversation, or one has a value that JSON cannot hold.
    """
    settings = read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    template, file = _template(folder, settings)
    try:
        said = json.dumps([[dict(message) for message in messages] for messages in conversations])
    except (TypeError, ValueError) as error:
        raise FitError(f"a message has a value that JSON cannot hold: {show(error, 200)}") from error
    seconds = _SECONDS * (1 + len(conversations) // _CONVERSATIONS)
    limits = {"seconds": seconds, "memory": _MEMORY + 32 * len(said), "longest": _LONGEST}
    request = json.dumps({"template": template, "special": _special(settings), **limits})
    try:
        ended = subprocess.run(
            [sys.executable, "-P", str(_PROGRAM)],
            input=f'{request[:-1]}, "conversations": {said}}}'.encode(),
            capture_output=True,
            timeout=seconds * _PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        raise MalformedError("the template takes too long", file=file) from error
    if ended.returncode < 0:
        raise MalformedError(f"the template takes more than {seconds} seconds, or too much memory", file=file)
    if ended.returncode:
        last = ended.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise MalformedError(f"the template cannot be run: {show(last, 200)}", file=file)
    answer = json.loads(ended.stdout)
    if "refused" in answer:
        raise FitError(f"the template refuses the conversation: {show(answer['refused'], 200)}", file=file)
    if "error" in answer:
        raise MalformedError(f"the template {show(answer['error'], 200)}", file=file)
    texts: list[str] = answer["texts"]
    return texts


def _template(folder: Path, settings: Mapping[str, Any]) -> tuple[str, Path]:
    file = folder / _FILE
    if file.exists():
        source = open_file(file)
        if source.size > _LIMIT:
            raise MalformedError(f"has {source.size} bytes", file=file)
        try:
            return bytes(source.read(0, source.size)).decode(), file
        except UnicodeDecodeError as error:
            raise MalformedError("not UTF-8", file=file) from error
    found = settings.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {str(one.get("name")): one.get("template") for one in found if isinstance(one, Mapping)}
        found = named.get("default")
    if isinstance(found, str) and len(found) > _LIMIT:
        raise MalformedError(f"its chat template has {len(found)} characters", file=folder / "tokenizer_config.json")
    if not isinstance(found, str):
        raise NotFoundError("the model has no chat template", file=folder, hint="give the text as the model expects it")
    return found, folder / "tokenizer_config.json"


def _special(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name, as templates know them."""
    found = {}
    for name in _TOKENS:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            found[name] = value
    return found
