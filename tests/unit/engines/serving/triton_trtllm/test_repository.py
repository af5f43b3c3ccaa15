"""The repository for a TensorRT-LLM engine: data in, configurations out, read back as Triton does. No engine of NVIDIA is here."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError, OutputError
from medusa_export.engines.serving.triton.config_files import parse, render
from medusa_export.engines.serving.triton_trtllm.configs import (
    EngineFacts,
    TrtllmServing,
    engine_parameters,
    model_configs,
)
from medusa_export.engines.serving.triton_trtllm.deployment import deployment_files
from medusa_export.engines.serving.triton_trtllm.parameters import PARAMETERS, parameter_problems, parse_choices
from medusa_export.engines.serving.triton_trtllm.repository import (
    engine_facts,
    is_trtllm_engine,
    verify_trtllm_repository,
    write_trtllm_repository,
)
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.contract.trtllm_releases import RELEASES, find_release
from medusa_export.heads.trees.tree import Tree, load_tree
from tests.paths import assert_golden

TREE = Tree.from_choices([[0], [1], [0, 0]])
FACTS = EngineFacts(find_release("1.2.1"), TREE, 1, 4, 512, (2, 7), paged_context=True, logits="float32", vocab_size=97)
SERVING = TrtllmServing()


def write_engine(path: Path, *, version: str = "1.2.1", tp: int = 1, **pretrained: Any) -> Path:
    """What build.sh leaves; the engine's files are text that says so."""
    (path / "medusa").mkdir(parents=True)
    config = {
        "version": version,
        "pretrained_config": {
            "mapping": {"tp_size": tp}, "max_draft_len": 3, "num_medusa_heads": 2, "logits_dtype": "float32", **pretrained,
        },
        "build_config": {"max_batch_size": 4, "max_seq_len": 515, "plugin_config": {"use_paged_context_fmha": True}},
    }  # fmt: skip
    (path / "medusa" / "config.json").write_text(json.dumps(config))
    for rank in range(tp):
        (path / "medusa" / f"rank{rank}.engine").write_text("a stand-in: no engine")
    EngineInfo(
        backend="tensorrt-llm", form="fp8", precision="FP8", max_length=512, max_depth=2, top_k=16, num_hidden_layers=1,
        num_key_value_heads=2, head_dim=16, hidden_size=64, vocab_size=97, eos_token_ids=(2, 7), session_options={},
        heads_session_options={}, source={},
    ).save(path)  # fmt: skip
    (path / "tree.json").write_text(TREE.to_json())
    (path / "build.json").write_text("{}")
    return path


@pytest.fixture
def engine_dir(tmp_path: Path, tiny_tokenizer: Callable[..., Path]) -> Path:
    return tiny_tokenizer(write_engine(tmp_path / "engine"))


@pytest.fixture
def repository(engine_dir: Path, tmp_path: Path) -> Path:
    write_trtllm_repository(engine_dir, tmp_path / "repository")
    return tmp_path / "repository"


