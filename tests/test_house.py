"""The shape of the source: sizes, parameters, import circles, and what one call goes through."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hero_kernels

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path for package in ("hero", "hero_kernels") for path in (ROOT / package).rglob("*.py")
)
SOURCES = [*MODULES, *(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu"))]
PUBLIC = set(hero_kernels.__all__) | {"__init__"}
OF_OTHERS = {"integrations", "triton"}
"""Call orders of other libraries; kernels that take pointers."""


def test_files_are_short() -> None:
    long = {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 350}
    assert not long


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def body_lines(function: ast.FunctionDef) -> int:
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        first = function.body[1] if len(function.body) > 1 else first
    assert function.end_lineno is not None
    return function.end_lineno - first.lineno + 1


KERNEL_MODULES = [p for p in MODULES if p.is_relative_to(ROOT / "hero_kernels")]


@pytest.mark.parametrize("path", KERNEL_MODULES, ids=lambda p: p.name)
def test_functions_are_short_and_take_few_parameters(path: Path) -> None:
    if OF_OTHERS & {path.name, *path.parent.parts}:
        return
    for function in functions(path):
        arguments = function.args
        count = sum(map(len, (arguments.args, arguments.kwonlyargs, arguments.posonlyargs)))
        assert body_lines(function) <= 60, (function.name, body_lines(function))
        if function.name in PUBLIC:
            continue
        assert count <= 10 or is_operator(function), (function.name, count)


def is_operator(function: ast.FunctionDef) -> bool:
    """Custom ops take every tensor as an argument of its own."""
    return any("custom_op" in ast.unparse(decorator) for decorator in function.decorator_list)


def imports(path: Path) -> set[Path]:
    """Modules of the repository that a module imports, also for types and within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            base = ROOT.joinpath(*name.split("."))
            found |= {p for p in (base.with_suffix(".py"),) if p.is_file()}
    return found


@pytest.mark.parametrize("package", ["hero", "hero_kernels"])
def test_no_import_circle(package: str) -> None:
    graph = {p: imports(p) for p in MODULES if p.is_relative_to(ROOT / package)}
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " > ".join(p.stem for p in (*trail, path))
        if path not in done:
            for other in graph.get(path, ()):
                visit(other, (*trail, path))
            done.add(path)

    for path in graph:
        visit(path, ())


def test_hero_kernels_stands_alone() -> None:
    for path in KERNEL_MODULES:
        assert not any(p.is_relative_to(ROOT / "hero") for p in imports(path)), path.name


def test_the_public_signature_can_be_read() -> None:
    assert len(inspect.signature(hero_kernels.fused_linear_divergence).parameters) <= 24


@pytest.mark.parametrize("tile_rows", [150, 300])
def test_one_call_goes_through_few_places(tile_rows: int) -> None:
    """At most 90 Python calls in 8 files of the package, forward, after a first call."""
    hidden, weight = torch.randn(300, 32, requires_grad=True), torch.randn(500, 32)
    teacher = hidden.detach() + 0.1
    impl = "cpu" if hero_kernels.supports("cpu") is None else "torch"
    options = hero_kernels.KernelOptions(tile_rows=tile_rows)

    def call() -> None:
        hero_kernels.fused_linear_divergence(hidden, weight, teacher, impl=impl, options=options)

    call()
    seen: list[str] = []

    def record(frame: object, event: str, _: object) -> None:
        name = frame.f_code.co_filename  # type: ignore[attr-defined]
        if event == "call" and "hero_kernels" in name:
            seen.append(name)

    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
    kernel_files = {"rows.py", "formulas.py", "types.py", "objective.py"} if impl == "torch" else {}
    outside = [name for name in seen if Path(name).name not in kernel_files]
    assert len(outside) < 90 and len(set(outside)) <= 8
