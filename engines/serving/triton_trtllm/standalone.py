"""Modules as they stand alone in a model's folder of a Triton repository, where this package is not installed."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

PACKAGE = "medusa_export"
LIBRARY = "lib"  # the folder beside model.py, which Triton puts on the path


def standalone_source(module: ModuleType, library: Mapping[str, ModuleType]) -> str:
    """A module's text with its imports of this package turned into imports of the copies in ``lib``.

    Args:
        module: what is copied.
        library: name of a file in ``lib`` -> the module that it is a copy of.

    Raises:
        ValueError: the module imports something of this package that is not in the library: the copy would not load.
    """
    path = Path(str(module.__file__))
    text = path.read_text(encoding="utf-8")
    copies = {copied.__name__: f"{LIBRARY}.{name}" for name, copied in library.items()}
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
        for name in names:
            if name.partition(".")[0] != PACKAGE:
                continue
            if name not in copies or isinstance(node, ast.Import):
                raise ValueError(f"{path.name}: imports {name}, which is not in the {LIBRARY} of its model")
            line = node.lineno - 1
            lines[line] = lines[line].replace(f"from {name} import", f"from {copies[name]} import", 1)
    return "".join(lines)


def model_sources(model: ModuleType, library: Mapping[str, ModuleType]) -> Iterator[tuple[str, str]]:
    """The Python files of a model's version folder, by name: ``model.py``, and ``lib`` where it has one."""
    yield "model.py", standalone_source(model, library)
    for name, module in library.items():
        yield f"{LIBRARY}/{name}.py", standalone_source(module, library)
    if library:
        yield f"{LIBRARY}/__init__.py", ""
