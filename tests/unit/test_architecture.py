"""Which folder may import which (docs/decisions/0001, 0014), read from the sources, and what an import really loads."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
import tomllib

from tests.paths import ROOT

TOPS = ("core", "heads", "quantize", "exporter", "engines")
OTHER_TOPS = ("tests", "benchmarks", "examples", "docs")  # with Python files that are not installed
# Every folder and the folders that its files may import, besides itself. A new edge is a decision: it is written down here.
ALLOWED: dict[str, str] = {
    "core": "",
    "core/artifacts": "core",
    "core/text": "core",
    "heads": "",
    "heads/checkpoint": "core",
    "heads/trees": "core core/artifacts",
    "heads/roofline": "core heads/checkpoint",
    "heads/decoding": "core heads/checkpoint heads/trees",
    "heads/contract": "core core/text heads/trees",
    "heads/data": "core core/artifacts heads/decoding",
    "heads/training": "core core/artifacts core/text heads/checkpoint heads/trees",
    "heads/training/cached": "core core/artifacts heads/checkpoint heads/training heads/trees",
    "heads/training/full": "core core/artifacts heads/checkpoint heads/training",
    "quantize": "core core/artifacts core/text heads/checkpoint heads/training heads/training/full",
    "exporter": "",
    "exporter/plan": "core heads/checkpoint heads/contract heads/trees quantize",
    "exporter/onnx": "core heads/checkpoint heads/contract quantize",
    "exporter/onnx/portable": "core exporter/onnx heads/checkpoint heads/contract quantize",
    "exporter/verify/trtllm_loader": "core heads/checkpoint",
    "exporter/verify": "core core/artifacts exporter/verify/trtllm_loader heads/checkpoint",
    "exporter/verify/graphs": "core exporter/verify heads/checkpoint heads/contract",
    "exporter/verify/parts": "core core/artifacts core/text exporter/verify exporter/verify/graphs exporter/verify/trtllm_loader"
    " heads/checkpoint heads/contract heads/trees",
    "exporter/write": "core core/artifacts core/text exporter/plan exporter/verify heads/checkpoint heads/trees quantize",
    "exporter/engine_dirs": "core core/text exporter/onnx exporter/onnx/portable exporter/plan heads/checkpoint heads/contract"
    " heads/trees quantize",
    "exporter/job": "core core/artifacts core/text exporter/plan heads/checkpoint heads/contract heads/roofline heads/trees quantize",
    "exporter/pipeline": "core core/artifacts core/text exporter/engine_dirs exporter/job exporter/onnx exporter/plan exporter/verify"
    " exporter/write heads/contract quantize",
    "exporter/doctor": "core quantize",
    "exporter/sizing": "core core/artifacts core/text exporter/job exporter/onnx exporter/pipeline"
    " exporter/plan exporter/write heads/checkpoint heads/roofline heads/trees quantize",
    "engines/decoding": "core heads/contract heads/decoding heads/trees",
    "engines/onnxruntime": "core engines/decoding heads/contract heads/trees",
    "engines/trtllm": "core engines/decoding heads/checkpoint heads/contract heads/trees",
    "engines/tensorrt": "core core/artifacts heads/contract heads/trees",
    "engines/tensorrt/emulation": "core engines/onnxruntime engines/tensorrt",
    "engines": "core engines/decoding engines/onnxruntime engines/serving/triton engines/tensorrt engines/trtllm heads/contract",
    "engines/measure": "core core/text engines/decoding heads/contract heads/trees",
    "engines/tuning": "core core/artifacts core/text engines/decoding engines/measure engines/onnxruntime heads/contract"
    " heads/decoding heads/trees",
    "engines/verify": "core engines/decoding engines/onnxruntime engines/tensorrt engines/tensorrt/emulation heads/checkpoint"
    " heads/contract heads/decoding heads/trees",
    "engines/serving": "core core/text engines/decoding engines/onnxruntime engines/tensorrt heads/contract heads/data"
    " heads/decoding",
    "engines/serving/openai/protocol": "core engines/serving heads/decoding",
    "engines/serving/openai": "core engines/serving engines/serving/openai/protocol",
    "engines/serving/triton": "core core/artifacts core/text engines/decoding engines/serving heads/contract heads/decoding",
    "engines/serving/triton/hosting": "core engines heads",
    "engines/serving/triton_trtllm": "core core/artifacts core/text engines/serving engines/serving/triton engines/trtllm"
    " heads/contract heads/trees",
    "engines/bench": "core core/artifacts core/text engines engines/decoding engines/measure engines/onnxruntime engines/trtllm"
    " engines/tuning engines/verify heads/contract heads/decoding heads/trees",
    "exporter/cli/flags": "core",
}
COMMANDS = "exporter/cli"  # may import all, nothing may import them
BACKENDS: dict[str, tuple[str, ...]] = {  # package: the files that may import it
    "modelopt": ("quantize.ptq", "heads.training.full.modelopt_medusa"),
    "onnxruntime": ("engines.onnxruntime.engine",),
    "tensorrt": ("engines.tensorrt.library",),
    "tensorrt_llm": ("engines.trtllm.session", "engines.trtllm.llm_api"),
    "tensorrt_rtx": ("engines.tensorrt.library",),
    "tensorrt_rtx_bindings": ("engines.tensorrt.library",),
}
WITHOUT_TORCH = [
    "core.errors",
    "core.artifacts.manifest",
    "core.artifacts.staging",
    "core.text.tokenizer",
    "heads.trees.tree",
    "heads.trees.acceptance",
    "heads.trees.search",
    "heads.decoding.accept",
    "heads.contract.engine_info",
    "heads.checkpoint.decoder_config",
    "heads.checkpoint.families",
    "heads.roofline.curves",
]
# Class names that several modules have: Triton looks for this one in every model.
SHARED_NAMES = {"TritonPythonModel"}
MOST_FILES, MEDIAN_FILES, MOST_LINES = 12, 8, 60  # of a folder, of folders, of a function


def modules() -> dict[str, Path]:
    """``heads.trees.tree`` -> its file, of every source."""
    paths = [path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


SOURCES = modules()
IMPORTABLE = [f"medusa_export.{name}".removesuffix(".__init__") for name in SOURCES]
FOLDERS = {"/".join(name.split(".")[:-1]) for name in SOURCES}


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


def module_of(target: str) -> str | None:
    """The source that an imported name stands for: ``medusa_export.heads.trees.tree.Tree`` -> ``heads.trees.tree``."""
    parts = target.split(".")[1:]
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in SOURCES:
            return name
        if f"{name}.__init__" in SOURCES:
            return f"{name}.__init__"
    return None


def folder_of(module: str) -> str:
    """``heads.trees.tree`` -> ``heads/trees``."""
    return "/".join(module.split(".")[:-1])


def problems(name: str, text: str) -> list[str]:
    """Imports of one source that break a rule."""
    found, folder = [], folder_of(name)
    for target in imports(text):
        top = target.partition(".")[0]
        module = module_of(target) if top == "medusa_export" else None
        if top == "":
            found.append(f"{name}: the relative import {target}")
        elif top in TOPS:
            found.append(f"{name}: {target} without medusa_export before it")
        elif top == "medusa_export" and module is None:
            found.append(f"{name}: {target}, which does not exist")
        elif module and folder != COMMANDS and folder_of(module) == COMMANDS:
            found.append(f"{name}: imports the commands")
        elif module and folder != COMMANDS and folder_of(module) not in (folder, *ALLOWED[folder].split()):
            found.append(f"{name}: {folder} may not import {folder_of(module)} ({target})")
        elif top in BACKENDS and name not in BACKENDS[top]:
            found.append(f"{name}: {top} belongs in {' or '.join(BACKENDS[top])}")
    lazily = {target.partition(".")[0] for target in imports(text, module_level=True)}
    return found + [f"{name}: imports {top} when it is imported" for top in sorted(lazily & BACKENDS.keys())]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups that import each other in a loop: what is left when all that import, or are imported by, no other are taken away."""
    left = {name: set(targets) - {name} for name, targets in edges.items()}
    while True:
        used = {target for targets in left.values() for target in targets}
        ends = {name for name, targets in left.items() if not targets & left.keys() or name not in used}
        if not ends:
            return [sorted(left)] if left else []
        left = {name: targets - ends for name, targets in left.items() if name not in ends}


