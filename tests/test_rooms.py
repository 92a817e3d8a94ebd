"""The rooms of the house: which may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# from the ground up: a room imports itself and what stands before it
TOP = ("convert", "measure", "uptrain", "pipeline", "cli")
CONVERT = (
    "errors",
    "printable",
    "runtime",
    "device",
    "parallel",
    "algebra",
    "checkpoint",
    "architectures",
    "translations",
    "text",
    "calibration",
    "plan",
    "methods",
    "describe",
    "cache_check",
    "record",
    "execute",
    "conversion",
)
UPTRAIN = (
    "recipe",
    "schedule",
    "settings",
    "data",
    "estimate",
    "launcher",
    "losses",
    "teacher",
    "inputs",
    "job",
    "models",
    "rundir",
    "checks",
    "observation",
    "training",
    "run",
    "sweep",
    "request",
    "plan",
)
OUTSIDE_OF_ALGEBRA = ("torch", "__future__", "collections", "dataclasses", "functools", "itertools", "types", "typing")


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """What a file imports, as parts of a name: ("convert", "algebra", "heads"), or ("torch",)."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            named = (*above, *(node.module.split(".") if node.module else ()))
            yield from ((*named, alias.name) for alias in node.names) if not node.module else (named,)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield tuple(node.module.split("."))


def uphill(folder: Path, rooms: tuple[str, ...]) -> list[str]:
    """The imports of a folder's files that lead to a room that stands above their own."""
    prefix = folder.relative_to(ROOT).parts
    found = []
    for path in sorted(folder.rglob("*.py")):
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imported(path):
            if name[: len(prefix)] == prefix and len(name) > len(prefix):
                room = name[len(prefix)]
                if room not in rooms or rooms.index(room) > rooms.index(own):
                    found.append(f"{path.relative_to(ROOT)} imports {'.'.join(name)}")
    return found


def test_folders_import_downhill_only() -> None:
    assert [wrong for top in TOP for wrong in uphill_of_top(top)] == []


def uphill_of_top(top: str) -> list[str]:
    allowed = {*TOP[: TOP.index(top) + 1], "configs"}
    return [
        f"{path.relative_to(ROOT)} imports {'.'.join(name)}"
        for path in sorted((ROOT / top).rglob("*.py"))
        for name in imported(path)
        if name[0] in (*TOP, "configs") and name[0] not in allowed
    ]


@pytest.mark.parametrize(("folder", "rooms"), [("convert", CONVERT), ("uptrain", UPTRAIN)])
def test_rooms_of_a_folder_import_downhill_only(folder: str, rooms: tuple[str, ...]) -> None:
    assert uphill(ROOT / folder, rooms) == []


@pytest.mark.parametrize(("folder", "rooms"), [("convert", CONVERT), ("uptrain", UPTRAIN)])
def test_every_room_of_a_folder_is_in_the_list(folder: str, rooms: tuple[str, ...]) -> None:
    there = {path.name.removesuffix(".py") for path in (ROOT / folder).iterdir()}
    assert there - {"__init__", "__pycache__", "py.typed"} == set(rooms)


@pytest.mark.parametrize(
    ("folder", "rooms", "wrong"),
    [
        ("convert", CONVERT, "convert/execute.py imports convert.plan"),
        ("uptrain", UPTRAIN, "uptrain/sweep.py imports uptrain.run"),
    ],
)
def test_an_import_uphill_is_found(folder: str, rooms: tuple[str, ...], wrong: str) -> None:
    """The control: with the rooms in another order, the same check finds what breaks it."""
    assert wrong in uphill(ROOT / folder, tuple(reversed(rooms)))


def test_algebra_knows_tensors_and_errors_only() -> None:
    for path in sorted((ROOT / "convert" / "algebra").glob("*.py")):
        for name in imported(path):
            ours = name[:2] in (("convert", "algebra"), ("convert", "errors"))
            assert ours or name[0] in OUTSIDE_OF_ALGEBRA, f"{path.name} imports {'.'.join(name)}"


@pytest.mark.parametrize("path", sorted((ROOT / "convert" / "runtime").glob("*.py")), ids=lambda path: path.name)
def test_runtime_files_stand_alone(path: Path) -> None:
    """They are copied beside the weights, where kvconvert may not be installed."""
    ours = [name for name in imported(path) if name[0] in (*TOP, "configs", "kvconvert")]
    assert all(name[:2] == ("convert", "runtime") for name in ours), ours


def modules_of(top: str) -> dict[str, set[str]]:
    """For every module of a folder, the modules of it that the file names in an import, in a function or not."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / top).rglob("*.py")}
    names = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        targets = {".".join(parts) for parts in imported(path)}
        # the front door is read by who is outside: its own files never ask it for anything
        found[name] = {target for target in targets if target in names and target not in (name, top)}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path of imports that ends where it begins, or nothing if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


@pytest.mark.parametrize("top", TOP)
def test_no_module_imports_itself_by_way_of_others(top: str) -> None:
    """Also within a room, and also where the import is for type checking or inside a function."""
    assert circle(modules_of(top)) == []


def test_a_circle_of_imports_is_found() -> None:
    """The control, on a made-up graph and on the real one with an import added."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    graph = modules_of("convert")
    graph["convert.algebra.linear"] = {"convert.algebra.merge"}
    assert circle(graph) == ["convert.algebra.linear", "convert.algebra.merge", "convert.algebra.linear"]
