# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The imports of a source tree, read off its text: nothing is imported to find them.

Every statement counts, also in functions and under ``TYPE_CHECKING``, and so does
``import_module`` of a name that is written out, or begins so, under whatever name it was imported.
``from package import name`` leads to
``package.name`` where that is a module, else to the package's own ``__init__``.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

Graph = Mapping[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """The dotted name of each module of a package -> its file."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _literal(node: ast.expr) -> str:
    """The string that an expression is, or begins with."""
    if isinstance(node, ast.JoinedStr) and node.values:
        return _literal(node.values[0])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def named(tree: ast.AST, within: str) -> Iterator[tuple[str, str, int]]:
    """Each import of a module that lies in the package ``within``: the module that it names, a name
    taken from it or ``""``, and the line."""
    importers = {"import_module", "__import__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "importlib":
            importers |= {a.asname for a in node.names if a.asname and a.name in importers}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            parts = within.split(".")
            above = parts[: len(parts) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield source, alias.name, node.lineno
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = node.func.id if isinstance(node.func, ast.Name) else called
            given = [*node.args[:1], *(k.value for k in node.keywords if k.arg == "name")]
            if called in importers and given:
                name = _literal(given[0])
                level = len(name) - len(name.lstrip("."))
                above = within.split(".")[: len(within.split(".")) + 1 - level] if level else []
                yield ".".join([*above, name.strip(".")]), "", node.lineno


def import_graph(package: Path) -> dict[str, set[str]]:
    """Which modules of the package each of its modules imports."""
    there = modules(package)
    graph: dict[str, set[str]] = {}
    for module, path in there.items():
        within = module if path.name == "__init__.py" else module.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[module] = set()
        for source, name, _ in named(tree, within):
            for target in (f"{source}.{name}", source):
                if target in there and target != module:
                    graph[module].add(target)
                    break
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Sets of nodes each of which leads to each other one, sorted."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += graph[node]
        reached[start] = seen
    sets = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(s) for s in sets)


def room(module: str) -> str:
    """The first part below the package's name; the package itself and ``__main__`` are its own."""
    parts = module.split(".")
    return parts[0] if len(parts) == 1 or parts[1] == "__main__" else parts[1]


def room_graph(graph: Graph) -> dict[str, set[str]]:
    """Which other rooms each room imports."""
    result: dict[str, set[str]] = {room(m): set() for m in graph}
    for module, targets in graph.items():
        result[room(module)] |= {room(t) for t in targets} - {room(module)}
    return result


def faults(package: Path, floors: Mapping[str, int]) -> list[str]:
    """Where a package breaks the order of its rooms, in words: a room that has no floor, a circle,
    an import of a room that is not on a floor below."""
    graph = import_graph(package)
    rooms = room_graph(graph)
    found = [f"{r} is no room of the plan" for r in sorted(set(rooms) - set(floors))]
    found += [f"circle of modules: {', '.join(c)}" for c in circles(graph)]
    found += [f"circle of rooms: {', '.join(c)}" for c in circles(rooms)]
    for module, targets in sorted(graph.items()):
        here = floors.get(room(module))
        for target in sorted(targets):
            there = floors.get(room(target))
            if room(target) == room(module) or here is None or there is None:
                continue
            if there >= here:
                found.append(f"{module} imports {target}, which is not below it")
    return found


# State that all of a process shares, by what reads or writes it.
_SHARED = {
    "clear_param_store",
    "enable_validation",
    "get_param_store",
    "is_validation_enabled",
    "set_default_device",
    "set_default_dtype",
    "set_default_validate_args",
    "set_num_threads",
    "set_rng_seed",
    "set_rng_state",
    "validation_enabled",
}


def not_of_tensors(path: Path) -> list[str]:
    """What of a file does not belong into tensor code: all of Pyro but its distributions, and state
    that a whole process shares, but for what is seeded within ``fork_rng()``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # What is drawn on a copy of the generator's state leaves no mark.
    forked = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.With) and "fork_rng" in ast.unparse(block.items[0])
        for node in ast.walk(block)
    }
    found = []
    for source, name, line in named(tree, ""):
        full = f"{source}.{name}".rstrip(".")
        of_pyro = full.split(".")[0] == "pyro" and not full.startswith("pyro.distributions")
        if of_pyro or name in _SHARED:
            found.append(f"{path.name}:{line}: {full}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_pyro = isinstance(node.value, ast.Name) and node.value.id == "pyro"
            of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
            seeds = of_torch and node.attr == "manual_seed" and node not in forked
            if seeds or node.attr in _SHARED or (of_pyro and node.attr != "distributions"):
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Global):
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def from_test_files(path: Path, within: str) -> list[str]:
    """The imports of a file that lead to a test file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for source, name, line in named(tree, within):
        parts = f"{source}.{name}".split(".")
        if parts[0] == "tests" and any(part.startswith("test_") for part in parts):
            found.append(f"{path.name}:{line}: {source} {name}".rstrip())
    return found
