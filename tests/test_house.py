"""Which room may import which: one way, and what stands where."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "kv_compression"
# A room may import rooms that stand before it, never one of its own row's others or a later one.
ROWS = [
    {"io", "methods"},
    {"recipes"},
    {"settings"},
    {"model"},
    {"spans"},
    {"data"},
    {"training"},
    {"sharing"},
    {"api"},
    {"generation", "recall"},
    {"reporting", "sweep"},
]
MOST_FILES, MOST_LINES, LONGEST_FUNCTION = 12, 450, 60


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: Path) -> set[str]:
    """The rooms that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if names == ["kv_compression"]:
            names = [f"kv_compression.{alias.name}" for alias in node.names]
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("kv_compression.")}
    return found


def test_imports_go_one_way():
    row_of = {room: number for number, rooms in enumerate(ROWS) for room in rooms}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in modules()
        for other in imported(path) - {room_of(path)}
        if row_of[other] >= row_of[room_of(path)]
    ]
    assert not wrong


def test_a_room_is_small():
    rooms = {}
    for path in modules():
        rooms.setdefault(path.parent, []).append(path)
    assert all(len(paths) <= MOST_FILES for paths in rooms.values())
    for path in [*modules(), *PACKAGE.parent.glob("*.py")]:
        text = path.read_text()
        assert len(text.splitlines()) <= MOST_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{path}: {node.name}"
