"""Proof that the type check can fail: a file that must not pass, run by ``make check`` as ``types_check.py MYPY``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

WRONG = """
from medusa_export.heads.trees.tree import Tree

Tree.from_choices("nonsense", 3, 4).no_such_attribute


def untyped(argument):
    return argument
"""
EXPECTED = ("[call-arg]", "[attr-defined]", "[no-untyped-def]")


def main(mypy: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wrong.py"
        path.write_text(WRONG, encoding="utf-8")
        command = [mypy, "--config-file", "pyproject.toml", str(path)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    missed = [code for code in EXPECTED if code not in found.stdout]
    if found.returncode != 1 or missed:
        print(f"the type check misses {', '.join(missed)} in a file that must not pass:\n{found.stdout}{found.stderr}")
        return 1
    print(f"a file with {len(EXPECTED)} errors does not pass")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
