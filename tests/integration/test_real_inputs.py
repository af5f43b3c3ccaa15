"""Checkpoints as people have them, from end to end: Vicuna with published heads, names on the hub, vocabularies that disagree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medusa_export.core.artifacts.manifest import read_manifest
from medusa_export.core.errors import ConfigError
from medusa_export.core.text.encoding import encode_chat, encode_text
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.tensorrt.build import TensorRtBuilder
from medusa_export.engines.tuning.auto import choose_tree
from medusa_export.engines.verify.selfcheck import check_engine
from medusa_export.exporter.cli.run import run_main
from medusa_export.exporter.job.arguments import ExportArguments
from medusa_export.exporter.pipeline.export import export
from medusa_export.exporter.sizing.estimate import plan_export
from medusa_export.exporter.verify.parts.export import verify
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.contract.engine_tools import EngineTools
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.tree import load_tree
from tests.standins.hub import Hub, Repo, serving

BIN = Path(sys.executable).parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant.{% for m in messages %}"
    "{% if m['role'] == 'user' %} USER: {{ m['content'] }} ASSISTANT:{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)


def run(command: str, *flags: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """An installed command, in a process of its own."""
    return subprocess.run(
        [BIN / command, *map(str, flags)], capture_output=True, text=True, check=False, cwd=cwd,
        env={**os.environ, **environment},
    )  # fmt: skip


def require_transformers_tokens(out: Path, model: Path, messages: list[dict[str, str]], count: int = 24) -> list[int]:
    """The engine's greedy tokens, without and with its tree, after checking that they are those of generate()."""
    engine, tokenizer = OnnxRuntimeEngine(out / "engine"), read_tokenizer(out / "engine")
    ids, ends = encode_chat(tokenizer, messages), engine.info.eos_token_ids
    reference: Any = load_reference(model, torch.float32)
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": list(ends), "pad_token_id": 0}
    expected = reference.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)[
        0, len(ids) :
    ].tolist()
    for tree in (AUTOREGRESSIVE, load_tree(str(out / "engine/tree.json"))):
        assert generate(engine, ids, tree, max_new_tokens=count, eos_token_ids=ends).tokens == expected
    return ids


