# SPDX-License-Identifier: Apache-2.0
"""A program of its own that renders a chat template: JSON on standard input, JSON on standard output.

jinja2's sandbox keeps a template from Python, not from time and memory: two loops of 100,000 rounds or ``'x' * 10 ** 10`` are
allowed. The kernel limits both here, where it can: what the program took is gone with it. It imports nothing of surgery.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["main"]

_REASONING = ("reasoning_content", "thinking", "reasoning")


class _RefusedError(Exception):
    """What a template says against a conversation."""


class _Generation(Extension):
    """``{% generation %}``, around what an assistant says: transformers marks it for training; here it is text."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_said"), [], [], body, lineno=line)

    def _said(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """``dict`` of templates, without the attributes of Python's."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace`` of templates, which stores no attributes of Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values: dict[Any, Any] = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no attribute {name!r}")


def _refuse(message: object) -> NoReturn:
    raise _RefusedError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _limit(seconds: int, memory: int) -> None:
    """Let the kernel end this process where it takes more."""
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # others have the limit by name alone
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _rendered(request: dict[str, Any]) -> dict[str, Any]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    environment.globals.update(dict=_Dict(), namespace=_Namespace)
    template = environment.from_string(request["template"])
    texts = []
    for messages in request["conversations"]:
        pieces, length = [], 0
        values = {"tools": None, "documents": None, "add_generation_prompt": True, **request["special"]}
        for piece in template.generate(messages=[_named(message) for message in messages], **values):
            pieces.append(piece)
            length += len(piece)
            if length > request["longest"]:
                return {"error": f"makes more than {request['longest']} characters of it"}
        texts.append("".join(pieces))
    return {"texts": texts}


def _named(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose reasoning has all the names under which templates read it."""
    said = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if said is None else {"thinking": said, **message, "reasoning_content": said}


def main() -> None:
    """Answer the request: ``texts``, or ``refused`` or ``error`` with what was wrong."""
    request = json.load(sys.stdin)
    _limit(request["seconds"], request["memory"])
    try:
        answer = _rendered(request)
    except _RefusedError as error:
        answer = {"refused": str(error)}
    except MemoryError:
        answer = {"error": "takes too much memory"}
    except RecursionError:
        answer = {"error": "fails: it calls itself without end"}
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, SyntaxError) as error:
        answer = {"error": f"fails: {error}"}
    if len(answer.get("error", answer.get("refused", ""))) > 500:
        answer = {key: text[:500] for key, text in answer.items()}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