class TestParameters:
    @pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
    def test_ours_are_right_in_every_release(self, release: Any) -> None:
        facts = replace(FACTS, release=release, window=4096)
        assert parameter_problems(engine_parameters(facts, SERVING), release) == []

    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            ("decoding_mode", "Medusa", "got 'Medusa'; expected medusa"),
            ("decoding_mode", "top_k", "expected medusa"),
            ("gpt_model_type", "V1", "expected inflight_fused_batching"),
            ("gpt_model_path", "engines/medusa", "expected an absolute path"),
            ("gpt_model_path", "${engine_dir}", "expected an absolute path"),
            ("medusa_choices", "${medusa_choices}", "expected a whole tree"),
            ("medusa_choices", "[[0], [1]]", "expected a whole tree"),
            ("medusa_choices", "{0}, {1, 0}", "expected a whole tree"),  # its parent would be taken for the root
            ("medusa_choices", "{0}, {16}", "expected a whole tree"),
            ("max_beam_width", "4", "expected 1"),
            ("batch_scheduler_policy", "max_util", "expected guaranteed_no_evict or max_utilization"),
            ("kv_cache_free_gpu_mem_fraction", "90", "expected a fraction"),
            ("kv_cache_free_gpu_mem_fraction", "0", "expected a fraction"),
            ("enable_kv_cache_reuse", "yes", "expected true or false"),
            ("cancellation_check_period_ms", "0", "expected an integer, 1 or more"),
            ("gpu_device_ids", "0, 1", "expected device numbers"),
            ("exclude_input_in_output", "false", "expected true"),
            ("multi_block_mode", "true", "expected false"),
            ("executor_worker_path", "trtllmExecutorWorker", "expected the path"),
            ("medusa_choice", "{0}", "unknown; the backend would ignore it"),
        ],
    )
    def test_what_the_backend_would_not_say(self, name: str, text: str, expected: str) -> None:
        (problem,) = parameter_problems({**engine_parameters(FACTS, SERVING), name: text}, FACTS.release)
        assert f"parameter {name}: " in problem
        assert expected in problem

    @pytest.mark.parametrize("text", ["True", "TRUE", "1", "true"])
    def test_what_is_true(self, text: str) -> None:
        given = {**engine_parameters(FACTS, SERVING), "enable_kv_cache_reuse": text, "exclude_input_in_output": text}
        assert parameter_problems(given, FACTS.release) == []

    def test_what_the_first_release_reads(self) -> None:
        more = {
            "stats_check_period_ms": "100",
            "participant_ids": "0,1",
            "recv_poll_period_ms": "0",
            "kv_cache_onboard_blocks": "1",
        }
        given = {**engine_parameters(FACTS, SERVING), **more}
        assert parameter_problems(given, find_release("0.17")) == []

    def test_other_ways_to_draft_are_known_and_refused(self) -> None:
        for name in ("eagle_choices", "lookahead_window_size"):
            (problem,) = parameter_problems({**engine_parameters(FACTS, SERVING), name: "3"}, FACTS.release)
            assert "expected nothing" in problem

    def test_missing(self) -> None:
        problems = parameter_problems({}, FACTS.release)
        assert {problem.split(":")[0].split(" ")[1] for problem in problems} == {
            name for name, row in PARAMETERS.items() if row.required
        }

    def test_what_a_release_does_not_know_yet(self) -> None:
        given = {**engine_parameters(FACTS, SERVING), "num_nodes": "2"}
        assert parameter_problems(given, find_release("1.0")) == []
        (problem,) = parameter_problems(given, find_release("0.17"))
        assert "known from TensorRT-LLM 0.19 on; 0.17.0.post1 would ignore it" in problem

    def test_choices_there_and_back(self) -> None:
        for tree in (TREE, load_tree("medusa-63")):
            assert parse_choices(tree.to_triton()) == tree
        assert parse_choices("{0},{0,1},{0,0},{1}").choices == ((0,), (1,), (0, 0), (0, 1))