def test_imports() -> None:
    assert len(SOURCES) > 200
    assert [problem for name, path in SOURCES.items() for problem in problems(name, path.read_text("utf-8"))] == []


def test_no_circle_of_files() -> None:
    edges = {
        name: {module for target in imports(path.read_text("utf-8")) if (module := module_of(target))}
        for name, path in SOURCES.items()
    }
    assert circles(edges) == []


def test_no_circle_of_folders() -> None:
    """The table itself has none, however the files in the folders import each other."""
    assert ALLOWED.keys() | {COMMANDS} == FOLDERS
    assert circles({folder: set(targets.split()) for folder, targets in ALLOWED.items()}) == []


def test_every_edge_of_the_table_is_used() -> None:
    used = {
        (folder_of(name), folder_of(module))
        for name, path in SOURCES.items()
        for target in imports(path.read_text("utf-8"))
        if (module := module_of(target))
    }
    table = {(folder, target) for folder, targets in ALLOWED.items() for target in targets.split()}
    assert table - used == set()


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_folders_are_small() -> None:
    counts = Counter(folder_of(name) for name in SOURCES if not name.endswith("__init__"))
    assert max(counts.values()) <= MOST_FILES, counts.most_common(3)
    assert statistics.median(counts.values()) <= MEDIAN_FILES


