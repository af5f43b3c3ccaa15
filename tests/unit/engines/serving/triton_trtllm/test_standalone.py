"""The Python files of a Triton repository, loaded where this package is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from medusa_export.core import errors
from medusa_export.engines.serving.triton_trtllm.repository import LIBRARIES, PREPROCESSING, SOURCES
from medusa_export.engines.serving.triton_trtllm.standalone import model_sources, standalone_source

# As Triton loads a model.py: its folder is on the path. Nothing of this package may be found.
LOAD = """
import importlib, sys
sys.modules["medusa_export"] = None
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    importlib.import_module(name)
print(sys.modules["model"].TritonPythonModel.__name__, *sorted(name for name in sys.modules if name.startswith("lib.")))
"""


def write(files: dict[str, str], folder: Path) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("model", SOURCES)
def test_every_model_loads_alone(model: str, tmp_path: Path) -> None:
    library = LIBRARIES.get(model, {})
    write(dict(model_sources(SOURCES[model], library)), tmp_path)
    copies = [f"lib.{name}" for name in library]
    command = [sys.executable, "-I", "-c", LOAD, str(tmp_path), *copies, "model"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == ["TritonPythonModel", *sorted(copies)]


def test_a_copy_differs_in_its_imports_only() -> None:
    library = LIBRARIES[PREPROCESSING]
    for module in (SOURCES[PREPROCESSING], *library.values()):
        old = Path(str(module.__file__)).read_text(encoding="utf-8").splitlines()
        new = standalone_source(module, library).splitlines()
        changed = [(before, after) for before, after in zip(old, new, strict=True) if before != after]
        assert all(before.startswith("from medusa_export.") for before, _ in changed)
        assert all(after.startswith("from lib.") for _, after in changed)


@pytest.mark.parametrize(
    "text",
    [
        "from medusa_export.core.threads import x\n",
        "def f():\n    from medusa_export.core.threads import x\n",
        "import medusa_export.core.errors\n",
        "from medusa_export.core import errors\n",
    ],
)
def test_an_import_that_the_library_lacks(text: str, tmp_path: Path) -> None:
    """It would load here, and fail in the container."""
    module = ModuleType("mine")
    module.__file__ = str(write({"mine.py": text}, tmp_path) / "mine.py")
    with pytest.raises(ValueError, match=r"mine\.py: imports medusa_export\.core.* not in the lib of its model"):
        standalone_source(module, {"errors": errors})


def test_an_import_wherever_it_stands(tmp_path: Path) -> None:
    module = ModuleType("mine")
    text = "# from medusa_export.core.errors import x\nif True:\n    from medusa_export.core.errors import (\n        A,\n    )\n"
    module.__file__ = str(write({"mine.py": text}, tmp_path) / "mine.py")
    found = standalone_source(module, {"errors": errors})
    assert found == text.replace("    from medusa_export.core.errors", "    from lib.errors")