class TestConfigurations:
    def test_ensemble_fits_its_models(self) -> None:
        configs = model_configs(FACTS, SERVING)
        ports = {
            model: {side: {each["name"]: each for each in config[side]} for side in ("input", "output")}
            for model, config in configs.items()
        }
        known = dict(ports["ensemble"]["input"])
        for step in configs["ensemble"]["ensemble_scheduling"]["step"]:
            model = ports[step["model_name"]]
            for port, name in step["input_map"].items():
                assert (model["input"][port]["data_type"], model["input"][port]["dims"]) == (
                    known[name]["data_type"], known[name]["dims"],
                ), (step["model_name"], port)  # fmt: skip
            required = {name for name, port in model["input"].items() if not port.get("optional")}
            assert required <= step["input_map"].keys()
            known |= {name: model["output"][port] for port, name in step["output_map"].items()}
        assert ports["ensemble"]["output"].keys() <= known.keys()

    def test_what_decides_medusa(self) -> None:
        engine = model_configs(FACTS, TrtllmServing(max_queue=9, kv_fraction=0.5))["tensorrt_llm"]
        parameters = {name: value["string_value"] for name, value in engine["parameters"].items()}
        assert parameters["medusa_choices"] == "{0}, {1}, {0, 0}"
        assert (parameters["decoding_mode"], parameters["gpt_model_type"]) == ("medusa", "inflight_fused_batching")
        assert (parameters["gpt_model_path"], parameters["max_beam_width"]) == ("/models/tensorrt_llm/1", "1")
        assert parameters["kv_cache_free_gpu_mem_fraction"] == "0.5"
        assert engine["dynamic_batching"]["default_queue_policy"] == {"max_queue_size": 9}
        assert engine["model_transaction_policy"] == {"decoupled": True}
        assert engine["max_batch_size"] == 4

    def test_cache_reuse_needs_the_kernel(self) -> None:
        assert engine_parameters(FACTS, SERVING)["enable_kv_cache_reuse"] == "true"
        assert engine_parameters(replace(FACTS, paged_context=False), SERVING)["enable_kv_cache_reuse"] == "false"

    def test_sliding_window(self) -> None:
        assert engine_parameters(replace(FACTS, window=4096), SERVING)["max_attention_window_size"] == "4096"
        some = engine_parameters(replace(FACTS, window=[8192, 4096]), SERVING)
        assert some["max_attention_window_size"] == "8192,4096"

    def test_drafts_are_counted_where_the_engine_can(self) -> None:
        def outputs(release: str) -> set[str]:
            configs = model_configs(replace(FACTS, release=find_release(release)), SERVING)
            return {port["name"] for port in configs["tensorrt_llm_bls"]["output"]}

        assert "total_accepted_draft_tokens" in outputs("1.2.1")
        assert outputs("0.17") == {"text_output", "completion_tokens", "engine_steps"}


