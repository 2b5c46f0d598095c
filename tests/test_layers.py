"""The table of layers in docs/design.md is true: imports go upwards in it only, nowhere in a circle, and no folder is a
heap.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_MODULES = 12
MODULES = {
    ".".join(
        ("hvd_lb_cli" if top == "cli" else "hvd_lb", *path.relative_to(ROOT / top).with_suffix("").parts)
    ): path
    for top in ("hvd_lb", "cli")
    for path in sorted((ROOT / top).rglob("*.py"))
    if path.name != "__init__.py"
}


def imports(module: str) -> set[str]:
    """Modules of our own that a module imports anywhere, also inside functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def layers() -> list[list[str]]:
    """The names in each row of the table, as modules or, with a dot at the end, packages: `data/files/`, `recipe`."""
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    rows = re.search(r"^## Layers\n(.*?)^## ", text, re.M | re.S)
    assert rows
    names = [
        re.findall(r"`([a-z_/]+)`", line.split("|")[1])
        for line in rows[1].splitlines()
        if line.startswith("| `")
    ]
    return [[f"hvd_lb.{name.replace('/', '.')}" for name in row] for row in names]


def layer_of(module: str, table: list[list[str]]) -> int:
    """The row of the longest name that the module is, or is in."""
    name = "hvd_lb.cli." if module.startswith("hvd_lb_cli.") else module
    fitting = [
        (len(entry), number)
        for number, row in enumerate(table)
        for entry in row
        if name == entry or (entry.endswith(".") and name.startswith(entry))
    ]
    assert fitting, f"{module} is in no layer of docs/design.md"
    return max(fitting)[1]


def room_of(module: str, table: list[list[str]]) -> str:
    names = [entry for row in table for entry in row if f"{module}.".startswith(f"{entry.rstrip('.')}.")]
    return max(names, key=len, default="hvd_lb.cli.")


def test_each_module_imports_only_from_layers_above_its_own() -> None:
    table = layers()
    assert len(table) > 15
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        for other in imports(module)
        if room_of(module, table) != room_of(other, table)
        if layer_of(other, table) >= layer_of(module, table)
    ]
    assert not wrong


def test_every_name_in_the_table_is_there() -> None:
    for entry in (entry for row in layers() for entry in row if entry != "hvd_lb.cli."):
        path = ROOT / entry.rstrip(".").replace(".", "/")
        assert path.is_dir() if entry.endswith(".") else path.with_suffix(".py").exists(), entry


def test_the_table_names_every_module_of_the_library() -> None:
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    table = text[text.index("## Layers") : text.index("## Decisions")]
    missing = [
        module for module in MODULES if not re.search(rf"`(?:[a-z_]+/)*{module.rpartition('.')[2]}`", table)
    ]
    # Of the command line's folders the names of the commands and systems are enough; pictures are all alike.
    whole = ("hvd_lb_cli.", "hvd_lb.report.pictures.")
    assert not [module for module in missing if not module.startswith(whole)]


def test_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' → '.join((*path, module))}"
        if module not in done:
            for other in imports(module):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}), ids=lambda of: of.name)
def test_no_folder_is_a_heap(folder: Path) -> None:
    assert sum(path.parent == folder for path in MODULES.values()) <= MOST_MODULES


@pytest.mark.parametrize("package", ["data", "launch", "doctor", "machine", "plan", "report"])
def test_packages_that_probes_and_containers_import_are_empty(package: str) -> None:
    for init in (ROOT / "hvd_lb" / package).rglob("__init__.py"):
        assert not ast.parse(init.read_text("utf-8")).body[1:], f"{init} imports something"


def test_modules_of_tests_have_names_of_their_own() -> None:
    """They lie in folders without packages, where pytest imports them by their names."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert names == sorted(set(names))
