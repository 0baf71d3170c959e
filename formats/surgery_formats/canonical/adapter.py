# SPDX-License-Identifier: Apache-2.0
"""The canonical form of an adapter. Every format is a reader into it and a writer out of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.canonical.provenance import Provenance
from surgery_formats.files.raw import File
from surgery_formats.tensors.tensor import Tensor, origin
from surgery_formats.updates import Update, is_directed, is_refusing

__all__ = ["Adapter", "Ignored", "ModuleKind", "Site", "WeightedAdapter"]

ModuleKind = Literal["", "linear", "embedding", "convolution", "norm", "experts", "attention output"]
"""What kind of module holds a parameter, as far as the adapter's file tells; empty where only the base can.

``linear``
    A linear layer, however it is stored: the ``Conv1D`` of GPT-2 too, which only the base tells apart.
``convolution``
    Factors have the kernel flattened into their columns; `Site.kernel` has its sizes.
``experts``
    A parameter of its own that stacks experts, ``(E, rows, cols)``.
``attention output``
    The output projection inside a ``torch.nn.MultiheadAttention``, of which the whole was wrapped.
"""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A parameter as an adapter's file names it.

    Attributes:
        path: ``model.layers.0.self_attn.q_proj.weight``, ``...experts.gate_up_proj``, or a path that kohya flattened
            with underscores: ``down_blocks_0_attentions_0_proj_in.weight``.
        component: Part of a pipeline (``unet``, ``text_encoder``), or empty.
        flat: Whether the dots of the module path were written as underscores, so that only the base can tell it apart.
        module_kind: Kind of the parameter's module. It is no part of the site's identity.
        kernel: Sizes of a convolution's kernel, ``(k, k)``; 0 is a size that the file does not have. Empty for other
            modules.
        grows: Whether the weight may get more columns than the base has, which are zero before the updates: the input of a
            network that is given more channels. It is no part of the site's identity.
    """

    path: str
    component: str = ""
    flat: bool = False
    module_kind: ModuleKind = field(default="", compare=False)
    kernel: tuple[int, ...] = field(default=(), compare=False)
    grows: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.component}:{self.path}" if self.component else self.path


@dataclass(frozen=True, slots=True)
class Ignored:
    """A stored tensor that does nothing to the base, and why.

    Attributes:
        tensor: The tensor.
        reason: Why.
        adapter: Number of its adapter among several that are bound together, from 0; None where there is one.
    """

    tensor: Tensor
    reason: str
    adapter: int | None = None

    @property
    def label(self) -> str:
        """``number:name`` of one of several adapters, which may have tensors of one name."""
        return self.tensor.name if self.adapter is None else f"{self.adapter}:{self.tensor.name}"