class TestRepository:
    def test_layout(self, repository: Path) -> None:
        files = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
        models = {"preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls"}
        assert {path.name for path in repository.iterdir() if path.is_dir()} == models
        assert {f"{model}/config.pbtxt" for model in models} <= files
        assert {"launch.sh", "compose.yaml", "kubernetes.yaml", "README.md", "medusa.json"} <= files
        assert {f"tensorrt_llm/1/{name}" for name in ("config.json", "rank0.engine", "tree.json")} <= files
        assert "preprocessing/1/tokenizer/tokenizer.json" in files
        assert not [name for name in files if "build.json" in name]
        assert verify_trtllm_repository(repository) == []

    def test_use_leaves_compiled_files(self, repository: Path) -> None:
        for folder in ("preprocessing/1/__pycache__", "tensorrt_llm_bls/1/__pycache__"):
            (repository / folder).mkdir()
            (repository / folder / "model.cpython-312.pyc").write_bytes(b"x")
        assert verify_trtllm_repository(repository) == []
        (repository / "preprocessing" / "1" / "other.pyc").write_bytes(b"x")
        assert len(verify_trtllm_repository(repository)) == 1

    def test_an_edited_configuration_is_explained(self, repository: Path) -> None:
        path = repository / "tensorrt_llm" / "config.pbtxt"
        path.write_text(
            path.read_text().replace('"guaranteed_no_evict"', '"max_util"').replace('"max_utilization"', '"max_util"')
        )
        problems = verify_trtllm_repository(repository)
        assert any("SHA-256" in problem or "bytes" in problem for problem in problems)
        assert any(
            "parameter batch_scheduler_policy" in problem and "expected guaranteed_no_evict" in problem
            for problem in problems
        )

    def test_nothing_is_left_to_fill_in(self, repository: Path, engine_dir: Path) -> None:
        for path in repository.glob("*/config.pbtxt"):
            assert "$" not in path.read_text()
        assert str(engine_dir.parent) not in "".join(path.read_text() for path in repository.glob("*/config.pbtxt"))

    def test_models_need_nothing_of_this_package(self, repository: Path) -> None:
        for path in repository.rglob("*.py"):
            assert not re.search(r"^\s*(from|import) medusa_export", path.read_text(), re.MULTILINE), path

    @pytest.mark.parametrize(
        ("model", "old", "new", "message"),
        [
            (
                "tensorrt_llm",
                '"medusa"',
                '"medussa"',
                "parameter decoding_mode: got 'medussa'; written was 'medusa'; wrong: expected medusa",
            ),
            (
                "tensorrt_llm",
                "{0, 0}",
                "{1, 0}",
                "medusa_choices: got '{0}, {1}, {1, 0}'; written was '{0}, {1}, {0, 0}'; changed, and valid",
            ),
            (
                "tensorrt_llm",
                "max_batch_size: 4",
                "max_batch_size: 8",
                "max_batch_size: got 8; written was 4; wrong: expected 1 to 4",
            ),
            (
                "tensorrt_llm",
                "max_batch_size: 4",
                "max_batch_size: 2",
                "max_batch_size: got 2; written was 4; changed, and valid",
            ),
            ("tensorrt_llm", "count: 1", "count: 2", "wrong: expected one instance"),
            ("tensorrt_llm", "KIND_CPU", "KIND_GPU", "wrong: expected KIND_CPU"),
            ("preprocessing", "count: 1", "count: 4", "changed, and valid"),
            ("tensorrt_llm", "max_queue_size: 256", "max_queue_size: 9", "changed, and valid"),
            (
                "tensorrt_llm",
                "decoupled: true",
                "decoupled: false",
                "model_transaction_policy: got nothing; written was decoupled: true; wrong: expected what was written",
            ),
            ("ensemble", "max_batch_size", "max_batchsize", "no model configuration"),
            ("preprocessing", "TYPE_INT32", "TYPE_INT33", "no model configuration"),
        ],
    )
    def test_edited(self, model: str, old: str, new: str, message: str, repository: Path) -> None:
        path = repository / model / "config.pbtxt"
        path.write_text(path.read_text().replace(old, new))
        manifest = json.loads((repository / "medusa.json").read_text())
        entry = manifest["files"][f"{model}/config.pbtxt"]
        entry |= {"size": path.stat().st_size, "sha256": __import__("hashlib").sha256(path.read_bytes()).hexdigest()}
        (repository / "medusa.json").write_text(json.dumps(manifest))
        problems = verify_trtllm_repository(repository)
        assert any(message in problem for problem in problems), problems

    @pytest.mark.parametrize(
        ("model", "name", "text", "verdict"),
        [
            ("tensorrt_llm", "enable_kv_cache_reuse", "TRUE", "changed, and valid"),
            ("tensorrt_llm", "exclude_input_in_output", "1", "changed, and valid"),
            ("tensorrt_llm", "eagle_choices", "", "changed, and valid"),
            ("tensorrt_llm", "kv_cache_free_gpu_mem_fraction", "0.5", "changed, and valid"),
            ("tensorrt_llm", "kv_cache_free_gpu_mem_fraction", None, "changed, and valid"),
            ("tensorrt_llm", "decoding_mode", None, "wrong: expected medusa"),
            ("tensorrt_llm", "max_beam_width", "4", "wrong: expected 1"),
            ("tensorrt_llm", "enable_kv_cache_resue", "true", "wrong: unknown; the backend would ignore it"),
            ("tensorrt_llm", "medusa_choices", "{0}, {1}", "wrong: expected 3 choices, as the engine was built for"),
            ("tensorrt_llm", "medusa_choices", "{0}, {0, 0}, {0, 0, 0}", "wrong: expected 3 choices, as the engine was built"),
            ("preprocessing", "max_text_bytes", "2000", "changed, and valid"),
            ("preprocessing", "max_text_bytes", "much", "wrong: expected an integer, 1 or more"),
            ("preprocessing", "vocab_size", "98", "wrong: expected '97', which follows from the engine"),
            ("preprocessing", "vocab_sise", "97", "wrong: there is no such parameter, and the model would ignore it"),
            ("postprocessing", "skip_special_tokens", "1", "wrong: expected true or false"),  # it reads "true" alone
            ("tensorrt_llm_bls", "acceptance", "false", "wrong: expected 'true', which follows from the engine"),
        ],
    )  # fmt: skip
    def test_an_edited_parameter_is_told_once(
        self, model: str, name: str, text: str | None, verdict: str, repository: Path
    ) -> None:
        path = repository / model / "config.pbtxt"
        config = parse(path)
        if text is None:
            del config.parameters[name]
        else:
            config.parameters[name].string_value = text
        path.write_text(str(config))
        (line,) = [line for line in verify_trtllm_repository(repository) if "config.pbtxt: parameter" in line]
        assert f"parameter {name}: got " in line
        assert verdict in line

    def test_what_the_engines_kernels_cannot(self, engine_dir: Path, tmp_path: Path) -> None:
        built = engine_dir / "medusa/config.json"
        built.write_text(built.read_text().replace('"use_paged_context_fmha": true', '"use_paged_context_fmha": false'))
        write_trtllm_repository(engine_dir, tmp_path / "repository")
        path = tmp_path / "repository/tensorrt_llm/config.pbtxt"
        config = parse(path)
        config.parameters["enable_kv_cache_reuse"].string_value = "1"
        path.write_text(str(config))
        (line,) = [
            line for line in verify_trtllm_repository(tmp_path / "repository") if "config.pbtxt: parameter" in line
        ]
        assert "wrong: expected false: the engine was built without use_paged_context_fmha" in line

    def test_damaged(self, repository: Path) -> None:
        (repository / "tensorrt_llm" / "1" / "rank0.engine").write_text("another one")
        assert any("rank0.engine" in problem for problem in verify_trtllm_repository(repository))

    def test_choices_are_remembered(self, engine_dir: Path, tmp_path: Path) -> None:
        serving = TrtllmServing(max_queue=5, kv_fraction=0.8, decoupled=False, chunked_context=True)
        write_trtllm_repository(engine_dir, tmp_path / "other", serving)
        assert verify_trtllm_repository(tmp_path / "other") == []
        assert 'key: "enable_chunked_context"' in (tmp_path / "other" / "tensorrt_llm" / "config.pbtxt").read_text()

    def test_is_there_already(self, engine_dir: Path, repository: Path) -> None:
        with pytest.raises(OutputError):
            write_trtllm_repository(engine_dir, repository, TrtllmServing(max_queue=1))


