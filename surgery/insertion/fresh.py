# SPDX-License-Identifier: Apache-2.0
"""Begin an adapter: choose its modules, make its first values, write it, read it back (docs/insert.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy

from surgery._version import __version__
from surgery.engine.adapter_output import put_adapter
from surgery.engine.calibration_file import Calibration
from surgery.engine.conversion import Conversion, bound_source, conversion_id, plan_conversion, prove_conversion
from surgery.engine.convert_result import ConvertResult
from surgery.engine.execute import Run, execute
from surgery.engine.inputs import check_alpha
from surgery.engine.merge.merge_plan import planned_merge
from surgery.engine.merge.model_card import merge_card
from surgery.engine.recorded import recorded_recipe
from surgery.insertion.draws import Draws
from surgery.insertion.fresh_card import with_fresh_card
from surgery.insertion.fresh_result import FreshResult
from surgery.insertion.inserted import INSERTED_KINDS, begun_bottlenecks, begun_prefix, begun_prompt
from surgery.insertion.kinds import KINDS, Begun, FreshRequest, begun, scale_of, tensors_of
from surgery.insertion.memory import adapter_memory, base_items, full_memory
from surgery.insertion.modules import LinearModule, chosen_modules, linear_modules
from surgery.insertion.starts import INITS, TAKEN, Init, Start
from surgery.progress import Callback
from surgery_formats.adapters.format import Format
from surgery_formats.adapters.peft.fresh import FreshTargets, plain_start, spelt_targets
from surgery_formats.adapters.registry import format_to_write
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError
from surgery_formats.files.output.folder import SIGNED, output_folder
from surgery_formats.files.output.several import several_outputs
from surgery_formats.models.base_name import base_name as name_of_base
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint
from surgery_formats.text import closest, listing, show
from surgery_formats.updates import Update

__all__ = ["ALL_KINDS", "FreshOptions", "fresh_adapter"]

ALL_KINDS = (*KINDS, *INSERTED_KINDS)
_FORMATS = ("peft", "adapterhub", "mlx")
_OF_LORAS = ("lora", "rslora", "dora")
_CONVERTIBLE = "initial"
_MOST = 1 << 20  # directions, or virtual tokens
_LARGEST_SEED = (1 << 63) - 1  # of torch's generators, which VeRA's projections are drawn with


@dataclass(frozen=True)
class FreshOptions:
    """What was asked for.

    Attributes:
        kind: One of `ALL_KINDS`.
        rank: Directions; of an OFT the side of its blocks, of a bottleneck its width, of prompts how many tokens.
        alpha: As configurations have it; None is the rank.
        targets: See `chosen_modules`.
        init: How it begins.
        text: Tokens that a prompt begins as.
        calibration: Inputs of the modules, for ``eva``.
        release: The unquantised model, for ``loftq``.
        residual: Folder to make of the base without what the factors begin with.
        seed: Of everything random.
        format: ``peft``, ``adapterhub`` or ``mlx``.
    """

    kind: str
    rank: int = 16
    alpha: float | None = None
    targets: str = "attention"
    init: Init = "default"
    text: tuple[int, ...] = ()
    calibration: Calibration | None = None
    release: Checkpoint | None = None
    residual: Path | None = None
    seed: int = 0
    format: str = "peft"

    def check(self, base: Checkpoint) -> None:
        """Refuse what does not go together.

        Raises:
            FitError: an unknown name, or options that contradict each other.
        """
        for value, known, what in (
            (self.kind, ALL_KINDS, "kind of adapter to begin"),
            (self.init, INITS, "way to begin"),
            (self.format, _FORMATS, "format of a fresh adapter"),
        ):
            if value not in known:
                raise FitError(
                    f"no {what} '{show(value)}'", hint=closest(value, known) or f"there are {', '.join(known)}"
                )
        if self.rank > _MOST:
            raise FitError(f"rank is {self.rank}, and at most {_MOST}")
        if self.seed > _LARGEST_SEED:
            raise FitError(f"seed is {self.seed}, and at most {_LARGEST_SEED}")
        check_alpha(self.alpha)
        if self.init not in ("default", "text") and self.kind not in _OF_LORAS:
            raise FitError(f"{self.init} is a way to begin a LoRA, and {self.kind} is none")
        if self.init == "text" and self.kind != "prompt":
            raise FitError("only a prompt begins as a text")
        if self.init in TAKEN and self.kind == "dora":
            raise FitError(f"{self.init} takes a part from the base, and a DoRA measures the base as it was")
        if self.init == "loftq" and self.kind == "dora":
            raise FitError("a DoRA measures the base that it is attached to, and loftq makes another one of it")
        if (self.init == "eva") != (self.calibration is not None):
            raise FitError(
                "eva begins along the inputs of modules, and needs a file of them", hint="`calibration=FILE`"
            )
        if (self.init == "loftq") != (self.release is not None):
            raise FitError(
                "loftq makes up for what rounding took from the unquantised model", hint="`release=` names it"
            )
        if self.init == "loftq" and not base.is_quantised:
            raise FitError("nothing of it is quantised, so that rounding took nothing", file=base.path)
        if self.residual is not None and self.init not in TAKEN:
            raise FitError("only pissa and olora take a part from the base", hint="leave out `residual=`")
        if self.init in TAKEN and self.residual is None:
            if base.is_quantised:
                raise FitError(
                    f"PEFT takes {self.init} from weights of 16 bits or more, and these are codes",
                    file=base.path,
                    hint="`residual=` writes the base without that part, in 16 bits",
                )
            if self.format != "peft":
                raise FitError(f"{self.format} has no raw {self.init}", hint="`residual=` makes it a plain LoRA")
        wanted = "adapterhub" if self.kind == "bottleneck" else "peft" if self.kind in INSERTED_KINDS else self.format
        if wanted != self.format:
            raise FitError(f"a {self.kind} is written in the format {wanted}", hint=f'`format="{wanted}"`')


@dataclass(frozen=True)
class _Begun:
    """A fresh adapter and what is known of it before it is written."""

    adapter: Adapter
    start: Start | None = None
    modules: tuple[LinearModule, ...] = ()
    targets: tuple[str, ...] = ()
    frozen: int = 0
    plain: Adapter | None = None


def fresh_adapter(
    base: Checkpoint, options: FreshOptions, folder: Path | None, *, overwrite: bool, progress: Callback | None
) -> FreshResult:
    """Begin an adapter for `base`.

    Args:
        base: The model.
        options: What to begin.
        folder: To make; None for a dry run.
        overwrite: Replace an existing output, atomically.
        progress: Called with every tensor.

    Raises:
        FitError: options that contradict each other, or that the base cannot have.
        ProofError: what was written does something else.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """
    options.check(base)
    found = _begun(base, options, folder)
    target = format_to_write(options.format)
    conversion = _planned(found.adapter, target, base)
    trained = sum(tensor.numel for tensor in found.adapter.tensors)
    component = base.main
    result = FreshResult(
        output=None,
        format=target.name,
        kind=options.kind,
        init=options.init,
        rank=options.rank,
        targets=found.targets,
        modules=len(found.modules) or len(found.adapter.updates),
        trained=trained,
        parameters=sum(one.numel for one in component.parameters.without(component.aliases).values()),
        memory=adapter_memory(base_items([component]), trained, found.frozen),
        full=full_memory(component),
        base_nbytes=base.nbytes,
        warnings=_warnings(options),
    )
    if folder is None:
        return result
    with several_outputs(options.residual is not None):
        return _write(result, conversion, found, options, folder, overwrite=overwrite, progress=progress)


def _begun(base: Checkpoint, options: FreshOptions, folder: Path | None) -> _Begun:
    component, draws = base.main, Draws(options.seed)
    path = folder or Path(options.kind)
    task = _task(component.config)
    base_name = name_of_base(base)

    def adapter(
        kind: str, config: Mapping[str, Any], updates: Mapping[Any, tuple[Update, ...]], **more: Any
    ) -> Adapter:
        return Adapter(
            path=path,
            format="adapterhub" if options.kind == "bottleneck" else "peft",
            kind=kind,
            updates=dict(sorted(updates.items())),
            tensors=more.pop("tensors", tensors_of(updates)),
            base_name=base_name,
            config=config,
            task=task,
            **more,
        )

    if options.kind in ("prompt", "prefix"):
        if not task:
            raise FitError(
                "PEFT puts virtual tokens in front of language models that generate, and this is none", file=base.path
            )
        about = FreshTargets(base_name, task)
        if options.kind == "prompt":
            made = begun_prompt(component, about, options.rank, draws, options.text)
        else:
            made = begun_prefix(component, about, options.rank, draws)
        return _Begun(adapter(made.prompt.kind, made.config, {}, prompt=made.prompt, tensors=(made.prompt.table,)))
    everything = linear_modules(component)
    if options.kind == "bottleneck":
        name = _hub_name(path)
        updates, config = begun_bottlenecks(component, everything, name, base_name, options.rank, draws)
        return _Begun(adapter("BOTTLENECK", config, updates))
    modules = chosen_modules(everything, options.targets, component)
    alpha = float(options.rank) if options.alpha is None else options.alpha
    release = {} if options.release is None else _released(options.release, modules)
    scale = scale_of(options.kind, options.rank, alpha)
    start = Start(options.init, options.rank, scale, draws, options.calibration, release)
    start.check(modules)

    def spelt(chosen: tuple[LinearModule, ...]) -> tuple[str, ...]:
        return spelt_targets([module.path for module in chosen], everything.paths)

    raw = options.residual is None
    request = FreshRequest(options.kind, options.rank, alpha, start, draws, modules, spelt, base_name, task, raw)
    fresh: Begun = begun(request)
    made_adapter = adapter(fresh.name, fresh.config, fresh.updates, optional=fresh.optional)
    plain = None
    if fresh.plain:
        plain = replace(made_adapter, updates=dict(sorted(fresh.plain.items())), config=plain_start(fresh.config))
    return _Begun(made_adapter, start, modules, spelt(modules), fresh.frozen, plain)


def _task(config: Mapping[str, Any]) -> str:
    """As the Hub names it; of a model that classifies none, for PEFT would train its head too."""
    names = [str(name) for name in config.get("architectures") or ()]
    if any("CausalLM" in name or "LMHeadModel" in name for name in names):
        return "text-generation"
    seq2seq = config.get("is_encoder_decoder") is True and any("ConditionalGeneration" in name for name in names)
    return "text2text-generation" if seq2seq else ""


def _hub_name(path: Path) -> str:
    """A name of a module, in which torch allows no dot."""
    return (
        "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in path.stem).strip("-") or "adapter"
    )


def _released(release: Checkpoint, modules: tuple[LinearModule, ...]) -> dict[str, LinearModule]:
    """The modules of the unquantised model by path.

    Raises:
        FitError: it lacks one, or has it in another shape, or is quantised too.
    """
    known = {module.path: module for module in linear_modules(release.main).linear}
    wrong = [m.path for m in modules if m.path not in known or known[m.path].shape != m.shape]
    if wrong:
        raise FitError(f"it has no {listing(wrong)} of the quantised model's shapes", file=release.path)
    if release.is_quantised:
        raise FitError("it is quantised as well", file=release.path, hint="name the unquantised model")
    return known


def _planned(adapter: Adapter, target: Format, base: Checkpoint) -> Conversion:
    try:
        return plan_conversion(adapter, target, base, bound_source(adapter, base))
    except FitError as error:
        if target.name != "peft":
            error.hint = f"choose `targets=` that {target.name} has adapters for, or another `format=`"
        raise


def _warnings(options: FreshOptions) -> tuple[str, ...]:
    said: list[str] = []
    if options.init in TAKEN and options.residual is None:
        said.append(
            f"raw {options.init}: load it on this very base; PEFT takes the part away when it loads the adapter"
        )
    if options.kind in ("prompt", "prefix"):
        said.append("virtual tokens change what the base gives from the start: no prompt leaves it as it is")
    if options.kind == "vera":
        said.append("its projections are drawn again from the seed wherever it is loaded")
    return tuple(said)


def _write(
    result: FreshResult,
    conversion: Conversion,
    found: _Begun,
    options: FreshOptions,
    folder: Path,
    *,
    overwrite: bool,
    progress: Callback | None,
) -> FreshResult:
    """Write what was planned, and of a raw start the same factors as a plain LoRA beside it."""
    carded = with_fresh_card(conversion.rendering, result, _base_of(conversion), found.adapter.task)
    parts = [("", replace(conversion, rendering=carded))]
    if found.plain is not None:
        parts.append((f"{_CONVERTIBLE}/", _planned(found.plain, conversion.target, _base_of(conversion))))
    facts = {"seed": options.seed, "kind": options.kind, "init": options.init}
    inputs = [found.adapter.files, *([options.calibration.files] if options.calibration else [])]
    files = [file for some in inputs for file in some]
    files += [shard.file for one in _bases(options) for part in one.components.values() for shard in part.shards]
    job = conversion_id(conversion, files, also=facts)
    sources = [_base_of(conversion).path]
    with output_folder(folder, job, overwrite=overwrite, inputs=sources, hashes=SIGNED) as staged:
        for within, part in parts:
            put_adapter(part.rendering, staged, within, progress=progress)
        for within, part in parts:
            proved = ConvertResult(None, options.format, options.format, part.rendering.entries)
            prove_conversion(staged.staged / within, part, proved)
        if options.calibration is not None:
            options.calibration.check_unchanged()
        errors = dict(sorted(found.start.errors.items())) if found.start is not None else {}
        result = replace(result, errors=errors)
        manifest = result.as_manifest()
        if options.residual is not None:  # before the factors appear: they act on no other base
            run = Run(overwrite=overwrite, progress=progress)
            written = replace(conversion.target.read(staged.staged), path=folder)
            result = _with_residual(result, _base_of(conversion), found, written, options.residual, run)
        staged.commit({**manifest, "version": __version__} | recorded_recipe())
    beside = folder / _CONVERTIBLE if len(parts) > 1 else None
    return replace(result, output=folder, convertible=beside)


def _bases(options: FreshOptions) -> list[Checkpoint]:
    return [] if options.release is None else [options.release]


def _base_of(conversion: Conversion) -> Checkpoint:
    assert conversion.base is not None
    return conversion.base


def _with_residual(
    result: FreshResult, base: Checkpoint, found: _Begun, written: Adapter, residual: Path, run: Run
) -> FreshResult:
    """Write the base without the product of the factors that are `written`, and measure what its types lose of it."""
    binding, plan = planned_merge(base, [(written, -1.0)], "keep", None, "keep")
    execute(plan, residual, run, lambda ledger: {"README.md": merge_card(binding, ledger)})
    left = {module.path: module for module in linear_modules(open_checkpoint(residual).main).linear}
    loras = {site.path.removesuffix(".weight"): chain[0].low_rank() for site, chain in written.updates.items()}
    errors: dict[str, tuple[float, ...]] = {}
    for module in found.modules:
        weight, lora = module.weight(), loras[module.path]
        assert lora is not None
        product = (lora.B.load(None).astype(float) * lora.scale) @ lora.A.load(None).astype(float)
        size = float(numpy.linalg.norm(weight)) or 1.0
        errors[module.path] = (float(numpy.linalg.norm(weight - left[module.path].weight() - product)) / size,)
    return replace(result, residual=residual, errors=errors, warnings=(*result.warnings, *plan.warnings))
