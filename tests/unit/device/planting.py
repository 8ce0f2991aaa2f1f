"""Modules with one wait left out."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def waits(module: ModuleType, *names: str) -> list[int]:
    """The lines of calls `something.NAME(...)` or `NAME(...)`."""
    return sorted({node.lineno for node in _calls(_tree(module), names)})


def with_waits(module: ModuleType, name: str) -> list[int]:
    """The lines of statements `with something.NAME(...)`."""
    tree = _tree(module)
    calls = {id(call) for call in _calls(tree, (name,))}
    return sorted(
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any(id(item.context_expr) in calls for item in node.items)
    )


def without(module: ModuleType, line: int, names: tuple[str, ...], folder: Path) -> ModuleType:
    """A copy of the module in which the call at `line` is not made. Of one whose result is
    used, `unfinished` is called instead, which gives it without waiting."""
    tree = _tree(module)
    planted = 0
    for parent in ast.walk(tree):
        for _, value in ast.iter_fields(parent):
            if isinstance(value, list):
                for index, child in enumerate(value):
                    if isinstance(child, ast.Expr) and _is_wait(child.value, line, names):
                        value[index] = ast.copy_location(ast.Pass(), child)
                        planted += 1
                    elif _is_wait(child, line, names):
                        child.func.attr = "unfinished"
                        planted += 1
            elif _is_wait(value, line, names) and not isinstance(parent, ast.Expr):
                value.func.attr = "unfinished"
                planted += 1
    assert planted == 1, planted
    path = folder / f"planted_{Path(str(module.__file__)).stem}_{line}.py"
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made  # Dataclasses look themselves up.
    try:
        spec.loader.exec_module(made)
    finally:
        del sys.modules[path.stem]
    return made


def _tree(module: ModuleType) -> ast.Module:
    assert module.__file__ is not None
    return ast.parse(Path(module.__file__).read_text())


def _calls(tree: ast.Module, names: tuple[str, ...]) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node) in names:
            yield node


def _is_wait(node: object, line: int, names: tuple[str, ...]) -> bool:
    return isinstance(node, ast.Call) and node.lineno == line and _name(node) in names


def _name(call: ast.Call) -> str:
    match call.func:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return ""
