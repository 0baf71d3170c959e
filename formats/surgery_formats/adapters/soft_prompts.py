# SPDX-License-Identifier: Apache-2.0
"""The soft prompts of an adapter, whatever its format: of PEFT, of AdapterHub, and the rows of a textual inversion."""

from __future__ import annotations

from collections.abc import Mapping

from surgery_formats.adapters.adapterhub.prompts import hub_prompt
from surgery_formats.adapters.peft.prompt import prompt_history
from surgery_formats.adapters.textual_inversion.prompt import inversion_prompts
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.errors import FitError
from surgery_formats.text import listing, show

__all__ = ["history", "soft_prompt", "soft_prompts"]


def soft_prompts(adapter: Adapter) -> Mapping[str, SoftPrompt]:
    """By the part of a pipeline that each is for; of a plain model one, called "".

    Raises:
        FitError: the adapter has none.
    """
    if adapter.prompt is not None:
        return {"": adapter.prompt}
    if adapter.format == "adapterhub" and (of_hub := hub_prompt(adapter)) is not None:
        return {"": of_hub}
    if found := inversion_prompts(adapter):
        return found
    raise FitError(f"{show(adapter.kind, 40)} has no virtual tokens", file=adapter.path, hint="it changes weights")


def soft_prompt(adapter: Adapter, component: str | None = None) -> SoftPrompt:
    """The one soft prompt of an adapter, or that of one part of a pipeline.

    Raises:
        FitError: none, several, or none for that part.
    """
    found = soft_prompts(adapter)
    if component is not None and component not in found:
        raise FitError(f"its virtual tokens are for {listing(found) or 'a plain model'}", file=adapter.path)
    if component is None and len(found) > 1:
        raise FitError(
            f"it has virtual tokens for {listing(found)}", file=adapter.path, hint="choose one with `component=`"
        )
    return next(iter(found.values())) if component is None else found[component]


def history(adapter: Adapter) -> dict[str, str]:
    """What its files tell of its making, by what to call it."""
    told = prompt_history(adapter.config) if adapter.format == "peft" else {}
    return {"written by": adapter.provenance.tool, **told} if adapter.provenance.tool else told
