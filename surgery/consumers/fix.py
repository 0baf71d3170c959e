# SPDX-License-Identifier: Apache-2.0
"""Write an adapter so that a consumer honours it, and prove it: what was written is read, compared, and judged again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from surgery.algebra.lora_form import prove_lora_form
from surgery.consumers.consent import Consent
from surgery.consumers.consumer import Consumer
from surgery.consumers.facts import bound_facts, facts_of
from surgery.consumers.fitting import FittedAdapter, fitted
from surgery.engine.adapter_output import WriteOptions
from surgery.engine.chosen_part import placed
from surgery.engine.conversion import bound_source, in_dialect, plan_conversion, tolerance_of, write_conversion
from surgery.engine.convert_result import ConvertResult
from surgery.engine.proof import check_errors, compare, read_back, restricted
from surgery.progress import Callback
from surgery_formats.adapters.format import Entry, Format
from surgery_formats.adapters.registry import format_named
from surgery_formats.binding.sizes import sized, slices_of
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.output.several import several_outputs
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["write_for"]


def write_for(
    adapter: Adapter,
    base: Checkpoint,
    consumer: Consumer,
    version: tuple[int, ...],
    consent: Consent,
    *,
    output: Path | None,
    component: str | None = None,
    left_out: tuple[Entry, ...] = (),
    dtype: DType | None = None,
    overwrite: bool = False,
    progress: Callback | None = None,
    merge_rest: Callable[[Adapter], object] | None = None,
    rest_name: str = "",
) -> ConvertResult:
    """Rewrite an adapter for a consumer.

    Args:
        adapter: The adapter.
        base: The model it was trained on.
        consumer: The program.
        version: Of the program.
        consent: What the user allows.
        output: File or folder to make; None writes nothing.
        component: The part of a pipeline to write.
        left_out: What was left out of the adapter before, for the account.
        dtype: Type of the stored matrices; None keeps them.
        overwrite: Replace an existing output, atomically.
        progress: Called with every step.
        merge_rest: Called with what is to be merged into the base (`Consent.merged`), before the adapter appears.
        rest_name: Of the base that this makes, to which the adapter then belongs.

    Raises:
        FitError: the adapter does not fit the base, or no rewriting is honoured.
        ProofError: what was written does something else, or is not honoured.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """
    original, left = placed(adapter, base, component)
    bound_facts(original, base)
    target = _format_for(original, base, consumer, version)
    target = _in_its_dialect(target, original, base, consumer, version)
    made = fitted(original, base, consumer, version, target, consent)
    if made.rest is not None:
        made = replace(made, adapter=_of_base(made.adapter, rest_name))
    lacking = any(site.path.endswith(".bias") and not slices_of(site, base) for site in made.adapter.updates)
    binding = None if lacking else bound_source(made.adapter, base)  # a base need not have biases: see `bound_facts`
    plan = plan_conversion(made.adapter, target, base, binding, dtype=dtype, allow_loss=consent.loss)
    result = ConvertResult(
        None,
        original.format,
        target.name,
        (*made.restated(plan.rendering.entries), *plan.left_out, *left, *left_out),
        {},
        original.known_issues(),
        original.path,
        made.form is not None,
        consumer=consumer.name,
    )
    if output is None:
        return result
    files = {name: path for name, path in original.files_beside.items() if path in made.kept.side_files}
    rest = None if merge_rest is None or made.rest is None else partial(merge_rest, made.rest)
    options = WriteOptions(output, (original.path, base.path), files, overwrite, progress, last=rest)
    also = partial(
        _prove,
        made=made,
        base=base,
        consumer=consumer,
        version=version,
        target=target,
        dtype=dtype,
        greatest_rank=consent.greatest_rank,
    )
    chosen = repr(consent) if made.form is not None else f"{consumer.name} {version}"
    with several_outputs(rest is not None):
        return write_conversion(plan, options, result, rank=chosen, also=also)


def _of_base(adapter: Adapter, name: str) -> Adapter:
    """The adapter as one of another base, whose content it does not know."""
    metadata = {key: value for key, value in adapter.metadata.items() if key != "surgery.base"}
    said = {"base_model_name_or_path": name, "revision": None}
    config = {key: said.get(key, value) for key, value in adapter.config.items()}
    return replace(adapter, base_name=name, base_id="", metadata=metadata, config=config)


def _format_for(adapter: Adapter, base: Checkpoint, consumer: Consumer, version: tuple[int, ...]) -> Format:
    """The consumer's format; the other one that it loads where that alone has names for all, which the consumer knows."""
    target = format_named(consumer.format)
    if not consumer.otherwise:
        return target
    seen = facts_of(replace(adapter, format=target.name), base)
    unknown = any(verdict.remedy == "rewrite" for verdict in consumer.judge(seen, version))
    if not unknown and _holds(target, adapter, base):
        return target
    other = format_named(consumer.otherwise)
    return other if _holds(other, adapter, base) else target


def _holds(target: Format, adapter: Adapter, base: Checkpoint) -> bool:
    """Whether a format has a place for every update."""
    try:
        entries = target.render(sized(adapter, base), base).entries
    except FitError:
        return False
    return all(entry.outcome != "dropped" for entry in entries)


def _in_its_dialect(
    target: Format, adapter: Adapter, base: Checkpoint, consumer: Consumer, version: tuple[int, ...]
) -> Format:
    """The format with the dialect of experts that the consumer's rules ask for."""
    seen = replace(adapter, format=target.name) if adapter.format != target.name else adapter
    asked = any(verdict.remedy == "dialect" for verdict in consumer.judge(facts_of(seen, base), version))
    return in_dialect(target, consumer.dialect or None) if asked else target


def _prove(
    path: Path,
    *,
    made: FittedAdapter,
    base: Checkpoint,
    consumer: Consumer,
    version: tuple[int, ...],
    target: Format,
    dtype: DType | None,
    greatest_rank: int | None,
) -> Mapping[str, float]:
    """Errors by weight of the rewriting, against the original.

    What lies at `path` was proved to be the rewriting.

    Raises:
        ProofError: it does something else than the original, or the consumer does not honour it.
    """
    written = read_back(target, path)
    verdicts = consumer.judge(facts_of(written, base, greatest_rank), version)
    if wrong := next((one for one in verdicts if one.outcome != "honoured"), None):
        raise ProofError(f"{consumer.title} would not honour it: {wrong.why}", file=path.name, tensor=wrong.part)
    if made.form is not None:
        prove_lora_form(path, made.form)
    worked_out = {} if made.form is None else made.form.weights
    kept = made.kept.updates
    if lost := next((site for site in kept if site not in made.adapter.updates), None):
        raise ProofError("is neither in it nor accounted for", file=path.name, tensor=str(lost))
    exact = {s: chain for s, chain in kept.items() if str(s) not in worked_out or worked_out[str(s)].taken_over}
    if not exact:
        return {}
    rewritten = {site: made.adapter.updates[site] for site in exact}
    errors = compare(restricted(made.kept, exact), restricted(made.adapter, rewritten), None)
    check_errors(errors, tolerance_of(dtype), path)
    return errors
