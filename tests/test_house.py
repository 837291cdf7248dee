"""The house rules that a machine can check: rooms, sizes, names and docstrings."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import edgezo

HOUSE = Path(edgezo.__file__).parent
ROOMS = ("cli", "bench", "run", "network", "weights", "plan", "zo", "data", "machine")
BANNED_NAMES = {"found", "told", "said", "own"}
MODULE_LINES, LONG_FUNCTION_LINES, FUNCTION_LINES = 500, 50, 80


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its path inside it."""
    files = sorted(HOUSE.rglob("*.py"))
    return {str(f.relative_to(HOUSE)): ast.parse(f.read_text(encoding="utf-8")) for f in files}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{path}:{node.lineno} {node.name}", node


def length(node: ast.FunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that a module binds: variables, parameters, attributes of a class, functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def test_every_module_lies_in_a_room_and_every_room_says_what_it_is_for():
    for path in modules():
        assert path.split("/")[0] in {*ROOMS, "__init__.py", "__main__.py", "errors.py"}, path
    for room in ROOMS:
        tree = modules()[f"{room}/__init__.py"]
        assert len(tree.body) == 1, f"{room}/__init__.py holds more than its docstring"
        assert "Read first: " in (ast.get_docstring(tree) or ""), room


def test_no_module_is_longer_than_500_lines():
    lines = {p: len((HOUSE / p).read_text(encoding="utf-8").splitlines()) for p in modules()}
    assert not {path: n for path, n in lines.items() if n > MODULE_LINES}


def test_functions_are_short():
    lines = {name: length(node) for name, node in functions()}
    long = {name: n for name, n in lines.items() if n > LONG_FUNCTION_LINES}
    assert not {name: n for name, n in long.items() if n > FUNCTION_LINES}
    assert len(long) <= len(lines) / 100, long


def test_no_variable_has_a_name_that_says_nothing():
    banned = [
        f"{path}:{line} {name}"
        for path, tree in modules().items()
        for name, line in bound_names(tree)
        if name in BANNED_NAMES
    ]
    assert not banned, f"{len(banned)} names: {banned[:40]}"


def test_no_docstring_begins_with_the_same():
    places = [
        f"{path} {getattr(node, 'name', 'module')}"
        for path, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and re.match(r"(The|As the) same\b", ast.get_docstring(node) or "")
    ]
    assert not places


def test_no_class_or_constant_has_a_twin_in_another_module():
    places = defaultdict(set)
    for path, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].add(path)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name) and target.id.isupper():
                        places[target.id].add(path)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                places[node.target.id].add(path)
    twins = {n: sorted(p) for n, p in places.items() if len(p) > 1 and not n.startswith("__")}
    assert not twins


def test_a_trained_part_is_asked_by_what_it_is_and_not_by_a_test_of_membership():
    parts = r"(full|lowrank|norms|scales|head|probe|lora)"
    for path in modules():
        text = (HOUSE / path).read_text(encoding="utf-8")
        assert not re.search(rf"\"{parts}\" (not )?in \S*train|& set\(\S*train\)", text), path


def test_no_assertion_says_that_a_setting_is_not_none():
    settings = r"(batch_size|micro_batch|precision|max_mem_bytes|steps|out|short_tokens|rounding)"
    for path in modules():
        text = (HOUSE / path).read_text(encoding="utf-8")
        assert not re.search(rf"assert [^\n]*cfg\.{settings} is not None", text), path


def test_no_modules_import_each_other_in_a_circle():
    """Imports for type checking count too, so that no circle hides there; the package's front door does not."""
    import grimp

    graph = grimp.build_graph("edgezo", cache_dir=None)
    edges = {m: graph.find_modules_directly_imported_by(m) for m in graph.modules - {"edgezo"}}
    # Modules that import nothing of what is left are taken away until only circles are left.
    while ends := {m for m, imported in edges.items() if not imported & edges.keys()}:
        edges = {m: imported for m, imported in edges.items() if m not in ends}
    assert not edges, sorted(edges)


PLANTED = {
    "nothing": ("zo/credit.py", "", True),
    "upwards": ("zo/credit.py", "import edgezo.run.step", False),
    "sideways": ("data/batches.py", "from edgezo.zo import noise", False),
    "upwards for type checking": (
        "weights/tile.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import edgezo.run.train",
        False,
    ),
    "torch in a plan": ("plan/planner.py", "import torch", False),
    "numpy below a plan": ("machine/limits.py", "import numpy", False),
}


@pytest.mark.parametrize("case", PLANTED)
def test_the_import_rules_are_kept_and_a_planted_import_breaks_them(case, tmp_path):
    path, line, kept = PLANTED[case]
    shutil.copytree(HOUSE, tmp_path / "edgezo", ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    shutil.copy(HOUSE.parent / "pyproject.toml", tmp_path)
    with (tmp_path / "edgezo" / path).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) is kept, done.stdout + done.stderr
