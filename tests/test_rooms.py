"""Rooms import each other in one direction: what a reader of one must know ends below it."""

import ast
import graphlib
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jax_marlin_moe"


def imported(path):
    """Rooms that a file of the package imports: files and folders beside `__init__.py`, which is none itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "jax_marlin_moe":
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").removeprefix("jax_marlin_moe.")] if is_ours(node.module or "") else []
        elif isinstance(node, ast.Import):
            names = [alias.name.removeprefix("jax_marlin_moe.") for alias in node.names if is_ours(alias.name)]
        else:
            continue
        yield from (name.split(".")[0] for name in names)


def is_ours(module):
    return module.startswith("jax_marlin_moe.")


def arrows():
    """By room, the other rooms that it imports anywhere, in functions too."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            found.setdefault(room, set()).update(set(imported(path)) - {room})
    return found


def test_no_two_rooms_import_each_other():
    rooms = arrows()
    assert {"ops", "cuda", "cli", "measure", "weights"} <= rooms.keys()
    order = list(graphlib.TopologicalSorter(rooms).static_order())  # raises CycleError, which names the circle
    assert order.index("weights") < order.index("cuda") < order.index("ops") < order.index("cli")


def test_imports_point_up_the_tree_of_the_architecture_document():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.partition("```\njax_marlin_moe/\n")[2].partition("csrc/\n")[0]
    listed = [*re.findall(r"^  (\w+)", tree, re.MULTILINE), "__main__"]
    rooms = arrows()
    assert sorted(listed) == sorted(rooms)
    compiled = {"_native"}
    for room, others in rooms.items():
        assert others - compiled <= set(listed[: listed.index(room)]), f"{room} imports a room below it"


def test_commands_and_measuring_stand_above_everything_else():
    rooms = arrows()
    assert {room for room, others in rooms.items() if "cli" in others} == {"__main__"}
    assert {room for room, others in rooms.items() if "measure" in others} == {"cli"}
    assert not rooms["cuda"] & {"ops", "checkpoint", "flax", "layer", "random_experts"}


def test_algorithms_on_a_cpu_do_not_know_their_handlers():
    for path in (ROOT / "csrc" / "cpu").iterdir():
        included = re.findall(r'#include "(.+?)"', path.read_text(encoding="utf-8"))
        assert not [name for name in included if "ffi/" in name or "cuda/" in name], path.name


def test_no_file_of_the_package_shadows_a_standard_module_where_scripts_are_started():
    """A script in the package's folder, or one that runs there, would import it in place of the standard one."""
    names = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not names & set(sys.stdlib_module_names)
