# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors as a tree of modules in which equal layers appear once.

Only names, shapes and types are read. Numbered siblings with equal contents become one node (``model.layers.0-15``,
16 times); layers that differ (dense ones before those with experts) stay apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from surgery_formats.models.component import Component
from surgery_formats.storage.parameter import Parameter

__all__ = ["Node", "Totals", "leaves", "module_graph", "role_totals", "stored_ties"]

_DEPTH = 32  # segments of a name that become levels; what is left of a deeper (hostile) name stays one label
# What batch normalisation keeps beside its parameters; no optimiser trains it.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# The noise of every step, which the checkpoints of latent diffusion keep beside the networks (CompVis,
# ``DDPM.register_schedule``).
_SCHEDULE = frozenset(
    [
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ]
)
_ORDER = (
    "embedding",
    "modulation",
    "attention",
    "module",
    "block",
    "other",
    "convolution",
    "mlp",
    "expert",
    "attention+mlp",
    "projection",
    "norm",
    "head",
    "output",
    "buffer",
)
_Role = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Node:
    """A module or a tensor, or with `repeated` above 1 that many equal modules or tensors.

    Numbers are totals over all repetitions, so a node's are the sums of its children's.

    Attributes:
        name: Path with dots, numbers of equal siblings as ranges: ``model.layers.0-15.self_attn.q_proj.weight``. It
            begins with the parent's. Untrusted text.
        role: ``attention``, ``mlp``, ``expert``, ``embedding``, ``head``, ``norm``, ``other``, and those of diffusion networks
            (`surgery_formats.models.families.diffusion_roles`); of modules also ``block`` (numbered), ``module`` (of
            several roles) and ``model`` (the root); of tensors also ``buffer`` (computed or counted, not trained).
        parameters: Numbers stored, ties counted once, buffers not at all.
        nbytes: Bytes stored.
        dtypes: Stored types, sorted; usually one.
        shape: Of each tensor; None for modules.
        repeated: How many tensors or modules of the checkpoint this node stands for.
        tied: The name whose bytes this tensor shares; it then counts no parameters.
        children: Modules and tensors below, in the order of the forward pass as far as roles tell.
    """

    name: str
    role: str
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]
    shape: tuple[int, ...] | None = None
    repeated: int = 1
    tied: str = ""
    children: tuple[Node, ...] = ()

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Node]]:
        """``(depth, node)`` of this node and all below, parents first."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)


@dataclass(frozen=True, slots=True)
class Totals:
    """How many tensors, with how many numbers and bytes."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0

    def plus(self, node: Node) -> Totals:
        """These totals with one more leaf added."""
        return Totals(self.tensors + node.repeated, self.parameters + node.parameters, self.nbytes + node.nbytes)


def stored_ties(component: Component) -> dict[str, str]:
    """``{alias: source}`` of names that are one parameter: by place, by family, and heads stored again though tied."""
    ties = dict(component.aliases)
    if component.tied and component.head in component.parameters and component.embedding:
        ties.setdefault(component.head, component.embedding)
    return ties


def module_graph(component: Component) -> Node:
    """The tree of one component's modules.

    Tied names that are not stored appear as tensors of no bytes, with `Node.tied` set.
    """
    ties = stored_ties(component)
    buffers = tuple(f".{leaf}" for leaf in (*component.family.derivable, *_STATISTICS))
    root = _ModuleBranch()
    for name, weight in component.parameters.items():
        computed = f".{name}".endswith(buffers) or name in _SCHEDULE
        tied = ties.get(name, "")
        shared = bool(tied) and _places(weight) == _places(component.parameters[tied])
        numbers = 0 if tied or computed else weight.numel
        kept = 0 if shared else weight.nbytes
        role = "buffer" if computed else ""
        root.at(name).leaf = Node("", role, numbers, kept, (weight.storage.kind,), weight.sizes, tied=tied)
    for alias, source in ties.items():
        if alias not in component.parameters and source in component.parameters:
            stored = component.parameters[source]
            root.at(alias).leaf = Node("", "", 0, 0, (stored.storage.kind,), stored.sizes, tied=source)
    root.sign({})
    children = tuple(_children(root, None, 1, component.role))
    return _sum("", "model", children, 1)


def _places(weight: Parameter) -> list[tuple[int, int, int, int]]:
    return [source.place for source in weight.sources]


def leaves(node: Node) -> Iterator[Node]:
    """The tensors at and below `node`."""
    return (below for _, below in node.walk() if below.shape is not None)


