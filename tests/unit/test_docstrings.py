"""Docstrings of public functions say what their parameters are, and name no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.unit.test_architecture import SOURCES

Function = ast.FunctionDef | ast.AsyncFunctionDef
MOST = 2  # parameters that go without
# What implements something says so instead: "As :meth:`Numbers.rows`."
ELSEWHERE = re.compile(r"^As (:(meth|attr|func):`|``)")
LISTED = re.compile(r"^ {4}([a-z_][\w, ]*):")


def public_functions(body: list[ast.stmt], *, in_class: bool = False) -> Iterator[tuple[Function, list[str]]]:
    """Functions and methods without an underscore in front, and their parameters, ``self`` aside.

    Commands are left out: their docstrings are --help, and their parameters are dataclasses of flags, which have texts of their own.
    """
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, in_class=True)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
            continue
        decorators = [ast.unparse(each) for each in node.decorator_list]
        if any(each.startswith("command(") for each in decorators):
            continue
        given = node.args
        names = [each.arg for each in (*given.posonlyargs, *given.args)]
        names = names[1:] if in_class and "staticmethod" not in decorators else names
        names += [each.arg for each in given.kwonlyargs]
        yield node, names + [each.arg for each in (given.vararg, given.kwarg) if each]


def problems(text: str) -> Iterator[str]:
    """Functions without Args, and Args that are no parameters."""
    for node, names in public_functions(ast.parse(text).body):
        docstring = ast.get_docstring(node) or ""
        listed = set(args_of(docstring))
        if len(names) > MOST and not listed and not ELSEWHERE.match(docstring):
            yield f"{node.name}: no Args for {', '.join(names)}"
        if stray := listed - set(names):
            yield f"{node.name}: Args has {', '.join(sorted(stray))}, which it does not take"


def args_of(docstring: str) -> Iterator[str]:
    """The names in the section Args."""
    lines = docstring.splitlines()
    start = lines.index("Args:") + 1 if "Args:" in lines else len(lines)
    for line in lines[start:]:
        if line and not line.startswith(" "):
            return  # the next section
        if match := LISTED.match(line):
            yield from (name.strip() for name in match[1].split(","))


def test_public_functions_say_what_they_take() -> None:
    found = [f"{name}: {line}" for name, path in SOURCES.items() for line in problems(path.read_text("utf-8"))]
    assert found == []


DOCUMENTED = '''
def f(a, b, *c):
    """It.

    Args:
        {}: what they are,
            and more: of them.

    Raises:
        Error: when.
    """
'''


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('def f(a, b, *, c):\n    """It."""', "f: no Args for a, b, c"),
        ("class A:\n    def f(self, a, b, c): ...", "f: no Args for a, b, c"),
        (DOCUMENTED.format("a, old"), "f: Args has old, which it does not take"),
        (DOCUMENTED.format("a, b"), None),
        ('class A:\n    def f(self, a, b, c):\n        """As :meth:`B.f`."""', None),
        ("def _f(a, b, c): ...", None),
        ("class A:\n    def f(self, a, b): ...", None),
    ],
)  # fmt: skip
def test_the_scan_finds(text: str, problem: str | None) -> None:
    assert list(problems(text)) == ([problem] if problem else [])
