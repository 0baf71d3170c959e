# SPDX-License-Identifier: Apache-2.0
"""From a PEFT folder to the canonical form (format: docs/formats.md; equations: the update files)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from surgery_formats.adapters.peft.config import PeftConfig, parse_config
from surgery_formats.adapters.peft.keys import HEADS, LORA_FACTORS, PREFIX, sort_tensors, unwrapped
from surgery_formats.adapters.peft.known_issues import issues_by_value, stated_issues
from surgery_formats.adapters.peft.other_kinds import KINDS, Module
from surgery_formats.adapters.peft.parameters import parameter_lora, targeted_parameters, wrappers_of
from surgery_formats.adapters.peft.prompt import read_prompt
from surgery_formats.adapters.peft.switches import PROMPT_KINDS
from surgery_formats.canonical.adapter import Adapter, ModuleKind, Site
from surgery_formats.containers.base import Shard
from surgery_formats.containers.sharded import open_folder_tensors
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.files.raw import stays_inside
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import DoRA, Factor, Held, LoRA, Offset, Replacement, TokenRows, Update

__all__ = ["read_peft"]

_EMBEDDINGS = frozenset(
    [
        "embed_tokens",
        "lm_head",
        "wte",
        "embed_in",
        "embed_out",
        "word_embeddings",
        "shared",
        "embedding",
        "embeddings",
        "decoder",
        "output_projection",
    ]
)  # modules whose whole weight PEFT stores when the vocabulary was resized


def read_peft(path: Path) -> Adapter:
    """Read a folder with adapter_config.json and adapter_model.safetensors (or .bin).

    Raises:
        NotFoundError: no weights.
        MalformedError: the configuration or a key is not PEFT's.
        FitError: a kind or a switch that no merged weight can express.
    """
    config = parse_config(read_object(path / "adapter_config.json"), path / "adapter_config.json")
    opened = open_folder_tensors(path, ("adapter_model",))
    tensors = tuple(opened.tensors.values())
    whole = Adapter(
        path=path,
        format="peft",
        kind=config.kind,
        updates={},
        tensors=tensors,
        new_modules=frozenset(config.modules_to_save) | HEADS,
        base_name=_text(config.raw.get("base_model_name_or_path")),
        base_id=_metadata(opened.shards).get("surgery.base", ""),
        config=config.raw,
        metadata=_metadata(opened.shards),
        side_files=tuple(sorted(p for p in path.iterdir() if "token" in p.name and p.is_file() and stays_inside(p))),
    )
    if config.kind in PROMPT_KINDS:
        return _soft_prompt(whole, tensors, config)
    kind = KINDS.get(config.kind)
    found = sort_tensors(tensors, kind.factors, kind.shared) if kind else sort_tensors(tensors, LORA_FACTORS)
    updates: dict[Site, tuple[Update, ...]] = {}
    optional: set[Site] = set()
    for name, tensor in found.plain.items():
        _check_plain(name, tensor, config)
        updates[Site(name)] = (Replacement(Factor.of(tensor), _held(name, config)),)
    wrappers = wrappers_of(found.modules)
    for module, parts in found.modules.items():
        if kind:
            made = kind.read(Module(unwrapped(module), parts, found.shared, config))
            optional |= made.optional
            chains: Mapping[Site, tuple[Update, ...]] = {site: (update,) for site, update in made.updates.items()}
        else:
            chains = _module(module, parts, config, wrappers)
        for site, chain in chains.items():
            updates[site] = (*updates.pop(site, ()), *chain)  # under the site that knows its kind of module
    return replace(
        whole,
        updates=dict(sorted(updates.items())),
        ignored=tuple(found.ignored),
        optional=frozenset(optional),
        stated_issues=tuple(stated_issues(config.kind, config.raw, tensors)),
        examine=partial(issues_by_value, config.kind, config.raw, tensors),
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _metadata(shards: Iterable[Shard]) -> dict[str, str]:
    merged: dict[str, str] = {}
    for shard in shards:
        merged |= shard.metadata
    return merged


def _soft_prompt(adapter: Adapter, tensors: Sequence[StoredTensor], config: PeftConfig) -> Adapter:
    """Virtual tokens, and what was trained in full beside them."""
    prompt = read_prompt(tensors, config)
    beside = (tensor for tensor in tensors if tensor is not prompt.table)
    rest = sort_tensors(beside, frozenset(), prefix="base_model.")
    updates: dict[Site, tuple[Update, ...]] = {}
    for name, tensor in rest.plain.items():
        _check_plain(name, tensor, config)
        updates[Site(name)] = (Replacement(Factor.of(tensor), _held(name, config)),)
    return replace(adapter, updates=dict(sorted(updates.items())), ignored=tuple(rest.ignored), prompt=prompt)


def _module(
    module: str, parts: Mapping[str, StoredTensor], config: PeftConfig, wrappers: Mapping[str, int]
) -> dict[Site, tuple[Update, ...]]:
    """All updates of one module; PEFT nests wrappers as ``base_layer``."""
    clean = unwrapped(module)
    tokens = (_token_rows(clean, parts["tokens"], config),) if "tokens" in parts else ()
    if tokens and len(parts) == 1:
        return {Site(f"{clean}.weight"): tokens}
    a, b = (
        ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else ("lora_A.weight", "lora_B.weight")
    )
    for have, lack in ((a, b), (b, a)):
        if have in parts and lack not in parts:
            tensor = parts[have]
            raise MalformedError(
                f"{have.removesuffix('.weight')} without {lack.removesuffix('.weight')}",
                file=tensor.file.path,
                tensor=tensor.name,
            )
    if a not in parts:
        tensor = next(iter(parts.values()))
        raise MalformedError("belongs to a LoRA that has no factors", file=tensor.file.path, tensor=tensor.name)
    parameters = targeted_parameters(module, clean, config, wrappers, parts[a])
    if parameters:
        site, update = parameter_lora(module, clean, parts, config, wrappers, parameters)
        return {**({Site(f"{clean}.weight"): tokens} if tokens else {}), site: (update,)}
    embedding = a == "lora_embedding_A"
    in_attention = module.endswith(
        ".base_layer.out_proj"
    )  # inside a wrapped torch.nn.MultiheadAttention, whose alpha it has
    pattern_path = module.removesuffix(".base_layer.out_proj") if in_attention else clean
    lora = _lora(pattern_path, parts[a], parts[b], config, embedding=embedding)
    if in_attention:
        # PEFT adds this delta twice, attached as merged (its MultiheadAttention.merge adds it, then calls out_proj.merge):
        # it was trained at twice the scale.
        lora = lora.scaled(2.0)
    kernel = parts[a].shape[2:]
    kind: ModuleKind = "embedding" if embedding else "convolution" if kernel else "linear"
    site = Site(f"{clean}.weight", module_kind="attention output" if in_attention else kind, kernel=kernel)
    found: dict[Site, tuple[Update, ...]] = {site: (*tokens, _with_magnitude(lora, parts, config, embedding=embedding))}
    if "lora_B.bias" in parts:
        found[replace(site, path=f"{clean}.bias")] = (Offset(Factor.of(parts["lora_B.bias"]), lora.scale),)
    return found


def _lora(pattern_path: str, a: StoredTensor, b: StoredTensor, config: PeftConfig, *, embedding: bool) -> LoRA:
    """The factors as (rank, in) and (out, rank): convolutions flattened, embeddings transposed to (vocabulary, dim)."""
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise MalformedError(f"a factor of shape {list(a.shape)}", file=a.file.path, tensor=a.name)
    rank = a.shape[0]
    flat_b = b.shape[0], b.numel // max(b.shape[0], 1)
    if flat_b[1] != rank or rank == 0:
        raise FitError(
            f"B is {list(b.shape)}, but A has rank {rank} ({list(a.shape)})", file=b.file.path, tensor=b.name
        )
    scale, alpha = config.scale_of(pattern_path, rank), config.alpha_of(pattern_path)
    if embedding:
        return LoRA(
            A=Factor((b,), (rank, b.shape[0]), lambda t: t.T),
            B=Factor((a,), (a.shape[1], rank), lambda t: t.T),
            scale=scale,
            alpha=alpha,
        )
    return LoRA(A=Factor((a,), (rank, a.numel // rank)), B=Factor((b,), flat_b), scale=scale, alpha=alpha)


def _with_magnitude(
    lora: LoRA, parts: Mapping[str, StoredTensor], config: PeftConfig, *, embedding: bool
) -> LoRA | DoRA:
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is None:
        if config.dora:
            raise MalformedError(
                "use_dora is true, but this module has no magnitude vector",
                file=lora.A.tensors[0].path,
                tensor=lora.A.tensors[0].name,
            )
        return lora
    if not config.dora:
        raise MalformedError(
            "a magnitude vector, but use_dora is false", file=magnitude.file.path, tensor=magnitude.name
        )
    size = lora.shape[1 if embedding else 0]
    if magnitude.numel != size:
        raise FitError(
            f"{magnitude.numel} magnitudes for {size} {'columns' if embedding else 'rows'}",
            file=magnitude.file.path,
            tensor=magnitude.name,
        )
    return DoRA(lora, Factor((magnitude,), (size,)), per_row=not embedding)


def _token_rows(clean: str, tensor: StoredTensor, config: PeftConfig) -> TokenRows:
    indices = config.token_indices
    if isinstance(indices, Mapping):
        named = [rows for name, rows in indices.items() if f".{clean}".endswith(f".{name}")]
        indices = named[0] if len(named) == 1 else ()
    if len(tensor.shape) != 2 or len(indices) != tensor.shape[0]:
        raise MalformedError(
            f"{tensor.shape[0] if tensor.shape else 0} token rows for {len(indices)} indices",
            file=tensor.file.path,
            tensor=tensor.name,
        )
    return TokenRows(Factor.of(tensor), indices)


def _check_plain(name: str, tensor: StoredTensor, config: PeftConfig) -> None:
    """A whole parameter must be one that PEFT stores whole; anything else is somebody else's tensor."""
    module, _, leaf = name.rpartition(".")
    saved = any(ancestor.endswith(config.modules_to_save) for ancestor in _ancestors(module))
    embedding = leaf == "weight" and module.rpartition(".")[2] in _EMBEDDINGS
    bias = leaf == "bias" and (config.bias != "none")
    head = bool(HEADS & set(module.split("."))) and config.raw.get("task_type") in (
        "SEQ_CLS",
        "TOKEN_CLS",
        "QUESTION_ANS",
    )
    if not (saved or embedding or bias or head):
        raise MalformedError(
            "neither a factor of this kind nor a module the configuration lists",
            file=tensor.file.path,
            tensor=tensor.name,
            hint="is this a full model?" if not tensor.name.startswith(PREFIX) else None,
        )


def _held(name: str, config: PeftConfig) -> Held:
    """Where PEFT holds a parameter stored whole: it also saves embeddings that it did not train, when a vocabulary was resized."""
    module, _, leaf = name.rpartition(".")
    if any(ancestor.endswith(config.modules_to_save) for ancestor in _ancestors(module)):
        return "copy"
    if leaf == "bias":
        return "in place"
    return "copy" if HEADS & set(module.split(".")) else "carried"


def _ancestors(module: str) -> list[str]:
    """The module and all that contain it; PEFT matches the ends of such paths, so that ``norm`` takes ``input_layernorm`` too."""
    segments = module.split(".")
    return [".".join(segments[: i + 1]) for i in range(len(segments))]
