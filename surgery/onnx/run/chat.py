# SPDX-License-Identifier: Apache-2.0
"""Chat templates: the text that a conversation is for a model, by the template beside its tokenizer.

Templates are programs of strangers. jinja2 runs them in its sandbox, which reaches no files, no attributes of Python's own and
no modules, with the functions that transformers gives them; a result that grows without end is cut short by an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

__all__ = ["Message", "render_chat"]

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``."""

_FILE = "chat_template.jinja"
_LIMIT = 1 << 20  # bytes of a template
_LONGEST = 1 << 24  # characters of a conversation
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def render_chat(folder: Path, messages: Sequence[Message]) -> str:
    """The text of a conversation, up to where the model goes on.

    Raises:
        NotFoundError: no template beside the graph.
        MalformedError: it cannot be read, or it fails on these messages.
        FitError: the package jinja2 is not installed.
    """
    settings = read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    template, file = _template(folder, settings)
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise FitError("chat templates need the package jinja2", hint="pip install jinja2") from error
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    pieces, length = [], 0
    try:
        stream = environment.from_string(template).generate(
            messages=[dict(message) for message in messages], add_generation_prompt=True, **_special(settings)
        )
        for piece in stream:
            pieces.append(piece)
            length += len(piece)
            if length > _LONGEST:
                raise MalformedError(f"makes more than {_LONGEST} characters of it", file=file)
    except _RefusedError as error:
        raise FitError(f"the template refuses the conversation: {show(error, 200)}", file=file) from error
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise MalformedError(f"the template fails: {show(error, 200)}", file=file) from error
    return "".join(pieces)


class _RefusedError(Exception):
    """What a template says against a conversation."""


def _refuse(message: object) -> NoReturn:
    raise _RefusedError(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


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
    if not isinstance(found, str) or len(found) > _LIMIT:
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
