"""Inputs with one value altered by machine: an export takes or refuses them in one line, without a traceback or "report this"."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import InternalError, MedusaExportError
from medusa_export.engines.tensorrt.build import TensorRtBuilder
from medusa_export.engines.tuning.auto import choose_tree
from medusa_export.engines.verify.selfcheck import check_engine
from medusa_export.exporter.job.arguments import ExportArguments
from medusa_export.exporter.pipeline.export import export
from medusa_export.heads.contract.engine_tools import EngineTools
from tests.faults.exports import Kind, inputs

SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
FILES = (
    "model/config.json", "heads/config.json", "model/generation_config.json", "model/tokenizer_config.json",
    "model/tokenizer.json",
)  # fmt: skip
VALUES = (None, "x", [], {}, -1, 0, 1e300, 3, True, [None], "", 2**70, [[1]], 0.5, {"a": 1})
ONCE_A_TRACEBACK = (
    ("model/config.json", ("rope_parameters", "factor"), 2**70),
    ("model/config.json", ("rope_parameters", "rope_theta"), None),
    ("model/config.json", ("rope_parameters", "rope_theta"), 2**70),
    ("model/config.json", ("rope_parameters", "original_max_position_embeddings"), 2**70),
    ("model/config.json", ("dtype",), []),
    ("model/config.json", ("dtype",), {}),
    ("model/tokenizer.json", ("model", "unk_token"), "no token"),
)
DRAWN, SEED = 24, 11


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    inputs(Kind("llama", {"rope_parameters": SCALED}), root)
    return root


def test_altered_inputs(place: Path) -> None:
    bodies = {file: json.loads((place / file).read_text("utf-8")) for file in FILES}
    keys = [(file, path) for file, body in bodies.items() for path in _paths(body)]
    chance = random.Random(SEED)
    drawn = [(*chance.choice(keys), chance.choice(VALUES)) for _ in range(DRAWN)]
    for number, (file, path, value) in enumerate(itertools.chain(ONCE_A_TRACEBACK, drawn)):
        before = (place / file).read_bytes()
        (place / file).write_text(json.dumps(_with(bodies[file], path, value)), "utf-8")
        arguments = ExportArguments(place / "model", place / f"out{number}", heads=place / "heads", engine="none")
        try:
            export(arguments, EngineTools(check_engine, choose_tree, TensorRtBuilder()))
        except InternalError as error:
            pytest.fail(f"{file} {path} {value!r}: {error}")
        except MedusaExportError:
            continue
        finally:
            (place / file).write_bytes(before)
    assert not [path.name for path in place.iterdir() if path.name.startswith(".out")]


def _paths(body: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every value of a JSON document; of a vocabulary's hundreds, as of a list, the first few."""
    items: Any = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    found = [before] if before else []
    for key, value in itertools.islice(items, 40):
        found += _paths(value, (*before, key))
    return found


def _with(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = dict(body) if isinstance(body, dict) else list(body)
    changed[path[0]] = _with(changed[path[0]], path[1:], value)
    return changed
