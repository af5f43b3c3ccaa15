"""Which file may import what (docs/decisions/0001), read from the sources, and what an import really loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "heads": {"heads"},
    "quantize": {"quantize", "heads"},
    "exporter": {"exporter", "quantize", "heads"},
    "engines": {"engines", "heads"},
}
COMPOSITION = (
    "exporter.cli",
    "exporter.cli_data",
    "exporter.cli_serve",
    "exporter.cli_train",
    "exporter.cli_tree",
    "exporter.cli_triton",
)  # the commands: may import all, nothing may import them
BACKENDS: dict[str, tuple[str, ...]] = {  # package: the files that may import it
    "modelopt": ("quantize.ptq", "heads.medusa_model"),
    "onnxruntime": ("engines.onnxruntime",),
    "tensorrt": ("engines.tensorrt_package",),
    "tensorrt_llm": ("engines.trtllm_session", "engines.trtllm_llm_api"),
    "tensorrt_rtx": ("engines.tensorrt_package",),
    "tensorrt_rtx_bindings": ("engines.tensorrt_package",),
}
WITHOUT_TORCH = [
    "errors",
    "tree",
    "accept",
    "acceptance",
    "search",
    "engine_info",
    "config",
    "families",
    "manifest",
    "staging",
    "conversations",
]


def modules() -> dict[str, Path]:
    """``heads.tree`` -> its file, of every source."""
    paths = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


SOURCES = modules()
IMPORTABLE = [f"medusa_export.{name}".removesuffix(".__init__") for name in SOURCES]


def imports(text: str, *, module_level: bool = False) -> Iterator[str]:
    """Absolute names that a source imports: ``import a.b`` and ``from a.b import c`` give ``a.b`` and ``a.b.c``.

    Args:
        module_level: leave out what stands in functions and under ``if TYPE_CHECKING``, which an import does not run.
    """
    pending: list[ast.AST] = [ast.parse(text)]
    while pending:
        node = pending.pop()
        if module_level and (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(node)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _callee(node) in ("import_module", "__import__"):
            yield from (
                arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            )
        pending += ast.iter_child_nodes(node)


def _callee(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def problems(name: str, text: str) -> list[str]:
    """Imports of one source that break a rule."""
    found = []
    for target in imports(text):
        top, _, rest = target.partition(".")
        if top == "":
            found.append(f"{name}: the relative import {target}")
        elif top in ALLOWED:
            found.append(f"{name}: {target} without medusa_export before it")
        elif top == "medusa_export" and f"{rest}.".startswith(tuple(f"{command}." for command in COMPOSITION)):
            found.append(f"{name}: imports the commands")
        elif (
            top == "medusa_export" and name not in COMPOSITION and rest.split(".")[0] not in ALLOWED[name.split(".")[0]]
        ):
            found.append(f"{name}: imports {target}")
        elif top in BACKENDS and name not in BACKENDS[top]:
            found.append(f"{name}: {top} belongs in {' or '.join(BACKENDS[top]) or 'no file'}")
    lazily = {target.partition(".")[0] for target in imports(text, module_level=True)}
    return found + [f"{name}: imports {top} when it is imported" for top in sorted(lazily & BACKENDS.keys())]


def test_imports() -> None:
    assert len(SOURCES) > 30
    assert [problem for name, path in SOURCES.items() for problem in problems(name, path.read_text("utf-8"))] == []


def test_the_files_of_each_backend_do_import_it() -> None:
    """Or the table above is out of date."""
    for package, owners in BACKENDS.items():
        for owner in owners:
            assert package in {target.partition(".")[0] for target in imports(SOURCES[owner].read_text("utf-8"))}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        (
            "heads.tree",
            "from medusa_export.quantize.scales import Scales",
            "imports medusa_export.quantize.scales.Scales",
        ),
        (
            "quantize.ptq",
            "import medusa_export.exporter.plan.trtllm_layout",
            "imports medusa_export.exporter.plan.trtllm_layout",
        ),
        (
            "exporter.plan",
            "def f():\n  from medusa_export.engines import base",
            "imports medusa_export.engines.decoding.generate",
        ),
        ("engines.base", "from medusa_export import exporter", "imports medusa_export.exporter"),
        (
            "engines.base",
            "from importlib import import_module as m\nimport_module('tensorrt_llm')",
            "belongs in engines.trtllm_session",
        ),
        ("engines.bench", "from medusa_export.exporter.cli.export import run_main", "imports the commands"),
        ("exporter.export", "from medusa_export.exporter import cli", "imports the commands"),
        ("heads.tree", "from . import errors", "relative import"),
        ("heads.tree", "from heads import errors", "without medusa_export"),
        ("exporter.export", "def f():\n  import onnxruntime", "onnxruntime belongs in engines.onnxruntime"),
        ("engines.onnxruntime", "try:\n  import onnxruntime\nexcept ImportError:\n  pass", "when it is imported"),
        ("quantize.ptq", "class A:\n  import modelopt.torch.quantization as mtq", "when it is imported"),
        ("quantize.ptq", "def f():\n  import modelopt.torch.quantization as mtq", None),
        ("exporter.cli", "from medusa_export.engines.bench.run import run", None),
        ("exporter.plan", "from medusa_export.heads import families", None),
    ],
)
def test_the_rules_find(name: str, text: str, problem: str | None) -> None:
    found = problems(name, text)
    assert (problem in found[0]) if problem else (found == [])


def run(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_everything_loads_no_backend() -> None:
    loaded = "import sys, importlib; [importlib.import_module(name) for name in sys.argv[1:]]; print(*sys.modules)"
    names = set(run(loaded, *IMPORTABLE).split())
    assert set(IMPORTABLE) <= names
    assert not names & BACKENDS.keys()


BLOCKED = """
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors", "onnx", "modelopt", "onnxruntime"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
for name in sys.argv[1:]:
    importlib.import_module(name)
print("imported")
"""


def test_engines_need_no_torch() -> None:
    """They run in TensorRT-LLM's and Triton's containers, on what an export left on the disk; so does --help everywhere."""
    engines = [name for name in IMPORTABLE if name.startswith("medusa_export.engines")]
    assert len(engines) > 5
    heads = [f"medusa_export.heads.{name}" for name in WITHOUT_TORCH]
    assert (
        run(BLOCKED, *engines, *heads, "medusa_export.exporter.cli.export", "medusa_export.quantize.formats")
        == "imported"
    )


# What is in a container of TensorRT-LLM, of all that this project uses; see ``make container-check`` for the real packages.
IN_CONTAINER = ("numpy", "safetensors", "tokenizers", "transformers")
ONLY = f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in sys.stdlib_module_names or top in {(*IN_CONTAINER, "medusa_export")} or top.startswith("__editable__")
        if path is None and not known:
            raise ImportError(name + " is not in the container")
sys.meta_path.insert(0, Blocker())
for name in sys.argv[1:]:
    importlib.import_module(name)
print("imported")
"""


def test_engines_in_a_container_of_tensorrt_llm() -> None:
    engines = [name for name in IMPORTABLE if name.startswith("medusa_export.engines")]
    assert run(ONLY, *engines) == "imported"
    with pytest.raises(AssertionError, match="not in the container"):
        run(ONLY, "medusa_export.exporter.cli.export")


def test_the_blocker_blocks() -> None:
    with pytest.raises(AssertionError, match="torch is blocked"):
        run(BLOCKED, "medusa_export.heads.checkpoint.medusa_checkpoint")
