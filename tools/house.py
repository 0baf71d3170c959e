# SPDX-License-Identifier: Apache-2.0
"""Count how the house is built: ``python tools/house.py [TREE]``.

For every room: its modules, lines, levels (the longest chain of imports inside it) and imports. For the whole product:
imports that go upwards, circles, class names that stand for several classes, and lines of code. Files are only parsed,
so it runs on any checkout.

An import goes upwards if its target is the face (``__init__``) of a package that its module lies in, if it closes a
circle, or if it points to a room that ``[tool.importlinter]`` of the checkout puts above.
"""

from __future__ import annotations

import argparse
import ast
import tomllib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOTS = {"surgery": "", "formats/surgery_formats": "formats/", "cli/surgery_cli": "cli/"}
WITH_FLOORS = ("surgery.onnx",)  # a room of several rooms

Graph = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Module:
    """One file of the product."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def room(self) -> str:
        """The folder it lies in, as a dotted name; modules beside rooms belong to their package's ground floor."""
        parts = self.name.split(".")
        if self.path.name == "__init__.py":
            parts.append("__init__")
        depth = 3 if self.name.startswith(WITH_FLOORS) else 2
        return ".".join(parts[: min(depth, len(parts) - 1)])


def read_modules(tree: Path) -> dict[str, Module]:
    """Every module of the product, by dotted name."""
    modules: dict[str, Module] = {}
    for root, prefix in ROOTS.items():
        for path in sorted((tree / root).rglob("*.py")):
            text = path.read_text()
            dotted = str(path.relative_to(tree / prefix))[: -len(".py")].replace("/", ".").removesuffix(".__init__")
            modules[dotted] = Module(dotted, path, ast.parse(text), text.count("\n"))
    return modules


def import_graph(modules: Mapping[str, Module]) -> dict[str, frozenset[str]]:
    """From each module to the modules of the product it imports, inside functions and for type checkers too."""
    graph: dict[str, frozenset[str]] = {}
    for name, module in modules.items():
        targets: set[str] = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                targets.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = (f"{node.module}.{alias.name}" for alias in node.names)
                targets.update(dotted if dotted in modules else node.module for dotted in whole)
        graph[name] = frozenset(target for target in targets if target in modules and target != name)
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def levels(graph: Graph) -> int:
    """Modules on the longest chain of imports; a circle counts once."""
    in_circle = {name: circle[0] for circle in circles(graph) for name in circle}
    merged: dict[str, set[str]] = defaultdict(set)
    for name, targets in graph.items():
        at = in_circle.get(name, name)
        merged[at] |= {in_circle.get(target, target) for target in targets} - {at}
    heights: dict[str, int] = {}

    def height(node: str) -> int:
        if node not in heights:
            heights[node] = 1 + max((height(target) for target in merged[node]), default=0)
        return heights[node]

    return max((height(node) for node in list(merged)), default=0)


def declared_layers(tree: Path) -> list[list[frozenset[str]]]:
    """Each contract's layers from top to bottom; a layer may hold several rooms side by side."""
    settings = tomllib.loads((tree / "pyproject.toml").read_text())
    contracts = settings.get("tool", {}).get("importlinter", {}).get("contracts", [])
    return [
        [frozenset(room.strip() for room in layer.split("|")) for layer in contract["layers"]]
        for contract in contracts
        if contract["type"] == "layers"
    ]


def upwards(graph: Graph, layers: list[list[frozenset[str]]]) -> list[tuple[str, str]]:
    """Imports that point upwards."""
    closing = {
        (name, target)
        for circle in circles(graph)
        for name in circle[1:]
        for target in graph[name]
        if target in circle and target < name
    }

    def level(name: str, contract: list[frozenset[str]]) -> int | None:
        return next(
            (i for i, rooms in enumerate(contract) if any(f"{name}.".startswith(f"{room}.") for room in rooms)), None
        )

    def is_upwards(name: str, target: str) -> bool:
        if name.startswith(f"{target}.") or (name, target) in closing:
            return True
        pairs = ((level(name, contract), level(target, contract)) for contract in layers)
        return any(mine is not None and other is not None and other < mine for mine, other in pairs)

    return [(name, target) for name in sorted(graph) for target in sorted(graph[name]) if is_upwards(name, target)]


def reused_classes(modules: Mapping[str, Module]) -> dict[str, list[str]]:
    """Names that several classes have, private ones included."""
    homes: dict[str, list[str]] = defaultdict(list)
    for name, module in modules.items():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(name)
    return {name: where for name, where in sorted(homes.items()) if len(where) > 1}


def function_lengths(modules: Mapping[str, Module]) -> dict[str, int]:
    """Lines of every function's body, without its docstring; those of functions inside count for both."""
    lengths: dict[str, int] = {}
    for name, module in modules.items():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[ast.get_docstring(node, clean=False) is not None :]
                lines = 1 + (body[-1].end_lineno or 0) - body[0].lineno if body else 0
                lengths[f"{name}.{node.name}:{node.lineno}"] = lines
    return lengths


