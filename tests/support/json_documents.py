# SPDX-License-Identifier: Apache-2.0
"""Looks at every document that a test has a command write with ``--json``, so that none escapes its schema."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from click.testing import CliRunner

from tests.support import json_schemas

__all__ = ["UNSEEN", "look", "watch"]

UNSEEN = "" if find_spec("jsonschema") else "no jsonschema: what commands write with --json is not validated"
"""Why nothing is looked at here, for the end of the tests; machines with GPUs may lack the package, CI may not."""
if UNSEEN and os.environ.get("CI"):
    raise ImportError(UNSEEN)


def look(words: Sequence[str], stdout: str, stderr: str) -> None:
    """Validate what a command wrote, if it was asked for JSON."""
    words = list(words[: words.index("--")] if "--" in words else words)
    if UNSEEN or "--json" not in words:
        return
    if stdout.startswith("{"):
        json_schemas.check(json.loads(stdout))
    for line in stderr.splitlines():
        if line.startswith('{"schema_version"'):
            json_schemas.check_error(json.loads(line))


def watch() -> None:
    """Look at what every command in this process writes; with `json_schemas.WRITING`, at what every verb returns too."""
    if getattr(CliRunner, "watched", False):
        return
    invoke = CliRunner.invoke

    @functools.wraps(invoke)
    def looked_at(self: CliRunner, cli: Any, args: Any = None, *rest: Any, **more: Any) -> Any:
        result = invoke(self, cli, args, *rest, **more)
        if isinstance(args, list | tuple):
            look([str(word) for word in args], result.stdout, result.stderr)
        return result

    CliRunner.invoke, CliRunner.watched = looked_at, True  # type: ignore[method-assign, attr-defined]
    if json_schemas.WRITING:
        _watch_verbs()


def _watch_verbs() -> None:
    from surgery.reports import result as results
    from surgery.reports.to_json import plain

    timed = results.timed

    def watched(verb: Any) -> Any:
        run = timed(verb)
        command = verb.__name__.replace("prompt_", "prompt ").replace("_", "-")

        @functools.wraps(run)
        def looked_at(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            shown = json.loads(json.dumps(plain(result.as_json())))
            json_schemas.widen_file(command, shown, json_schemas.descriptions(type(result)))
            return result

        return looked_at

    results.timed = watched  # before any verb is imported
