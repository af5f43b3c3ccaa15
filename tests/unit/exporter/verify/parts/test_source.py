"""Where verify finds what an export was made from, on the machine that made it and on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.artifacts.manifest import read_manifest
from medusa_export.exporter.verify.parts.export import verify
from medusa_export.exporter.verify.parts.source import Source, find_source
from tests.faults.exports import Kind, inputs, make_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of heads alone; its inputs lie beside it and were given by absolute paths, so that their names are recorded."""
    root = tmp_path_factory.mktemp("made")
    kind = Kind("llama", {}, {"format": "medusa-v1"})
    inputs(kind, root)
    return make_of(kind, root)


def find(manifest: dict[str, Any], out: Path) -> Source | str:
    return find_source(manifest, None, None, out=out)


def test_beside_the_export(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(made)
    assert manifest["arguments"]["ckpt"] == "model"
    found = find(manifest, made)
    assert isinstance(found, Source)
    assert found.ckpt == made.parent / "model"


@pytest.mark.parametrize("form", ["--ckpt {0}/model --heads {0}/heads", "--heads={0}/heads --ckpt={0}/model"])
def test_where_the_command_had_it(form: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export was moved: of an absolute path the arguments have the name alone, and the command all of it."""
    monkeypatch.chdir(tmp_path)
    manifest = {**read_manifest(made), "command": f"medusa-export {form.format(made.parent)}"}
    assert isinstance(find(manifest, tmp_path / "moved"), Source)


def test_what_is_nowhere_is_said_with_the_places(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = {**read_manifest(made), "command": "medusa-export --ckpt /gone/model 'unbalanced"}
    assert find(manifest, tmp_path / "moved/out") == (
        f"model is not there any more (looked for model, {tmp_path}/moved/model)"
    )
    manifest["command"] = "medusa-export --ckpt /gone/model"
    assert str(find(manifest, tmp_path / "moved/out")).endswith(
        f"(looked for /gone/model, model, {tmp_path}/moved/model)"
    )
    manifest["sources"] = {"ckpt": {"name": "owner/model", "commit": "0123456789abcdef"}}
    assert str(find(manifest, made)).endswith("(looked for commit 0123456789ab in the Hugging Face cache)")


def test_one_of_another_content_does_not_count(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(made)
    manifest["inputs"] = {**manifest["inputs"], "ckpt/config.json": "0" * 64}
    assert str(find(manifest, made)).endswith("config.json is not what was exported")


def test_a_template_of_its_own_in_a_unified_checkpoint(tmp_path: Path) -> None:
    """--chat-template with --format hf: its template is not the source's, and that is no finding."""
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    kind = Kind("llama", {}, {"format": "hf", "chat_template": template})
    inputs(kind, tmp_path)
    out = make_of(kind, tmp_path)
    assert verify(out, ckpt=tmp_path / "model", heads=tmp_path / "heads").findings == []
