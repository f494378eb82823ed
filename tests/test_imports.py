"""Imports go one way: between rooms by the table, between modules without a cycle, and never from above.

Every import statement counts, also those inside functions and under TYPE_CHECKING.
"""

import ast

import pytest

import multidiff
from tests.helpers.paths import ROOT

BASE = "tokenizer files seeding"
CORE = f"{BASE} plugins sequence processes objectives models samplers checkpoints generation data"
MAY_IMPORT = {
    # room         imports, beside its own modules
    "tokenizer":   "",
    "files":       "",
    "seeding":     "",
    "plugins":     BASE,
    "sequence":    f"{BASE} plugins",
    "processes":   f"{BASE} sequence",
    "objectives":  f"{BASE} sequence processes",
    "models":      f"{BASE} sequence",
    "samplers":    f"{BASE} sequence processes",                     # no model: they see logits
    "checkpoints": f"{BASE} plugins sequence processes models samplers",  # no pipeline: they see the parts of a model
    "generation":  f"{BASE} plugins sequence processes models samplers checkpoints",
    "data":        f"{BASE} plugins sequence",
    "evaluation":  CORE,
    "training":    f"{CORE} evaluation",
    "testing":     "tokenizer",                                      # plugin authors run it, so it needs little
    "cli":         f"{CORE} evaluation training",
}  # fmt: skip
TEMPLATE = ROOT / "multidiff" / "plugins" / "template"  # a package of its own, copied for new plugins


def imports(file):
    """(module, name or None) for every import in a file: `from module import name`, or `import module`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports are not used here"
            yield from ((node.module, alias.name) for alias in node.names)


def read_graph(root, package="multidiff", lazy=multidiff._HOME):
    """The modules of a package in the folder `root`, and for each the set of those that it imports.

    Args:
        lazy: the names that the package's `__init__` imports on first use, and the submodules they come from.
    """
    files = {}
    for file in (root / package).rglob("*.py"):
        if TEMPLATE not in file.parents:
            parts = file.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    graph = {}
    for module, file in files.items():
        graph[module] = set()
        for source, name in imports(file):
            if source.split(".")[0] != package:
                continue
            if f"{source}.{name}" in files:
                source = f"{source}.{name}"
            elif source == package and name in lazy:
                source = f"{package}.{lazy[name]}"
            graph[module].add(source)
    return graph


def room(module):
    """The room of a module, such as "samplers"; "" for the package's own `__init__`, which holds the version."""
    return module.split(".")[1] if "." in module else ""


def forbidden(graph, table):
    """Imports between rooms that the table does not allow."""
    table = {"": "", **table}
    return sorted(
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if room(other) not in ("", room(module), *table[room(module)].split())
    )


def cycles(graph):
    """Groups of modules that import one another, directly or through others; a module may be a group by itself."""
    reached = {}
    for module in graph:
        reached[module], waiting = set(), [module]
        while waiting:
            new = graph.get(waiting.pop(), set()) - reached[module]
            reached[module] |= new
            waiting += new
    groups = {frozenset(other for other in reached[module] if module in reached.get(other, ())) for module in graph}
    return sorted(sorted(group) for group in groups if group)


def test_every_room_has_its_row():
    rooms = {room(module) for module in read_graph(ROOT)} - {""}
    assert rooms == MAY_IMPORT.keys(), "a new room needs a row in the table, and a row needs a room"


def test_the_table_has_a_direction():
    assert cycles({name: set(others.split()) for name, others in MAY_IMPORT.items()}) == []
    assert not {name for others in MAY_IMPORT.values() for name in others.split()} - MAY_IMPORT.keys()


def test_rooms_import_only_what_the_table_allows():
    assert forbidden(read_graph(ROOT), MAY_IMPORT) == []


def test_no_module_imports_itself_through_others():
    assert cycles(read_graph(ROOT)) == []


def test_nothing_below_imports_what_stands_on_it():
    plugins = {folder.name for folder in (ROOT / "tokenizers").iterdir() if folder.is_dir()}
    users = {"demo", "scripts", "tests"}
    assert "multidiff_vq" in plugins
    for folder, above in (("multidiff", plugins | users), ("tokenizers", users)):
        for file in (ROOT / folder).rglob("*.py"):
            if TEMPLATE not in file.parents:
                assert not above & {source.split(".")[0] for source, _ in imports(file)}, file


def test_tests_import_helpers_and_no_other_tests():
    for file in (ROOT / "tests").rglob("*.py"):
        for source, name in imports(file):
            first, second, *_ = f"{source}.{name}".split(".")
            assert first != "tests" or second in ("helpers", "fuzz"), f"{file} imports {source}"
            assert not first.startswith("test_"), f"{file} imports {source}"


@pytest.fixture
def package(tmp_path):
    """Writes a package `toy` of these modules, and reads its imports."""

    def write(**modules):
        for name, code in {"": "", **modules}.items():
            path = tmp_path / "toy" / (name.replace("__", "/") or "__init__")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".py").write_text(code)
            (path.parent / "__init__.py").touch()
        return read_graph(tmp_path, "toy", {"Model": "models"})

    return write


LATE = "def f():\n    {}\n"
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}\n"


@pytest.mark.parametrize("form", ["{}", LATE, TYPES, "class A:\n    {}\n"])
@pytest.mark.parametrize(
    "statement",
    [
        "from toy.models.net import Net",
        "from toy.models import net",
        "import toy.models.net as m",
        "from toy import models",
        "from toy import Model",
        "from toy.models import *",
    ],
)
def test_every_form_of_a_forbidden_import_is_found(package, form, statement):
    graph = package(models__net="", samplers__rules=form.format(statement))
    table = {"models": "", "samplers": ""}
    (found,) = forbidden(graph, table)
    assert found.startswith("toy.samplers.rules imports toy.models")
    assert forbidden(graph, {**table, "samplers": "models"}) == []


@pytest.mark.parametrize("form", ["{}", LATE, TYPES])
def test_a_cycle_is_found_wherever_its_imports_stand(package, form):
    into = "import toy.a"
    graph = package(a="from toy.b import B", b=form.format("from toy import c"), c=into, d=into, e="import toy.e")
    assert cycles(graph) == [["toy.a", "toy.b", "toy.c"], ["toy.e"]]


def test_a_package_and_its_module_may_not_import_each_other(package):
    graph = package(rooms__a="from toy.rooms import B", rooms__b="B = 1")
    assert cycles(graph) == []
    graph["toy.rooms"].add("toy.rooms.a")
    assert cycles(graph) == [["toy.rooms", "toy.rooms.a"]]
