"""The model repository of an ONNX Runtime engine: written whole, verified, and with the tree that was asked for. No server runs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError, TreeError
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.engines.serving.triton.config_files import render
from medusa_export.engines.serving.triton.repository import repository_configs, verify_repository, write_repository
from tests.paths import assert_golden


@pytest.fixture
def engine(tiny_engine: Callable[..., Any]) -> Path:
    path: Path = tiny_engine().path
    return path


def test_an_engine_for_something_else(engine: Path, tmp_path: Path) -> None:
    info = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps({**info, "backend": "tensorrt-llm"}))
    with pytest.raises(ConfigError, match="an engine for tensorrt-llm"):
        write_repository(engine, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def written_tree(path: Path, *choices: list[int]) -> Path:
    rows = [{"batch": batch, "medusa_choices": list(choices[:batch])} for batch in (1, 2)]
    path.write_text(json.dumps({"medusa_choices": list(choices), "crossover": rows}))
    return path


def test_a_repository(engine: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write_repository(engine, repository, name="chat", options=ServingOptions(max_queue=7))
    assert verify_repository(repository) == []
    served = {path.name: path.read_bytes() for path in (repository / "chat/1/engine").iterdir()}
    assert served == {path.name: path.read_bytes() for path in engine.iterdir()}
    streaming, unary = ((repository / name / "config.pbtxt").read_text() for name in ("chat", "chat_unary"))
    assert "decoupled: true" in streaming
    assert "decoupled" not in unary
    assert 'string_value: "7"' in streaming


@pytest.mark.parametrize("model", ["medusa", "medusa_unary"])
def test_the_configuration_is_what_was_kept(model: str) -> None:
    assert_golden(f"triton/{model}.pbtxt", render(repository_configs("medusa", ServingOptions())[model]))


def test_another_tree(engine: Path, tmp_path: Path) -> None:
    tree = written_tree(tmp_path / "tree.json", [0], [1])
    write_repository(engine, tmp_path / "repository", tree=tree)
    assert (tmp_path / "repository/medusa/1/engine/tree.json").read_bytes() == tree.read_bytes()
    assert verify_repository(tmp_path / "repository") == []
    with pytest.raises(ConfigError, match="--tree requires --drafts heads"):
        write_repository(engine, tmp_path / "text", tree=tree, options=ServingOptions(drafts="text"))
    assert not (tmp_path / "text").exists()


def test_a_changed_file_is_named(engine: Path, tmp_path: Path) -> None:
    write_repository(engine, tmp_path / "repository")
    config = tmp_path / "repository/medusa/config.pbtxt"
    text = config.read_text().replace("decoupled: true", "decoupled: false").replace('"256"', '"-3"')
    config.write_text(text.replace('key: "threads"', 'key: "treads"').replace("TYPE_BOOL", "TYPE_INT8", 1))

    def port(kind: str) -> str:
        return f'name: "exclude_input_in_output" data_type: {kind} dims: 1 optional: true'

    changed, *named = verify_repository(tmp_path / "repository")
    assert "medusa/config.pbtxt" in changed
    assert [line.partition("config.pbtxt: ")[2] for line in named] == [
        f"input exclude_input_in_output: got {port('TYPE_INT8')}; written was {port('TYPE_BOOL')}",
        "parameter max_queue: got '-3'; written was '256'; wrong: expected an integer, 1 or more",
        "parameter max_tokens: got '-3'; written was '256'; wrong: expected an integer, 1 or more",
        "parameter threads: got nothing; written was '0'; changed, and valid",
        "parameter treads: got '0'; written was nothing; wrong: there is no such parameter, and the model would ignore it",
        "model_transaction_policy: got nothing; written was decoupled: true; wrong: expected what was written, "
        "as the model sends its answers that way",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "max_batch_size: 1",
            "max_batch_size: 8",
            "max_batch_size: got 8; written was 1; wrong: expected 1: a request",
        ),
        ("count: 1", "count: 2", "wrong: expected one instance"),
        ("KIND_CPU", "KIND_GPU", "wrong: expected one instance"),
        ('backend: "python"', 'backend: "python"\ndynamic_batching { }', "wrong: expected none: a refused request"),
        (
            'name: "medusa"',
            'name: "ensemble"',
            "name: got ensemble; written was medusa; wrong: expected the name of its",
        ),
    ],
)
def test_a_changed_field_is_judged(old: str, new: str, message: str, engine: Path, tmp_path: Path) -> None:
    write_repository(engine, tmp_path / "repository")
    config = tmp_path / "repository/medusa/config.pbtxt"
    config.write_text(config.read_text().replace(old, new, 1))
    _, line = verify_repository(tmp_path / "repository")
    assert message in line


def test_use_leaves_compiled_files(engine: Path, tmp_path: Path) -> None:
    write_repository(engine, tmp_path / "repository")
    folder = tmp_path / "repository/medusa/1/__pycache__"
    folder.mkdir()
    (folder / "model.cpython-311.pyc").write_bytes(b"x")
    assert verify_repository(tmp_path / "repository") == []


def test_the_script_that_starts_it(engine: Path, tmp_path: Path) -> None:
    """A stand-in for tritonserver says what it was started with: on loopback, here, with a stack that large bodies need."""
    write_repository(engine, tmp_path / "repository")
    server = tmp_path / "bin" / "tritonserver"
    server.parent.mkdir()
    server.write_text('#!/bin/sh\npwd\nulimit -s\necho "$@"\n')
    server.chmod(0o755)
    script = ["bash", str(tmp_path / "repository/launch.sh"), "--log-verbose", "1"]
    done = subprocess.run(
        script, capture_output=True, text=True, check=True, env={"PATH": f"{server.parent}:/usr/bin:/bin"}
    )
    folder, stack, given = done.stdout.splitlines()
    assert folder == str((tmp_path / "repository").resolve())
    assert stack in ("262144", "unlimited") or "warning: the stack stays" in done.stderr
    assert given.count("127.0.0.1") == 3
    assert given.endswith("--log-verbose 1")
    absent = subprocess.run(script, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})
    assert (absent.returncode, absent.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [({"name": "../x"}, ConfigError, "--name"), ({"tree": Path("absent.json")}, TreeError, "absent.json")],
    ids=["name", "tree"],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str, engine: Path, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        write_repository(engine, tmp_path / "repository", **options)
    assert not (tmp_path / "repository").exists()


def test_a_tree_deeper_than_the_heads(engine: Path, tmp_path: Path) -> None:
    tree = written_tree(tmp_path / "tree.json", [0], [0, 0], [0, 0, 0], [0, 0, 0, 0])
    rows = [{"batch": batch, "medusa_choices": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]} for batch in (1, 2)]
    tree.write_text(json.dumps({"medusa_choices": [[0]], "crossover": rows}))
    with pytest.raises((TreeError, ConfigError)):
        write_repository(engine, tmp_path / "repository", tree=tree)
    assert not (tmp_path / "repository").exists()
