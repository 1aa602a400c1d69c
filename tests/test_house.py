"""What keeps the house habitable: sizes of files and functions, and imports without a circle."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hero_kernels", "hero")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
CSRC = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".cpp", ".h", ".cu")]

MOST_LINES = 350
MOST_LINES_OF_A_BODY = 60
MOST_PARAMETERS = 10


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*FILES, *CSRC], ids=name_of)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> list[Function]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def is_gpu_kernel(function: Function) -> bool:
    """Decorated by `triton.jit` or what wraps it: its arguments are what the device is passed."""
    return any(re.search(r"\bjit\b|autotune", ast.unparse(d)) for d in function.decorator_list)


def is_operator(function: Function) -> bool:
    """A custom op of torch, which takes tensors one by one, or its fake."""
    return any(
        "custom_op" in ast.unparse(d) or "register_fake" in ast.unparse(d)
        for d in function.decorator_list
    )


def public_names() -> set[str]:
    """What a user calls: exported names, and all of the drop-ins, whose signatures are those of
    other libraries."""
    found = set()
    for package in PACKAGES:
        tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                found |= {alias.name for alias in node.names}
    return found


PUBLIC = public_names()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_function_is_long_or_takes_much(path: Path) -> None:
    """Of the body: without signature, decorators and docstring. What users call may take more."""
    of_users = "integrations" in path.parts or path.name == "reference.py"
    long, much = [], []
    for function in functions(path):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        if (
            body
            and (size := (body[-1].end_lineno or 0) - body[0].lineno + 1) > MOST_LINES_OF_A_BODY
        ):
            long.append(f"{function.name}: {size} lines")
        arguments = function.args
        count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
        exempt = function.name in PUBLIC or of_users or is_gpu_kernel(function)
        if count > MOST_PARAMETERS and not exempt and not is_operator(function):
            much.append(f"{function.name}: {count} parameters")
    assert not long and not much, (long, much)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Modules of ours that this one imports, for types and inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {name for name in found if name in MODULES} - {module_of(path)}


def test_imports_make_no_circle() -> None:
    arrows = {name: imports_of(path) for name, path in MODULES.items()}
    assert sum(map(len, arrows.values())) > 50
    while True:
        leaves = {name for name, targets in arrows.items() if not targets}
        if not leaves:
            break
        arrows = {name: targets - leaves for name, targets in arrows.items() if name not in leaves}
    assert not arrows, {name: sorted(targets) for name, targets in arrows.items()}


def test_the_kernels_know_nothing_of_the_training_loop() -> None:
    for name, path in MODULES.items():
        if name.startswith("hero_kernels"):
            assert not {other for other in imports_of(path) if other.split(".")[0] == "hero"}, name
