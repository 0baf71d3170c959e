# SPDX-License-Identifier: Apache-2.0
"""Read an adapter in one file of weights into the canonical form, by the dialect of its format.

Names are not resolved: of a flat one only a base can tell the dots. Sites keep what the file has, without prefixes, and
`Adapter.spelling` how it was spelt, so that the same file can be written again without a base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.files import open_adapter_file
from surgery_formats.adapters.grammar.kinds import KINDS
from surgery_formats.adapters.grammar.kinds.kind import ReadUpdate
from surgery_formats.adapters.grammar.known_issues import stated_issues
from surgery_formats.adapters.grammar.leaves import LEAVES, NORMS_OF_FLUX, NOT_READ
from surgery_formats.adapters.grammar.module import ModuleTensors, malformed
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.adapters.grammar.spelling import Key, split_key
from surgery_formats.adapters.grammar.spelt_modules import SpeltModules
from surgery_formats.adapters.grammar.tools import stated_base, tool_of
from surgery_formats.canonical.adapter import Adapter, Ignored, Site
from surgery_formats.canonical.provenance import Provenance, ScaleSource
from surgery_formats.errors import FitError
from surgery_formats.models.families.denoisers import COMPONENTS, Denoiser, denoiser_of
from surgery_formats.models.known_files import refuse_known
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing, show
from surgery_formats.updates import Update

__all__ = ["read_weight_file"]

_SAID = {
    "reshape_weight": "states the shape that its factors have",
    "oft_R.scaled_oft": "says how its angles are scaled",
}
_BROKEN = "a broken export mangles keys like this; convert the original file"


def read_weight_file(path: Path, dialect: Dialect) -> Adapter:
    """Read one file. Only headers and scalars (alphas, switches) are read.

    Raises:
        NotFoundError, MalformedError: not such a file, or a module that lacks a factor.
        FitError: a kind that is not read.
    """
    shards = open_adapter_file(path)
    refuse_known(shards.shards[0].path, shards.tensors, networks=True)
    tensors = tuple(shards.tensors.values())
    metadata = dict(shards.shards[0].metadata)
    modules = _modules(tensors, dialect)
    family = denoiser_of(module.path for module in modules if module.component in (*COMPONENTS, ""))
    if family:  # bare names of a diffusion network are those of a pipeline's denoiser
        modules = [module if module.component else replace(module, component="denoiser") for module in modules]
    scales = StatedScales.of(metadata, with_alphas=any("alpha" in module.parts for module in modules), path=path)
    updates: dict[Site, tuple[Update, ...]] = {}
    sources: Counter[ScaleSource] = Counter()
    ignored: list[Ignored] = []
    for module in modules:
        made = tuple(_made(module, scales))
        for read in made:
            kernel = read.kernel
            site = Site(
                f"{module.path}.{read.parameter}",
                module.component,
                module.flat,
                "convolution" if kernel else "",
                kernel,
                read.parameter == "weight" and _grows(module, family),
            )
            updates[site] = (*updates.get(site, ()), read.update)
        sources.update(read.scale for read in made if read.parameter == "weight")
        used = {tensor.name for read in made for tensor in read.update.tensors}
        alpha = module.parts.get("alpha")
        if alpha is not None and alpha.name not in used:
            ignored.append(Ignored(alpha, "an alpha without low-rank factors scales nothing"))
        ignored += [Ignored(module.parts[role], why) for role, why in _SAID.items() if role in module.parts]
    kinds = sorted({update.kind for chain in updates.values() for update in chain})
    return Adapter(
        path=path,
        format=dialect.name,
        kind=" + ".join(kinds),
        updates=dict(sorted(updates.items())),
        tensors=tensors,
        ignored=tuple(ignored),
        base_name=metadata.get("ss_sd_model_name", ""),
        spelling={dialect.name: SpeltModules.of(modules).as_values()},
        metadata=metadata,
        stated_issues=tuple(stated_issues(updates, scales, metadata, flat=dialect.flat)),
        provenance=Provenance(
            tool_of(shards.tensors, metadata), family.name if family else "", dict(sources), stated_base(metadata)
        ),
    )


def _modules(tensors: Iterable[StoredTensor], dialect: Dialect) -> list[ModuleTensors]:
    """The tensors of every module, in the order of the file."""
    modules: dict[str, ModuleTensors] = {}
    for tensor in tensors:
        key = _split(tensor, dialect)
        if 0 in tensor.shape:
            raise malformed(tensor, "is empty", hint="saved from a sharded model?")
        prefix = key.prefix
        module = ModuleTensors(key.module, prefix.component, prefix.flat, key.stem)
        module = modules.setdefault(module.name, module)
        role = LEAVES[key.leaf]
        if role in module.parts or key.stem != module.stem:
            other = module.parts.get(role) or next(iter(module.parts.values()))
            raise malformed(tensor, f"names what '{show(other.name)}' names, in another spelling")
        module.parts[role] = tensor
        module.leaves[role] = key.leaf
    return [_with_whole_parameters(module) for module in modules.values()]


def _with_whole_parameters(module: ModuleTensors) -> ModuleTensors:
    """A lone ``scale``, or the ``weight`` of a norm, is no number or (IA)^3 but the parameter itself.

    BFL's control LoRAs have norms so, and those that diffusers trains.
    """
    called = "scale" if module.path.endswith(NORMS_OF_FLUX) else "weight" if ".norm" in module.path else ""
    if module.flat or module.parts.keys() != {called} or len(module.parts[called].shape) != 1:
        return module
    role = f"whole_{called}"
    return replace(module, parts={role: module.parts[called]}, leaves={role: module.leaves[called]})


def _grows(module: ModuleTensors, family: Denoiser | None) -> bool:
    """Whether the weight may have to grow: the file says so, or it is the input of a network of which there are wider ones."""
    return "reshape_weight" in module.parts or (
        family is not None and "down" in module.parts and module.path.replace(".", "_") in family.inputs
    )


def _split(tensor: StoredTensor, dialect: Dialect) -> Key:
    key = split_key(tensor.name, dialect.prefixes)
    if key is None:
        known = any(tensor.name.startswith(prefix.text) for prefix in dialect.prefixes)
        if known:
            raise malformed(tensor, "not a key of this format", hint=_BROKEN)
        raise malformed(tensor, f"a key without one of the prefixes {listing((p.text for p in dialect.prefixes), 12)}")
    if "lora_magnitude_vector" in key.module or key.module.endswith(("_lora_A", "_lora_B")):
        raise malformed(tensor, "not a key of this format", hint=_BROKEN)
    if key.leaf in NOT_READ:
        raise FitError(f"{NOT_READ[key.leaf]} is not read yet", file=tensor.file.path, tensor=tensor.name)
    if key.leaf not in LEAVES:
        raise FitError(f"the parameter '{show(key.leaf)}' is not known", file=tensor.file.path, tensor=tensor.name)
    return key


def _made(module: ModuleTensors, scales: StatedScales) -> Iterable[ReadUpdate]:
    """The updates of one module, by all groups of leaves that it has."""
    have = [kind for kind in KINDS if kind.marks & module.parts.keys()]
    left = {role: tensor for role, tensor in module.parts.items() if not any(role in kind.roles for kind in have)}
    left.pop("alpha", None)
    for role, tensor in left.items():
        raise malformed(tensor, "without its 'lora_down.weight'" if role == "dora_scale" else f"nothing uses '{role}'")
    for kind in have:
        yield from kind.read(module, scales)