@pytest.mark.parametrize("model", model_configs(FACTS, SERVING))
def test_the_configuration_is_what_was_kept(model: str) -> None:
    assert_golden(f"triton_trtllm/{model}.pbtxt", render(model_configs(FACTS, SERVING)[model]))


class TestRefusals:
    def test_not_built(self, tmp_path: Path, tiny_tokenizer: Callable[..., Path]) -> None:
        path = tiny_tokenizer(write_engine(tmp_path / "engine"))
        (path / "medusa" / "config.json").unlink()
        assert is_trtllm_engine(path)
        with pytest.raises(ConfigError, match=r"run build.sh"):
            write_trtllm_repository(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("version", "pretrained", "message"),
        [
            ("0.18.1", {}, "one that a container of Triton has"),
            ("1.3.0", {}, "no engine backend"),
            ("1.2.1", {"max_draft_len": 63}, "3 choices; expected 63"),
            ("1.2.1", {"num_medusa_heads": 1}, "a path of depth 2; expected at most 1"),
        ],
    )
    def test_engines(self, version: str, pretrained: dict[str, Any], message: str, tmp_path: Path) -> None:
        path = write_engine(tmp_path / "engine", version=version, **pretrained)
        with pytest.raises((ConfigError, Exception), match=message):
            engine_facts(path, path / "medusa")

    def test_without_an_end_of_sequence_token_no_server_is_written(self, engine_dir: Path, tmp_path: Path) -> None:
        """Every request would fail: preprocessing has to tell the engine where an answer ends."""
        replace(EngineInfo.load(engine_dir), eos_token_ids=()).save(engine_dir)
        with pytest.raises(ConfigError, match=r"no end-of-sequence token; .* export again with eos_token_id"):
            write_trtllm_repository(engine_dir, tmp_path / "repository")
        assert not (tmp_path / "repository").exists()

    def test_a_rank_is_missing(self, tmp_path: Path) -> None:
        path = write_engine(tmp_path / "engine", tp=2)
        (path / "medusa" / "rank1.engine").unlink()
        with pytest.raises(ConfigError, match=r"no rank1.engine"):
            engine_facts(path, path / "medusa")

    @pytest.mark.parametrize(
        ("serving", "message"),
        [(TrtllmServing(kv_fraction=1.5), "kv_cache_free_gpu_mem_fraction: got '1.5'; expected a fraction")],
    )
    def test_choices(self, serving: TrtllmServing, message: str, engine_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=message):
            write_trtllm_repository(engine_dir, tmp_path / "out", serving)

    def test_chunked_context_needs_the_kernel(self, engine_dir: Path, tmp_path: Path) -> None:
        config = json.loads((engine_dir / "medusa" / "config.json").read_text())
        config["build_config"]["plugin_config"] = {}
        (engine_dir / "medusa" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="--chunked-context"):
            write_trtllm_repository(engine_dir, tmp_path / "out", TrtllmServing(chunked_context=True))


