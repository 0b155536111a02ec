"""The code stays small enough for one person to read: one file, short classes, short functions, nothing swallowed."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import faasd_async

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "faasd_async.py"
MAX_FILE_LINES = 3000
MAX_CLASS_LINES = 300
MAX_FUNCTION_LINES = 50


def nodes() -> Iterator[ast.AST]:
    """Every node of the daemon's syntax tree."""
    return ast.walk(ast.parse(SOURCE.read_text("utf-8")))


def length(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the `def` or `class` to the last one."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def catches_all(handler: ast.ExceptHandler) -> bool:
    """Whether a handler takes every exception, alone or as one of several."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)


def does_nothing(body: list[ast.stmt]) -> bool:
    """Whether a block has no effect: `pass`, `continue`, or a bare constant."""
    return all(
        isinstance(item, ast.Pass | ast.Continue)
        or (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))
        for item in body
    )


def test_the_file_can_be_read_top_to_bottom() -> None:
    """The daemon is one file of at most 3,000 lines."""
    lines = SOURCE.read_bytes().count(b"\n")
    assert lines <= MAX_FILE_LINES


def test_no_class_is_longer_than_300_lines() -> None:
    """Single files die of one class that wants to know everything."""
    found = {node.name: length(node) for node in nodes() if isinstance(node, ast.ClassDef)}
    assert {name: lines for name, lines in found.items() if lines > MAX_CLASS_LINES} == {}


def test_no_function_is_longer_than_50_lines() -> None:
    """A function fits on one screen."""
    found = [(node.name, length(node)) for node in nodes() if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [(name, lines) for name, lines in found if lines > MAX_FUNCTION_LINES] == []


def test_no_exception_is_swallowed_unseen() -> None:
    """Whoever catches every exception does something about it."""
    handlers = [node for node in nodes() if isinstance(node, ast.ExceptHandler)]
    assert [node.lineno for node in handlers if catches_all(node) and does_nothing(node.body)] == []


def test_no_exception_is_suppressed_without_naming_its_kind() -> None:
    """`contextlib.suppress` gets the kinds of errors that are expected, not all of them."""
    calls = [node for node in nodes() if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")]
    broad = [
        node.lineno for node in calls if {"Exception", "BaseException"} & {ast.unparse(kind) for kind in node.args}
    ]
    assert broad == []


def test_there_is_no_second_module() -> None:
    """Copying one file is enough to have all of the daemon."""
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["faasd_async.py"]


def test_there_is_no_package_folder() -> None:
    """No folder beside the file can be imported in its place or along with it."""
    assert [path.parent.name for path in ROOT.glob("*/__init__.py")] == []


def test_the_version_is_the_same_everywhere() -> None:
    """What is installed and what the program says of itself agree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == faasd_async.VERSION


def test_every_test_that_the_readme_names_is_there() -> None:
    """The page on what the daemon survives can be looked up."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text("utf-8")))
    there = {
        name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert named
    assert named - there == set()