def test_functions_fit_on_a_screen() -> None:
    paths = [path for top in (*TOPS, *OTHER_TOPS) for path in (ROOT / top).rglob("*.py")]
    sizes = {
        f"{path.relative_to(ROOT)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in paths
        for node in ast.walk(parsed(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name for name, lines in sizes.items() if lines > MOST_LINES} == set()


@cache
def parsed(path: Path) -> ast.Module:
    """A source."""
    return ast.parse(path.read_text("utf-8"))


def repeated(classes: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names of public classes that stand in several modules, and in which.

    Args:
        classes: (module, name) of each.
    """
    found = defaultdict(list)
    for module, name in classes:
        found[name].append(module)
    return {name: where for name, where in found.items() if len(where) > 1 and not name.startswith("_")}


def test_two_classes_never_share_a_name() -> None:
    classes = [
        (name, node.name)
        for name, path in SOURCES.items()
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) > 200
    assert repeated(classes).keys() == SHARED_NAMES, repeated(classes)


def test_shared_names_are_found() -> None:
    assert repeated([("a", "One"), ("b", "One"), ("b", "Two"), ("a", "_Own"), ("b", "_Own")]) == {"One": ["a", "b"]}


def test_tests_mirror_the_sources() -> None:
    folders = {
        path.parent.relative_to(ROOT / "tests/unit").as_posix() for path in (ROOT / "tests/unit").rglob("test_*.py")
    }
    assert folders - {"."} <= FOLDERS


def test_the_package_lists_every_folder() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted("medusa_export." + folder.replace("/", ".") for folder in FOLDERS)


def test_the_files_of_each_backend_do_import_it() -> None:
    """Or the table above is out of date."""
    for package, owners in BACKENDS.items():
        for owner in owners:
            assert package in {target.partition(".")[0] for target in imports(SOURCES[owner].read_text("utf-8"))}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("heads.trees.tree", "from medusa_export.quantize.scales import Scales", "may not import quantize"),
        ("heads.trees.tree", "from medusa_export.heads.decoding import accept", "may not import heads/decoding"),
        ("quantize.ptq", "import medusa_export.exporter.plan.spec", "may not import exporter/plan"),
        ("exporter.plan.spec", "def f():\n  from medusa_export.engines.bench import run", "may not import engines/bench"),
        ("engines.decoding.generate", "from medusa_export import exporter", "may not import exporter"),
        ("engines.decoding.generate", "from medusa_export.exporter.nowhere import x", "may not import exporter"),
        ("engines.decoding.generate", "from medusa_export.nowhere import x", "which does not exist"),
        (
            "engines.decoding.generate",
            "from importlib import import_module as m\nimport_module('tensorrt_llm')",
            "belongs in engines.trtllm.session",
        ),
        ("engines.bench.run", "from medusa_export.exporter.cli.run import run_main", "imports the commands"),
        ("exporter.pipeline.export", "from medusa_export.exporter.cli import export", "imports the commands"),
        ("heads.trees.tree", "from . import errors", "relative import"),
        ("heads.trees.tree", "from heads import errors", "without medusa_export"),
        ("exporter.pipeline.export", "def f():\n  import onnxruntime", "onnxruntime belongs in engines.onnxruntime.engine"),
        ("engines.onnxruntime.engine", "try:\n  import onnxruntime\nexcept ImportError:\n  pass", "when it is imported"),
        ("quantize.ptq", "class A:\n  import modelopt.torch.quantization as mtq", "when it is imported"),
        ("quantize.ptq", "def f():\n  import modelopt.torch.quantization as mtq", None),
        ("exporter.cli.export", "from medusa_export.engines.bench.run import run", None),
        ("exporter.plan.spec", "from medusa_export.heads.checkpoint import families", None),
    ],
)  # fmt: skip
def test_the_rules_find(name: str, text: str, problem: str | None) -> None:
    found = problems(name, text)
    assert (problem in found[0]) if problem else (found == [])


def run(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
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
    assert len(engines) > 60
    others = [f"medusa_export.{name}" for name in WITHOUT_TORCH]
    commands = [name for name in IMPORTABLE if name.startswith("medusa_export.exporter.cli.")]
    assert run(BLOCKED, *engines, *others, *commands, "medusa_export.quantize.formats") == "imported"


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
