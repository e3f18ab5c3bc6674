"""The tree: each room imports only from rooms above it, and no name means two things."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import legocompress as lego

PACKAGE = Path(lego.__file__).parent
# From the ground up, as ARCHITECTURE.md lists them.
ROOMS = (
    "errors", "files", "spec", "lego", "state", "cluster", "models", "data", "compress",
    "calibrate", "kernels", "deploy", "quantize", "checkpoint", "finetune", "report", "export",
)  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports, by full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module == "legocompress":
                yield from (f"legocompress.{alias.name}" for alias in node.names)
            elif node.module.startswith("legocompress."):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("legocompress"))


def modules() -> dict[str, Path]:
    """Every module of the package but the facade, by full name."""
    paths = (path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
    names = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in paths}
    return {
        ".".join(("legocompress", *(part for part in parts if part != "__init__"))): path
        for path, parts in names.items()
    }


def test_a_room_imports_only_from_rooms_above_it() -> None:
    found = modules()
    rooms = {name.split(".")[1] for name in found}
    assert rooms == set(ROOMS)
    wrong = [
        f"{name} imports {target}"
        for name, path in found.items()
        for target in imports(path)
        if ROOMS.index(target.split(".")[1]) > ROOMS.index(name.split(".")[1])
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    found = modules()
    graph = {name: {t for t in imports(path) if t in found} for name, path in found.items()}
    for name, targets in graph.items():
        graph[name] = targets - {name, name.rpartition(".")[0]}  # a room exports its own files
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_module_has_the_name_of_a_public_function() -> None:
    public = set(lego.__all__)
    assert {name for name in modules() if name.rpartition(".")[2] in public} == set()
