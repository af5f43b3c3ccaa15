"""Names of models on the hub: what is downloaded, what is found again offline, and what every refusal tells the user to run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.core.hub import ModelFiles, find_model, hub_id
from medusa_export.core.typed_paths import as_recorded
from tests.standins.hub import Hub, Repo, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ASK = """
import json, sys
from medusa_export.core.errors import MedusaExportError
from medusa_export.core import hub
given = json.loads(sys.argv[1])
wanted = getattr(hub, given.pop("wanted", "BASE"))
try:
    found = hub.find_model(**given, wanted=wanted)
except MedusaExportError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({"path": str(found.path), "name": found.name, "commit": found.commit}))
"""
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serving() as hub:
        for number, (name, files) in enumerate(REPOS.items()):
            directory = tmp_path_factory.mktemp("repo")
            for file, text in files.items():
                (directory / file).parent.mkdir(exist_ok=True)
                (directory / file).write_text(text)
            hub.repos[name] = Repo(directory, f"{number}{COMMIT[1:]}", ("main", "v1.0"))
        hub.repos["o/gated"].gated = True
        yield hub


def index(*shards: str) -> str:
    return json.dumps({"weight_map": {f"t{number}": shard for number, shard in enumerate(shards)}})


EXTRAS = {"README.md": "x", "original/consolidated.00.pth": "x", "onnx/model.onnx": "x", "consolidated.safetensors": "x",
          "model.fp16.safetensors": "x", "tf_model.h5": "x"}  # fmt: skip
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
REPOS = {
    "o/both": {**{name: json.dumps({"in": name}) for name in SMALL}, **EXTRAS, "model.safetensors": "st", "pytorch_model.bin": "bin"},
    "o/sharded": {
        "config.json": "{}", "model.safetensors.index.json": index(*SHARDS),
        "model-00001-of-00002.safetensors": "1", "model-00002-of-00002.safetensors": "2", "model-00001-of-00009.safetensors": "old",
        "pytorch_model.bin.index.json": index("pytorch_model-00001-of-00001.bin"), "pytorch_model-00001-of-00001.bin": "bin",
    },
    "o/pickled": {"config.json": "{}", "pytorch_model.bin.index.json": index("pytorch_model-00001-of-00001.bin"),
                  "pytorch_model-00001-of-00001.bin": "1"},
    "o/heads": {"config.json": "{}", "medusa_lm_head.pt": "1", "README.md": "x"},
    "o/gated": {"config.json": "{}"},
    "o/bad-config": {"config.json": "no JSON", "model.safetensors": "gigabytes"},
}  # fmt: skip


@pytest.fixture
def ask(served: Hub, tmp_path: Path) -> Ask:
    """``ask(given, *, environment={}, **keywords)``: what ``find_model`` says in a process whose hub is the stand-in."""

    def call(given: str, *, environment: dict[str, str] | None = None, **keywords: object) -> dict[str, Any]:
        env = {**os.environ, **served.environment(tmp_path / "home"), **(environment or {})}
        result = subprocess.run(
            [sys.executable, "-c", ASK, json.dumps({"given": given, **keywords})],
            env=env, capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    return call


def names(answer: dict[str, Any]) -> set[str]:
    assert "path" in answer, answer
    root = Path(answer["path"])
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


class TestDownload:
    def test_safetensors_first_and_nothing_more(self, ask: Ask, served: Hub, tmp_path: Path) -> None:
        served.downloaded.clear()
        answer = ask("o/both")
        assert names(answer) == {*SMALL, "model.safetensors"}
        assert {name.removeprefix("o/both/") for name in served.downloaded} == {*SMALL, "model.safetensors"}
        assert (answer["name"], answer["commit"]) == ("o/both", served.repos["o/both"].commit)
        cache = tmp_path / "home/hub/models--o--both"
        assert Path(answer["path"]) == cache / "snapshots" / answer["commit"]
        assert (cache / "refs/main").read_text() == answer["commit"]
        weights = Path(answer["path"]) / "model.safetensors"
        assert weights.is_symlink()
        assert weights.resolve().parent == cache / "blobs"

    @pytest.mark.parametrize(
        ("repo", "weights"),
        [
            ("o/sharded", {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}),
            ("o/pickled", {"pytorch_model-00001-of-00001.bin"}),
        ],
    )
    def test_the_shards_of_the_index_that_is_used(self, ask: Ask, repo: str, weights: set[str]) -> None:
        found = names(ask(repo))
        assert {name for name in found if not name.endswith(".json")} == weights

    def test_heads(self, ask: Ask) -> None:
        assert names(ask("o/heads", wanted="HEADS")) == {"config.json", "medusa_lm_head.pt"}

    def test_a_revision_by_flag_and_in_the_name(self, ask: Ask, served: Hub) -> None:
        commit = served.repos["o/both"].commit
        for answer in (ask("o/both@v1.0"), ask("o/both", revision="v1.0"), ask("o/both@v1.0", revision="absent")):
            assert (answer["commit"], answer["name"].partition("@")[0]) == (commit, "o/both")
        assert ask("o/both", revision=commit)["commit"] == commit


class TestOffline:
    def test_a_cache_is_enough(self, ask: Ask, served: Hub) -> None:
        first = ask("o/both")
        served.downloaded.clear()
        assert ask("o/both", environment={"HF_HUB_OFFLINE": "1"}) == first
        assert ask("o/both", environment={"HF_ENDPOINT": "http://127.0.0.1:9"}) == first
        assert served.downloaded == []

    def test_absent(self, ask: Ask) -> None:
        line = ask("o/both", environment={"HF_HUB_OFFLINE": "1"})["error"]
        assert line == (
            "o/both: got no such directory, and no whole copy in the Hugging Face cache (offline, as HF_HUB_OFFLINE says); expected "
            "a local directory, or a model of the Hugging Face hub; with access to the network, run: hf download o/both"
        )
        line = ask("o/both@v1.0", environment={"HF_ENDPOINT": "http://127.0.0.1:9"})["error"]
        assert "(ConnectError: " in line
        assert line.endswith("run: hf download o/both --revision v1.0")

    def test_a_copy_without_its_weights(self, ask: Ask, tmp_path: Path) -> None:
        snapshot = Path(ask("o/sharded")["path"])
        (snapshot / "model-00002-of-00002.safetensors").unlink()
        line = ask("o/sharded", environment={"HF_HUB_OFFLINE": "1"})["error"]
        assert line.startswith("o/sharded: got ")
        assert line.endswith("run: hf download o/sharded")


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "keywords", "line"),
        [
            ("o/absent", {}, "o/absent: got no such directory, and no such model on the hub that .* hf auth login"),
            ("o/both", {"revision": "v9"}, "o/both: got no revision v9; expected a branch, tag or commit"),
            ("o/gated", {}, "o/gated: got a model whose terms .* accept its terms at https://huggingface.co/o/gated"),
        ],
    )  # fmt: skip
    def test_by_the_hub(self, ask: Ask, given: str, keywords: dict[str, str], line: str) -> None:
        error = ask(given, **keywords)["error"]
        assert re.match(line, error), error
        assert "\n" not in error

    def test_a_revision_of_a_local_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"--revision: got main for the local path .*owner/name@revision"):
            find_model(tmp_path, revision="main")


class TestLocal:
    def test_a_directory_of_that_name_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert hub_id("o/both") is not None
        (tmp_path / "o/both").mkdir(parents=True)
        assert hub_id("o/both") is None
        assert find_model("o/both") == ModelFiles(Path("o/both"), "o/both")

    @pytest.mark.parametrize(
        "path", ["model", "./o/both", "../o/both", "/o/both", "a/b/c", "heads/medusa_lm_head.pt", "o/both/", "~/model"]
    )
    def test_paths_are_no_names(self, path: str) -> None:
        found = hub_id(path)
        assert found is None


def test_weights_are_not_downloaded_for_a_model_that_is_refused(served: Hub, tmp_path: Path) -> None:
    code = (
        "from medusa_export.core.hub import find_model\nfrom medusa_export.core.json_fields import read_json\n"
        "find_model('o/bad-config', check=lambda path: read_json(path / 'config.json'))"
    )
    served.downloaded.clear()
    env = {**os.environ, **served.environment(tmp_path / "home")}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "ConfigError" in result.stderr
    assert served.downloaded == ["o/bad-config/config.json"]


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [("models/a", "models/a"), ("../a", "../a"), ("/data/models/a", "a"), ("./a/", "a"), ("o/name", "o/name")],
)
def test_what_artefacts_say_of_a_path(typed: str, recorded: str) -> None:
    assert as_recorded(typed) == recorded