class TestLaunch:
    def run(self, tmp_path: Path, tp: int) -> list[str]:
        """The words of the command that launch.sh comes to, by stand-ins for tritonserver and mpirun."""
        script = tmp_path / "launch.sh"
        script.write_text(deployment_files(replace(FACTS, tp=tp), SERVING)["launch.sh"])
        for name in ("tritonserver", "mpirun"):
            tool = tmp_path / name
            tool.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n')
            tool.chmod(0o755)
        result = subprocess.run(
            ["bash", str(script), "--log-verbose", "1"], capture_output=True, text=True, check=True,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        )  # fmt: skip
        return result.stdout.splitlines()

    def test_one_gpu(self, tmp_path: Path) -> None:
        words = self.run(tmp_path, 1)
        assert words[:3] == ["tritonserver", "--model-repository", "/models"]
        assert words[-2:] == ["--log-verbose", "1"]
        assert "--disable-auto-complete-config" in words

    def test_ranks(self, tmp_path: Path) -> None:
        words = self.run(tmp_path, 4)
        assert words[:2] == ["mpirun", "--allow-run-as-root"]
        ranks = " ".join(words[2:]).split(" : ")
        assert len(ranks) == 4
        assert all(rank.startswith("-n 1 tritonserver --model-repository /models") for rank in ranks)
        assert "--http-port 8000" in ranks[0]
        assert "--log-verbose 1" in ranks[0]
        for number, rank in enumerate(ranks[1:], start=1):
            assert "--model-control-mode explicit --load-model tensorrt_llm --allow-http false" in rank
            assert f"shm-region-prefix-name=medusa{number}_" in rank
            assert "--http-port" not in rank

    def test_another_mount_is_refused(self, tmp_path: Path) -> None:
        script = tmp_path / "launch.sh"
        script.write_text(deployment_files(FACTS, SERVING)["launch.sh"])
        result = subprocess.run(
            ["bash", str(script)], capture_output=True, text=True, check=False, env={"MODELS": "/elsewhere"}
        )
        assert result.returncode == 2
        assert "expected /models" in result.stderr

    def test_the_readme_opens_ports_of_the_loopback_only(self) -> None:
        text = deployment_files(FACTS, SERVING)["README.md"]
        assert "network" not in text
        assert re.findall(r"-p (\S+)", text) == [f"127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002)]

    @pytest.mark.parametrize("tp", [1, 2])
    def test_yaml(self, tp: int) -> None:
        yaml = pytest.importorskip("yaml")
        files = deployment_files(replace(FACTS, tp=tp), SERVING)
        service = yaml.safe_load(files["compose.yaml"])["services"]["medusa"]
        assert service["image"] == "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["volumes"] == [".:/models:ro"]
        assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == tp
        deployment, network = yaml.safe_load_all(files["kubernetes.yaml"])
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": tp}
        assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
        assert network["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