@pytest.fixture
def vicuna(tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Callable[..., Path]) -> Path:
    """``model`` and ``heads`` as lmsys/vicuna-7b-v1.3 and FasterDecoding's heads are stored, and ``vicuna.jinja``; their parent."""
    import sentencepiece

    words = (f"{first}{second} text answers user assistant" for first in "abcdefghij" for second in "klmnopqrst")
    made = tiny_checkpoint(
        tmp_path / "saved", dtype=torch.float16, vocab_size=330, num_key_value_heads=4, max_position_embeddings=256
    )
    model = tmp_path / "model"
    model.mkdir()
    with (model / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=words, model_writer=file, vocab_size=330, model_type="bpe", byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2, num_threads=1,
        )  # fmt: skip
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {name: {**token, "content": text} for name, text in named.items()} | {
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "model_max_length": 2048,
        "pad_token": None, "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer",
    }  # fmt: skip
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "special_tokens_map.json").write_text(json.dumps(named))
    config = json.loads((made / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype", "float16")
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(made / "model.safetensors")
    shards = {name: f"pytorch_model-0000{1 + (number % 2)}-of-00002.bin" for number, name in enumerate(tensors)}
    for shard in set(shards.values()):
        torch.save({name: tensors[name] for name in tensors if shards[name] == shard}, model / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    heads = tiny_heads(tmp_path / "heads", num_heads=5, suffix="pt", vocab=330, dtype=torch.float16)
    published = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    (heads / "config.json").write_text(json.dumps(published))
    (tmp_path / "vicuna.jinja").write_text(VICUNA)
    return tmp_path


def test_vicuna_with_published_heads(vicuna: Path) -> None:
    flags = ["--ckpt", "model", "--heads", "heads", "--output", "out"]
    refused = run("medusa-export", *flags, cwd=vicuna)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no chat template; expected one, in Jinja; pass --chat-template FILE to medusa-export" in refused.stderr
    result = run("medusa-export", *flags, "--chat-template", "vicuna.jinja", cwd=vicuna)
    assert result.returncode == 0, result.stderr
    assert "end-of-sequence token: </s> (id 2)" in result.stderr
    info = EngineInfo.load(vicuna / "out/engine")
    assert (info.max_depth, info.eos_token_ids) == (5, (2,))
    ids = require_transformers_tokens(vicuna / "out", vicuna / "model", [{"role": "user", "content": "text answers"}])
    tokenizer = read_tokenizer(vicuna / "out/engine")
    assert tokenizer.chat_template == VICUNA
    assert ids[0] != 1  # the template writes no <s>; a text that the model goes on from has one
    assert encode_text(tokenizer, "text") == [1, *encode_text(tokenizer, "text")[1:]]
    assert "inputs" in read_manifest(vicuna / "out")


class TestHub:
    @pytest.fixture
    def hub(
        self, tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Any, tiny_tokenizer: Any
    ) -> Iterator[Hub]:
        model = tiny_tokenizer(tiny_checkpoint(tmp_path / "hub/model", max_shard_size="50KB"))
        (model / "README.md").write_text("not needed")
        with serving() as hub:
            hub.repos = {
                "tiny/model": Repo(model, COMMIT, ("main", "v1.0")),
                "tiny/heads": Repo(tiny_heads(tmp_path / "hub/heads", suffix="pt"), f"f{COMMIT[1:]}"),
            }
            yield hub

    def test_an_export_by_names(self, hub: Hub, tmp_path: Path) -> None:
        environment = hub.environment(tmp_path / "home")
        flags = ["--ckpt", "tiny/model", "--revision", "v1.0", "--heads", "tiny/heads@main"]
        result = run("medusa-export", *flags, cwd=tmp_path, **environment)
        assert (result.returncode, result.stdout) == (0, f"wrote {tmp_path / 'model-none'}\n"), result.stderr
        out = tmp_path / "model-none"
        manifest = read_manifest(out)
        assert manifest["sources"] == {
            "ckpt": {"name": "tiny/model", "commit": COMMIT}, "heads": {"name": "tiny/heads@main", "commit": f"f{COMMIT[1:]}"},
        }  # fmt: skip
        assert manifest["arguments"]["ckpt"] == "tiny/model"
        assert {"ckpt/config.json", "ckpt/model.safetensors.index.json", "heads/medusa_lm_head.pt"} <= manifest[
            "inputs"
        ].keys()
        assert EngineInfo.load(out / "engine").source == {"checkpoint": "tiny/model", "commit": COMMIT, "quant": "none"}
        assert not any(name.endswith("README.md") for name in hub.downloaded)
        require_transformers_tokens(out, tmp_path / "hub/model", [{"role": "user", "content": "w3 w4"}])
        offline = {**environment, "HF_HUB_OFFLINE": "1"}
        flags_of_verify = [out, "--ckpt", "tiny/model@v1.0", "--heads", "tiny/heads@main", "--quick"]
        checked = run("medusa-export", "verify", *flags_of_verify, cwd=tmp_path, **offline)
        assert checked.returncode == 0, checked.stderr
        assert "compared with" in checked.stdout
        again = run("medusa-export", *flags, cwd=tmp_path, **offline)
        assert (again.returncode, again.stdout) == (0, f"up to date: {out}\n"), again.stderr

    def test_a_plan_downloads_no_weights(self, hub: Hub, tmp_path: Path, tiny_heads: Any) -> None:
        """Nor does --dry-run, which is the same; the plan is that of the model on the disk."""
        hub.repos["tiny/plain"] = Repo(tiny_heads(tmp_path / "hub/plain"), f"e{COMMIT[1:]}")
        flags = ["--ckpt", "tiny/model", "--heads", "tiny/plain", "--output", "out", "--json", "plan.json"]
        result = run("medusa-export", "plan", *flags, cwd=tmp_path, **hub.environment(tmp_path / "home"))
        assert result.returncode == 0, result.stderr
        arguments = ExportArguments(tmp_path / "hub/model", tmp_path / "out", heads=tmp_path / "hub/plain")
        local = json.loads(json.dumps(asdict(plan_export(arguments))))
        found = json.loads((tmp_path / "plan.json").read_text())
        reserves = [
            plan.pop("disk_reserve") for plan in (found, local)
        ]  # of the inputs' sizes, and headers are written anew
        assert reserves[0] == pytest.approx(reserves[1], rel=1e-3)
        for plan in (found, local):
            del plan["disk_free"], plan["ram_available"]
        assert found == local
        assert not [name for name in hub.downloaded if name.endswith(".safetensors")]
        index = json.loads((tmp_path / "hub/model/model.safetensors.index.json").read_text())
        shards = {f"tiny/model/{name}" for name in index["weight_map"].values()}
        assert {*hub.parts} == {*shards, "tiny/plain/medusa_lm_head.safetensors"}

    def test_offline_and_absent_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_text('{"prompt": "w1"}\n')
        offline = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        for command, flags in (
            ("medusa-export", ["--ckpt", "tiny/absent"]),
            ("medusa-train", ["--ckpt", "tiny/absent", "--data", "p.jsonl", "--output", "heads"]),
            ("medusa-data", ["--model", "tiny/absent", "--prompts", "p.jsonl", "--output", "d.jsonl"]),
        ):
            result = run(command, *flags, cwd=tmp_path, **offline)
            assert (result.returncode, result.stdout) == (2, ""), result.stderr
            (line,) = result.stderr.splitlines()
            assert line.startswith("error: tiny/absent: got no such directory")
            assert line.endswith("run: hf download tiny/absent")

    def test_rows_name_the_model_and_its_commit(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_text('{"prompt": "w1"}\n')
        flags = [
            "--model",
            "tiny/model",
            "--prompts",
            "p.jsonl",
            "--output",
            "d.jsonl",
            "--max-tokens",
            3,
            "--max-length",
            64,
        ]
        result = run("medusa-data", *flags, cwd=tmp_path, **hub.environment(tmp_path / "home"))
        assert result.returncode == 0, result.stderr
        (row,) = map(json.loads, (tmp_path / "d.jsonl").read_text().splitlines())
        assert row["model"] == f"tiny/model@{COMMIT[:12]}"


class TestSizes:
    def test_rows_behind_the_tokenizers_last_token_are_never_said(
        self, tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Any, tiny_tokenizer: Any
    ) -> None:
        """The model's largest logits are those of rows that mean nothing, as they would be with unlucky padding."""
        from safetensors.torch import save_file

        vocab, known = 128, 97
        model = tiny_tokenizer(tiny_checkpoint(tmp_path / "model", vocab_size=vocab))
        heads = tiny_heads(tmp_path / "heads", vocab=vocab)
        for path, names in (
            (model / "model.safetensors", ["lm_head.weight"]),
            (heads / "medusa_lm_head.safetensors", None),
        ):
            tensors = load_file(path)
            for name in names or [name for name in tensors if ".linear." not in name]:
                tensors[name][known:] *= 50
            save_file(tensors, path, {"format": "pt"})
        result = run("medusa-export", "--ckpt", "model", "--heads", "heads", "--output", "out", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        engine = OnnxRuntimeEngine(tmp_path / "out/engine")
        assert (engine.info.vocab_size, engine.info.num_tokens) == (vocab, known)
        reference: Any = load_reference(model, torch.float32)
        with torch.no_grad():
            logits = reference(torch.tensor([[5, 6, 7]])).logits[0, -1]
        assert int(logits.argmax()) >= known  # what a wrong program says
        assert engine.prefill([5, 6, 7]) == int(logits[:known].argmax())
        assert engine.draft(3).max() < known
        tree = load_tree(str(tmp_path / "out/engine/tree.json"))
        for sampler in (None, Sampler(2.0, 3)):
            found = generate(engine, [5, 6, 7], tree, max_new_tokens=30, eos_token_ids=(), sampler=sampler)
            assert max(found.tokens) < known
        decoder = TreeBatchDecoder(tmp_path / "out/engine", slots=2)
        assert int(decoder.admit([5, 6, 7]).argmax()) == int(logits[:known].argmax())
        assert decoder.verify(AUTOREGRESSIVE, torch.tensor([[8]]).numpy()).max() < known

    def test_a_token_that_the_model_does_not_have_is_refused(
        self, tmp_path: Path, tiny_engine: Callable[..., Any]
    ) -> None:
        engine = OnnxRuntimeEngine(tiny_engine(vocab_size=90).path)
        with pytest.raises(ConfigError, match="prompt: got the token 90; expected ids below the model's vocab_size 90"):
            generate(engine, [3, 90], AUTOREGRESSIVE, max_new_tokens=2, eos_token_ids=())

    def test_an_export_with_more_tokens_than_rows(
        self,
        tmp_path: Path,
        tiny_checkpoint: Any,
        tiny_heads: Any,
        tiny_tokenizer: Any,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """It goes through, verify calls nothing of it an error, with its source and without, and medusa-run refuses the prompt."""
        model, heads = tiny_tokenizer(tiny_checkpoint(tmp_path / "model", vocab_size=90)), tmp_path / "heads"
        arguments = ExportArguments(model, tmp_path / "out", heads=tiny_heads(heads, vocab=90))
        assert export(arguments, EngineTools(check_engine, choose_tree, TensorRtBuilder()))
        note = "the tokenizer has the id 96; the model has 90 tokens: prompts with an id from 90 on are refused"
        for source in ({"ckpt": model, "heads": heads}, {}):
            found = verify(tmp_path / "out", run_engine=lambda engine, ckpt: [], **source)
            assert (found.findings, found.notes) == ([], [note])
            if source:
                model.rename(tmp_path / "hidden")
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text('{"prompt": "w3 w85"}\n')
        flags = ["--engine", str(tmp_path / "out/engine"), "--prompts", str(prompts), "--max-new-tokens", "8"]
        monkeypatch.setattr(sys, "argv", ["medusa-run", *flags])
        with pytest.raises(SystemExit) as stopped:
            run_main()
        err = capfd.readouterr().err
        assert stopped.value.code == 2
        assert "prompt: got the token 90; expected ids below the model's vocab_size 90" in err.splitlines()[-1]
        assert "Traceback" not in err


def test_two_machines_write_the_same_bytes(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Any, tiny_tokenizer: Any
) -> None:
    """The same command in two places writes the same bytes, manifest included; no file says where it was made."""
    made = []
    for place in (tmp_path / "alice", tmp_path / "bob/deeper"):
        tiny_tokenizer(tiny_checkpoint(place / "model"))
        tiny_heads(place / "heads")
        flags = ["--ckpt", "model", "--heads", "heads", "--output", "out"]
        result = run("medusa-export", *flags, cwd=place, SOURCE_DATE_EPOCH="1700000000")
        assert result.returncode == 0, result.stderr
        files = {path.relative_to(place): path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}
        assert not [name for name, data in files.items() if str(tmp_path).encode() in data]
        made.append(files)
    assert made[0] == made[1]
    result = run("medusa-export", "--ckpt", tmp_path / "alice/model", "--heads", tmp_path / "alice/heads", "--output",
                 "third", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    named = [
        path
        for path in (tmp_path / "third").rglob("*")
        if path.is_file() and str(tmp_path).encode() in path.read_bytes()
    ]
    assert named == [tmp_path / "third/medusa.json"]
    manifest = read_manifest(tmp_path / "third")
    assert str(tmp_path) not in json.dumps(manifest | {"command": ""})  # the command alone says what was typed