def role_totals(nodes: Iterable[Node]) -> Mapping[str, Totals]:
    """Totals per role over tensors; roles in the order of the forward pass."""
    totals: dict[str, Totals] = {}
    for node in nodes:
        totals[node.role] = totals.get(node.role, Totals()).plus(node)
    return {role: totals[role] for role in _ORDER if role in totals}


@dataclass(slots=True)
class _ModuleBranch:
    leaf: Node | None = (
        None  # without its name, with the numbers of all that are taken together, and with a role only if that is no matter of its name
    )
    below: dict[str, _ModuleBranch] = field(default_factory=dict)
    signature: int = 0

    def at(self, name: str) -> _ModuleBranch:
        branch = self
        for segment in name.split(".", _DEPTH - 1):
            branch = branch.below.setdefault(segment, _ModuleBranch())
        return branch

    def sign(self, known: dict[object, int]) -> int:
        """Number the branches so that equal ones get equal numbers; the name of a branch itself does not count."""
        # Bytes of codes may differ by the few of a description stored beside them, which makes no other module.
        leaf = self.leaf and (self.leaf.shape, self.leaf.dtypes, self.leaf.nbytes > 0, bool(self.leaf.tied))
        content = (leaf, tuple(sorted((segment, branch.sign(known)) for segment, branch in self.below.items())))
        self.signature = known.setdefault(content, len(known))
        return self.signature


def _children(branch: _ModuleBranch, path: str | None, times: int, role: _Role) -> list[Node]:
    """Nodes below `branch`; numbered ones that are alike become one."""
    prefix = "" if path is None else f"{path}."
    groups: dict[tuple[str, int], list[str]] = {}
    for segment, below in branch.below.items():
        groups.setdefault(("", below.signature) if _numbered(segment) else (segment, -1), []).append(segment)
    nodes = [
        _node(
            _together([branch.below[member] for member in members]),
            prefix + _ranges(members),
            times * len(members),
            role,
        )
        for members in groups.values()
    ]
    if branch.leaf is not None and path is not None:  # a tensor whose name is also a module's
        nodes.append(_tensor(branch.leaf, path, times, role))
    return sorted(nodes, key=lambda node: (_ORDER.index(node.role), _natural(node.name)))


def _together(branches: Sequence[_ModuleBranch]) -> _ModuleBranch:
    """Branches that are alike as one, with the numbers of all."""
    first = branches[0]
    if len(branches) == 1:
        return first
    found = [branch.leaf for branch in branches if branch.leaf is not None]
    below = {segment: _together([branch.below[segment] for branch in branches]) for segment in first.below}
    numbers, kept = sum(leaf.parameters for leaf in found), sum(leaf.nbytes for leaf in found)
    return _ModuleBranch(replace(found[0], parameters=numbers, nbytes=kept) if found else None, below, first.signature)


def _node(branch: _ModuleBranch, path: str, times: int, role_of: _Role) -> Node:
    if branch.leaf is not None and not branch.below:
        return _tensor(branch.leaf, path, times, role_of)
    children = _children(branch, path, times, role_of)
    last = path.rpartition(".")[2]
    if len(children) == 1 and not last[:1].isdigit():  # a module of one part is shown as that part
        return children[0]
    role = role_of(f"{path}.weight")
    if role == "other" or (
        role == "norm" and all(child.role != role for child in children)
    ):  # modulated norms of diffusers
        role = "block" if last[:1].isdigit() else "module"
    return _sum(path, role, tuple(children), times)


def _tensor(leaf: Node, path: str, times: int, role_of: _Role) -> Node:
    return replace(leaf, name=path, role=leaf.role or role_of(path), repeated=times)


def _sum(path: str, role: str, children: tuple[Node, ...], times: int) -> Node:
    return Node(
        path,
        role,
        sum(child.parameters for child in children),
        sum(child.nbytes for child in children),
        tuple(sorted({dtype for child in children for dtype in child.dtypes})),
        repeated=times,
        children=children,
    )


def _numbered(segment: str) -> bool:
    """Plain decimal numbers only: ``01`` and ``1`` must not meet in one range."""
    return segment.isascii() and segment.isdecimal() and len(segment) < 9 and str(int(segment)) == segment


def _ranges(members: list[str]) -> str:
    """``0-2,5`` of ``["0", "1", "2", "5"]``; a name that is no number as it is."""
    if len(members) == 1:
        return members[0]
    runs: list[list[int]] = []
    for number in sorted(map(int, members)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Numbers inside a name sort as numbers."""
    parts = re.split(r"(\d{1,18})", name)
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts)]