def kind_tests(modules: Mapping[str, Module]) -> Counter[str]:
    """Number of tests for a kind of update or of storage, by module outside their own rooms.

    A test is an ``isinstance``, a comparison with a class or with its name in the field (``update.kind == "LoRA"``), or
    a ``case`` of a match.
    """
    kinds = known_kinds(modules)
    words = {
        node.value.value
        for name, module in modules.items()
        if ".updates." in name
        for node in ast.walk(module.tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "kind"
        if isinstance(node.value, ast.Constant)
    }

    def tests(node: ast.AST) -> bool:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            return _names(node.args[-1], kinds)
        if isinstance(node, ast.MatchClass):
            return _names(node.cls, kinds)
        if not isinstance(node, ast.Compare):
            return False
        sides = (node.left, *node.comparators)
        asks = any(isinstance(side, ast.Attribute) and side.attr == "kind" for side in sides)
        named = any(isinstance(inner, ast.Constant) and inner.value in words for s in sides for inner in ast.walk(s))
        return any(_names(side, kinds) for side in sides) or (asks and named)

    return +Counter(
        {
            name: sum(map(tests, ast.walk(module.tree)))
            for name, module in modules.items()
            if not name.startswith(("surgery_formats.updates", "surgery_formats.storage"))
        }
    )


def _names(node: ast.AST, kinds: frozenset[str]) -> bool:
    return any(isinstance(inner, ast.Name) and inner.id in kinds for inner in ast.walk(node))


def known_kinds(modules: Mapping[str, Module]) -> frozenset[str]:
    """Classes of the updates room, but for the protocols and what every kind is made of, and the plain storage."""
    return frozenset(
        node.name
        for name, module in modules.items()
        if name == "surgery_formats.storage.plain" or (".updates." in name and not name.endswith((".base", ".update")))
        for node in module.tree.body
        if isinstance(node, ast.ClassDef)
    )


def silent_tests(tree: Path) -> list[str]:
    """Tests that assert nothing, neither themselves nor through a function of ``tests`` of which any of that name does."""
    tests: dict[str, set[str]] = {}
    helpers: dict[str, set[str]] = defaultdict(set)
    for path in sorted((tree / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                tests[f"{path.relative_to(tree)}: {node.name}"] = _judged_by(node)
            elif isinstance(node, ast.FunctionDef):
                helpers[node.name] |= _judged_by(node)
    judging = {""}
    while more := {name for name, called in helpers.items() if called & judging} - judging:
        judging |= more
    return [name for name, called in tests.items() if not called & judging]


def _judged_by(function: ast.FunctionDef) -> set[str]:
    """Names of what it calls; an empty one stands for what fails a test by itself."""
    inner = list(ast.walk(function))
    calls = [
        node.func.value if isinstance(node.func, ast.Subscript) else node.func
        for node in inner
        if isinstance(node, ast.Call)
    ]
    names = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "_") for call in calls}
    fails = any(name in ("raises", "warns", "fail", "CHECKS") or "assert" in name for name in names)
    return names | ({""} if fails or any(isinstance(node, ast.Assert) for node in inner) else set())


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path, nargs="?", default=Path(__file__).parents[1])
    tree = parser.parse_args().tree
    modules = read_modules(tree)
    graph = import_graph(modules)
    rooms: dict[str, list[Module]] = defaultdict(list)
    for module in modules.values():
        rooms[module.room].append(module)
    print(f"{'room':42} {'modules':>7} {'lines':>6} {'levels':>6} {'imports':>7}")
    for room, members in sorted(rooms.items()):
        names = {module.name for module in members}
        inside = {name: graph[name] & names for name in names}
        lines = sum(module.lines for module in members)
        edges = sum(len(targets) for targets in inside.values())
        print(f"{room:42} {len(members):7} {lines:6} {levels(inside):6} {edges:7}")
    up, round_trips, reused = upwards(graph, declared_layers(tree)), circles(graph), reused_classes(modules)
    tests = kind_tests(modules)
    inside = {name: count for name, count in tests.items() if ".adapters." in name}
    outside = {name: count for name, count in tests.items() if name not in inside}
    sizes = sorted(module.lines for module in modules.values())
    print(
        f"\nlines of product code: {sum(sizes):,} in {len(sizes)} modules (median {sizes[len(sizes) // 2]}, largest {sizes[-1]})"
    )
    name, longest = max(function_lengths(modules).items(), key=lambda item: item[1])
    print(f"longest function: {longest} lines, {name}")
    print(f"imports upwards: {len(up)}", *(f"  {name} -> {target}" for name, target in up), sep="\n")
    print(f"circles: {len(round_trips)}", *(f"  {', '.join(circle)}" for circle in round_trips), sep="\n")
    print(
        f"reused class names: {len(reused)}", *(f"  {n}: {', '.join(where)}" for n, where in reused.items()), sep="\n"
    )
    print(f"tests for a kind of update or storage in adapters: {sum(inside.values())} in {len(inside)} modules")
    print(
        f"outside updates, storage and adapters: {sum(outside.values())}",
        *(f"  {name}: {n}" for name, n in outside.items()),
        sep="\n",
    )


if __name__ == "__main__":
    main()