def _nothing_unmet(parameters: Collection[str], changed: Collection[str]) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, slots=True, repr=False)
class Adapter:
    """Everything that was trained for a base, before that base is known.

    Attributes:
        path: File or folder it was read from.
        format: Name of the format (``peft``, ``kohya``, ``mlx``).
        kind: What the file says it is (``LORA``, ``PROMPT_TUNING``).
        updates: What happens to each parameter, in order.
        tensors: Every stored tensor of the adapter.
        ignored: Tensors that have no effect and are meant to have none.
        new_modules: Module names that the base may lack: heads added for a task (``score``, ``classifier``).
        copied_modules: Paths of modules that are stored as a trained copy with all their parameters, where known.
        prompt: Virtual tokens; the updates of such an adapter are the heads that were trained beside them.
        base_name: The base it says it was trained on, or empty.
        base_id: Content id of that base, where recorded.
        config: The format's own configuration, for writers and reports; only plain JSON values.
        metadata: Free strings that must survive a conversion (``ss_*``, ``modelspec.*``).
        side_files: Tokenizer files and the like beside the adapter, or in folders beside it.
        stated_issues: Known issues that headers and configuration show (a missing alpha, a version that writes wrong
            scales).
        examine: Returns the known issues that only values show; see `known_issues`.
        unmet: Returns what the names of a base's parameters, and of those that the adapter changes, show of promises that
            its file does not keep: biases, targets and saved modules that stay as they are.
        optional: Sites that a base need not have: biases that follow their weight.
        keeps_ties: Whether updates of the embedding also apply to a tied head (mlx-lm), and not to the embedding alone
            (PEFT).
        task: What the model with the adapter does, as the Hub names it (``text-classification``); empty where the file
            does not tell.
        stored_transposed: Whether the file says that its base stores the weights of linear layers as ``(in, out)``.
        provenance: What the file tells of its making, for reports.
        spelling: How files spell its modules, as plain values, by the format of the files: for that format's writer, which
            writes them again as they were.
        made: Digest of what was made of its files, and is not written; empty for the files as they are.
    """

    path: Path
    format: str
    kind: str
    updates: Mapping[Site, tuple[Update, ...]]
    tensors: tuple[Tensor, ...]
    ignored: tuple[Ignored, ...] = ()
    new_modules: frozenset[str] = frozenset()
    copied_modules: frozenset[str] = frozenset()
    prompt: SoftPrompt | None = None
    base_name: str = ""
    base_id: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    side_files: tuple[Path, ...] = ()
    stated_issues: tuple[str, ...] = ()
    examine: Callable[[], tuple[str, ...]] = tuple
    unmet: Callable[[Collection[str], Collection[str]], tuple[str, ...]] = _nothing_unmet
    optional: frozenset[Site] = frozenset()
    keeps_ties: bool = False
    task: str = ""
    stored_transposed: bool = False
    provenance: Provenance = field(default_factory=Provenance)
    spelling: Mapping[str, Any] = field(default_factory=dict)
    made: str = ""

    def __repr__(self) -> str:
        return f"<Adapter {str(self.path)!r}: {self.format} {self.kind}, {len(self.updates)} updates>"

    @property
    def kind_name(self) -> str:
        """`kind`; DORA for a DoRA, which PEFT's files call a LORA with a switch."""
        directed = self.kind == "LORA" and any(
            is_directed(update) for chain in self.updates.values() for update in chain
        )
        return "DORA" if directed else self.kind

    def __hash__(self) -> int:
        return hash((self.path, self.format, self.kind))  # so that it can be the key of a weight

    def __mul__(self, weight: float) -> WeightedAdapter:
        """This adapter at `weight` times its strength: ``adapter * 0.7``, ``-0.3 * adapter``, ``-adapter``."""
        return WeightedAdapter(self, 1.0).__mul__(weight)

    __rmul__ = __mul__

    def __neg__(self) -> WeightedAdapter:
        return self * -1.0

    @property
    def files(self) -> tuple[File, ...]:
        """The files its tensors lie in."""
        stored = (source for tensor in self.tensors for source in tensor.sources)
        return tuple({source.file.identity: source.file for source in stored}.values())

    @property
    def files_beside(self) -> dict[str, Path]:
        """Its side files by their names relative to its folder."""
        return {path.relative_to(self.path).as_posix(): path for path in self.side_files}

    @property
    def parameters(self) -> int:
        """Trained numbers: the elements of every tensor that does something."""
        dead = {id(entry.tensor) for entry in self.ignored}
        return sum(tensor.numel for tensor in self.tensors if id(tensor) not in dead)

    @property
    def unmergeable(self) -> frozenset[Site]:
        """Sites with updates that no weight can hold."""
        return frozenset(site for site, chain in self.updates.items() if any(is_refusing(update) for update in chain))

    def shares_factors(self, site: Site) -> bool:
        """Whether a site is of a packed slot of a graph, ``q_proj+k_proj+v_proj``: no module of a model, and no weight by itself."""
        return self.format == "onnx-adapter" and "+" in site.path

    def known_issues(self) -> tuple[str, ...]:
        """What makes this adapter easy to use wrongly; reads at most one factor."""
        return (*self.stated_issues, *self.examine())

    def only(self, sites: Iterable[Site]) -> Adapter:
        """The updates at `sites` alone, without the stored tensors that no other update uses."""
        kept = set(sites)
        out = {origin(t) for site, chain in self.updates.items() if site not in kept for u in chain for t in u.tensors}
        out -= {origin(t) for site in kept for update in self.updates[site] for t in update.tensors}
        return replace(
            self,
            updates={site: chain for site, chain in self.updates.items() if site in kept},
            tensors=tuple(tensor for tensor in self.tensors if origin(tensor) not in out),
        )

    def unconsumed(self) -> tuple[Tensor, ...]:
        """Stored tensors that no update uses and no reason excuses: must be empty (law 1)."""
        used = {origin(tensor) for chain in self.updates.values() for update in chain for tensor in update.tensors}
        used |= {origin(entry.tensor) for entry in self.ignored}
        used |= {origin(self.prompt.table)} if self.prompt else set()
        return tuple(tensor for tensor in self.tensors if origin(tensor) not in used)


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter and what its updates are multiplied by; made by ``adapter * 0.7``."""

    adapter: Adapter
    weight: float

    @property
    def name(self) -> str:
        """For messages."""
        return self.adapter.path.name

    def __mul__(self, weight: float) -> WeightedAdapter:
        """The weights multiply."""
        if isinstance(weight, bool) or not isinstance(weight, Real):
            return NotImplemented
        return replace(self, weight=self.weight * float(weight))

    __rmul__ = __mul__

    def __neg__(self) -> WeightedAdapter:
        return self * -1.0
