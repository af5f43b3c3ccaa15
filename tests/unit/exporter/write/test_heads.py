"""write_heads: every layout into every other one and back, bit for bit; what a layout cannot say is refused or spelled out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medusa_export.core.errors import CheckpointError, ConfigError, OutputError
from medusa_export.exporter.write.heads import LAYOUTS, write_heads
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference

Tensors = dict[str, torch.Tensor]
Opened = Callable[..., MedusaCheckpoint]

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def stored(directory: Path) -> Tensors:
    """Every tensor of a directory, whatever its files are called."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def read_config(directory: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return body


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (found[name], tensor))), name


def contents(checkpoint: MedusaCheckpoint) -> Tensors:
    """What the heads compute with, by canonical name."""
    return {name: checkpoint.read(name).clone() for name in checkpoint.heads.canonical_names()}


@pytest.fixture
def base(tmp_path: Path, tiny_checkpoint: Any, tiny_tokenizer: Any) -> Callable[..., Path]:
    """``base(dtype, **config) -> directory``, each written once a test."""

    def make(dtype: torch.dtype = torch.float16, **config: Any) -> Path:
        directory = tmp_path / f"base-{DTYPES[dtype]}"
        return directory if directory.is_dir() else tiny_tokenizer(tiny_checkpoint(directory, dtype=dtype, **config))

    return make


@pytest.fixture
def opened(tmp_path: Path, base: Any, tiny_heads: Any, head_tensors: Any) -> Opened:
    """``opened(heads, layers, dtype, lm_head="own", bias=True, **config)``: FasterDecoding's heads for a base model.

    ``lm_head``: "own", "same" (one for all heads, not the base's), or "base" (bit for bit the base model's).
    """

    def make(
        heads: int = 3,
        layers: int = 1,
        dtype: torch.dtype = torch.float16,
        lm_head: str = "own",
        *,
        bias: bool = True,
        **config: Any,
    ) -> MedusaCheckpoint:
        model = base(dtype, **config)
        directory = tiny_heads(tmp_path / f"heads{len(os.listdir(tmp_path))}", "v1", heads, layers, dtype=dtype)
        file = directory / "medusa_lm_head.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        weights = load_file(model / "model.safetensors")
        one = {
            "same": tensors[f"0.{layers}.weight"],
            "base": weights.get("lm_head.weight", weights["model.embed_tokens.weight"]),
        }
        for head in range(heads if lm_head in one else 0):
            tensors[f"{head}.{layers}.weight"] = one[lm_head].clone()
        save_file({name: tensor for name, tensor in tensors.items() if bias or not name.endswith("bias")}, file)
        return MedusaCheckpoint.open(model, directory)

    return make


def write(checkpoint: MedusaCheckpoint, out: Path, layout: str, **options: Any) -> MedusaCheckpoint:
    """What was written, opened with the same base model; "modelopt" with its own."""
    write_heads(out, checkpoint, layout, **options)
    ckpt = checkpoint.base.files[0].parent
    again = MedusaCheckpoint.open(out) if layout == "modelopt" else MedusaCheckpoint.open(ckpt, out)
    assert again.heads.layout == layout
    assert again.warnings == ()
    return again


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "second"), product(LAYOUTS, LAYOUTS))
def test_there_and_back(first: str, second: str, dtype: torch.dtype, opened: Opened, tmp_path: Path) -> None:
    """Heads that every layout can hold, and, where neither is medusa-v2, heads with lm_heads of their own."""
    kinds = ["base"] if "medusa-v2" in (first, second) else ["base", "own"]
    for number, (heads, layers, kind) in enumerate(product((1, 2, 3, 4), (1, 2), kinds)):
        root = tmp_path / f"case{number}"
        source = opened(heads, layers, dtype, kind)
        expected = contents(source)
        start = write(source, root / "start", first)
        there = write(start, root / "there", second)
        write(there, root / "back", first)
        assert_same_bits(contents(there), expected)
        assert_same_bits(stored(root / "back"), stored(root / "start"))
        assert read_config(root / "back").keys() == read_config(root / "start").keys()


class TestNames:
    """What each layout's readers look for."""

    def names(self, directory: Path) -> set[str]:
        return set(stored(directory))

    def test_v1(self, opened: Opened, tmp_path: Path, base: Any) -> None:
        checkpoint = opened(2, 2)
        write(checkpoint, tmp_path / "out", "medusa-v1")
        assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "medusa_lm_head.safetensors"]
        blocks = {f"{h}.{x}.linear.{part}" for h in range(2) for x in range(2) for part in ("weight", "bias")}
        assert self.names(tmp_path / "out") == blocks | {"0.2.weight", "1.2.weight"}
        assert read_config(tmp_path / "out") == {
            "base_model_name_or_path": str(base()), "medusa_num_heads": 2, "medusa_num_layers": 2,
            "hidden_size": 64, "vocab_size": 97,
        }  # fmt: skip

    def test_v2(self, opened: Opened, tmp_path: Path) -> None:
        write(opened(2, 1, lm_head="base"), tmp_path / "out", "medusa-v2")
        blocks = {f"{h}.0.linear.{part}" for h in range(2) for part in ("weight", "bias")}
        assert self.names(tmp_path / "out") == blocks
        assert read_config(tmp_path / "out")["version"] == "2"

    def test_vllm(self, opened: Opened, tmp_path: Path) -> None:
        """Its loader skips names that it does not know, so that a wrong one leaves random weights."""
        write(opened(2, 2), tmp_path / "out", "vllm")
        assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
        blocks = {f"blocks.{h}.layers.{x}.{part}" for h in range(2) for x in range(2) for part in ("weight", "bias")}
        assert self.names(tmp_path / "out") == blocks | {"lm_heads.0.weight", "lm_heads.1.weight"}
        assert read_config(tmp_path / "out") == {
            "model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": 64, "vocab_size": 97,
            "truncated_vocab_size": 97, "num_heads": 2, "num_hidden_layers": 2, "medusa_fc_bias": True,
            "original_lm_head": False, "torch_dtype": "float16",
        }  # fmt: skip

    @pytest.mark.parametrize("kind", ["base", "same"])
    @pytest.mark.parametrize("through", ["medusa-v1", "vllm"])
    def test_vllm_with_one_lm_head(self, through: str, kind: str, opened: Opened, tmp_path: Path) -> None:
        source = opened(3, 1, lm_head=kind)
        write(write(source, tmp_path / "first", through), tmp_path / "out", "vllm")
        lm_heads = {name for name in self.names(tmp_path / "out") if "lm_head" in name}
        assert lm_heads == {"lm_heads.0.weight"}
        assert read_config(tmp_path / "out")["original_lm_head"] is True

    @pytest.mark.parametrize(("kind", "flag"), [("own", False), ("base", True)])
    def test_vllm_with_one_head(self, kind: str, flag: bool, opened: Opened, tmp_path: Path) -> None:
        source = opened(1, 1, lm_head=kind)
        if kind == "base":
            source = write(source, tmp_path / "v2", "medusa-v2")
        write(source, tmp_path / "out", "vllm")
        assert read_config(tmp_path / "out")["original_lm_head"] is flag

    def test_modelopt(self, opened: Opened, tmp_path: Path, base: Any) -> None:
        write(opened(2, 1), tmp_path / "out", "modelopt")
        heads = {
            f"medusa_heads.{h}.{rest}" for h in range(2) for rest in ("0.linear.weight", "0.linear.bias", "1.weight")
        }
        assert self.names(tmp_path / "out") == heads | self.names(base())
        assert set(os.listdir(tmp_path / "out")) == set(os.listdir(base()))
        config = read_config(tmp_path / "out")
        assert config.pop("medusa") == {"num_medusa_heads": 2, "num_medusa_layers": 1}
        assert config == read_config(base())
        for name in ("tokenizer.json", "chat_template.jinja"):
            assert (tmp_path / "out" / name).read_bytes() == (base() / name).read_bytes()


class VllmHeads(torch.nn.Module):
    """vLLM's draft model as its config.json describes it, and what its loader does with names."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, heads, self.shares = config["hidden_size"], config["num_heads"], config["original_lm_head"]
        linears = [
            torch.nn.ModuleList(
                torch.nn.Linear(hidden, hidden, bias=config["medusa_fc_bias"])
                for _ in range(config["num_hidden_layers"])
            )
            for _ in range(heads)
        ]
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"layers": layers}) for layers in linears)
        lm_heads = [torch.nn.Linear(hidden, config["truncated_vocab_size"], bias=False) for _ in range(heads)]
        if self.shares:
            self.lm_head = lm_heads[0]
        else:
            self.lm_heads = torch.nn.ModuleList(lm_heads)

    def load(self, tensors: Tensors) -> None:
        """Every tensor has a place, and every place gets one; vLLM itself would be silent about the rest."""
        renamed = {"lm_heads.0.weight": "lm_head.weight"} if self.shares else {}
        self.load_state_dict({renamed.get(name, name): tensor for name, tensor in tensors.items()}, strict=True)

    def forward(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        logits = []
        for head, block in enumerate(self.blocks):
            state = hidden
            for linear in block["layers"]:
                state = state + torch.nn.functional.silu(linear(state))
            logits.append((self.lm_head if self.shares else self.lm_heads[head])(state))
        return logits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["own", "same", "base"])
@pytest.mark.parametrize("layers", [1, 2])
def test_vllm_computes_the_same(layers: int, kind: str, bias: bool, opened: Opened, tmp_path: Path) -> None:
    source = opened(3, layers, torch.float32, kind, bias=bias)
    write(source, tmp_path / "out", "vllm")
    model = VllmHeads(read_config(tmp_path / "out"))
    model.load(stored(tmp_path / "out"))
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    for head, logits in enumerate(model(hidden)):
        state = hidden
        for layer in range(layers):
            parts = (source.read(f"medusa_heads.{head}.{layer}.linear.{part}") for part in ("weight", "bias"))
            state = state + torch.nn.functional.silu(torch.nn.functional.linear(state, *parts))
        assert torch.allclose(logits, state @ source.read(f"medusa_heads.{head}.{layers}.weight").T, atol=1e-5)


class TestBiases:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_absent_ones_are_zeros_where_they_are_needed(self, layout: str, opened: Opened, tmp_path: Path) -> None:
        written = write(opened(2, 2, lm_head="base", bias=False), tmp_path / "out", layout)
        biases = {name: tensor for name, tensor in stored(tmp_path / "out").items() if name.endswith(".bias")}
        assert len(biases) == (0 if layout == "vllm" else 4)
        assert all(tensor.dtype == torch.float16 and not tensor.any() for tensor in biases.values())
        assert not written.read("medusa_heads.1.1.linear.bias").any()
        assert read_config(tmp_path / "out").get("medusa_fc_bias") == (False if layout == "vllm" else None)

    def test_vllm_without_them_and_back(self, opened: Opened, tmp_path: Path) -> None:
        source = opened(2, 1, bias=False)
        there = write(source, tmp_path / "there", "vllm")
        assert_same_bits(contents(write(there, tmp_path / "back", "medusa-v1")), contents(source))


class TestV2:
    def edited(self, opened: Opened, edit: Callable[[torch.Tensor], torch.Tensor], **config: Any) -> MedusaCheckpoint:
        """The second of three heads has another lm_head than the base model."""
        source = opened(3, 1, lm_head="base", **config)
        file = source.heads.source.files[0]
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        tensors["1.1.weight"] = edit(tensors["1.1.weight"])
        save_file(tensors, file)
        return MedusaCheckpoint.open(source.base.path, file.parent)

    @pytest.mark.parametrize("row", [0, 41, 96])
    @pytest.mark.parametrize("chunk", [64 * 7, 1 << 21])
    def test_one_value_is_enough(
        self, row: int, chunk: int, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("medusa_export.exporter.write.heads.CHUNK_VALUES", chunk)

        def edit(weight: torch.Tensor) -> torch.Tensor:
            weight[row, 63] += 1
            return weight

        message = rf"1\.1\.weight: got an lm_head of head 1's own, which differs from row {row} on"
        with pytest.raises(CheckpointError, match=message) as caught:
            write_heads(tmp_path / "out", self.edited(opened, edit), "medusa-v2")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_bits_are_compared(self, opened: Opened, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="differs from row 0 on"):
            write_heads(tmp_path / "out", self.edited(opened, torch.Tensor.float), "medusa-v2")  # another dtype

        def negative_zero(weight: torch.Tensor) -> torch.Tensor:
            weight[5, 5] = -0.0
            return weight

        with pytest.raises(CheckpointError, match="differs from row 5 on"):
            write_heads(tmp_path / "out", self.edited(opened, negative_zero), "medusa-v2")

    @pytest.mark.parametrize("tied", [False, True])
    def test_the_bases_lm_head_needs_no_copy(self, tied: bool, opened: Opened, tmp_path: Path) -> None:
        source = opened(3, 2, lm_head="base", tie_word_embeddings=tied)
        written = write(source, tmp_path / "out", "medusa-v2")
        assert written.heads_share_lm_head
        assert_same_bits(contents(written), contents(source))

    def test_vllms_shared_one(self, opened: Opened, tmp_path: Path) -> None:
        shared = write(opened(3, 1, lm_head="same"), tmp_path / "vllm", "vllm")
        with pytest.raises(CheckpointError, match=r"lm_heads\.0\.weight: got an lm_head of head 0's own"):
            write_heads(tmp_path / "out", shared, "medusa-v2")


class TestCombined:
    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_transformers_reads_the_base_model(
        self, family: str, tied: bool, tiny_checkpoint: Any, tiny_heads: Any, tmp_path: Path
    ) -> None:
        from transformers import AutoModelForCausalLM

        ckpt = tiny_checkpoint(tmp_path / "base", family, tie_word_embeddings=tied)
        checkpoint = MedusaCheckpoint.open(ckpt, tiny_heads(tmp_path / "heads", "v1", 2, 1))
        out = tmp_path / "out"
        write(checkpoint, out, "modelopt", max_shard_bytes=50_000)
        assert ("lm_head.weight" in stored(out)) != tied
        _, report = AutoModelForCausalLM.from_pretrained(out, local_files_only=True, output_loading_info=True)
        assert set(report["unexpected_keys"]) == {name for name in stored(out) if name.startswith("medusa_heads.")}
        ids = torch.tensor([[1, 5, 9, 60]])
        logits = [load_reference(path, torch.float32)(ids).logits for path in (ckpt, out)]
        assert torch.equal(*logits)

    def test_shards(self, opened: Opened, tmp_path: Path) -> None:
        source, limit = opened(3, 1), 30_000
        written = write(source, tmp_path / "out", "modelopt", max_shard_bytes=limit)
        shards = sorted((tmp_path / "out").glob("*.safetensors"))
        assert len(shards) > 3
        assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
        sizes = {shard.name: [tensor.nbytes for tensor in load_file(shard).values()] for shard in shards}
        assert all(sum(parts) <= limit or len(parts) == 1 for parts in sizes.values())
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
        assert set(index["weight_map"]) == set(stored(tmp_path / "out"))
        assert_same_bits(contents(written), contents(source))
        whole = write(written, tmp_path / "whole", "modelopt")
        assert [file.name for file in whole.base.files] == ["model.safetensors"]
        assert_same_bits(stored(tmp_path / "whole"), stored(tmp_path / "out"))

    def test_every_file_says_its_format(self, opened: Opened, tmp_path: Path) -> None:
        for layout in LAYOUTS:
            write(opened(1, 1, lm_head="base"), tmp_path / layout, layout)
            (file,) = (tmp_path / layout).glob("*.safetensors")
            with safe_open(file, framework="pt") as body:
                assert body.metadata() == {"format": "pt"}

    def test_heads_that_were_there_give_way(self, opened: Opened, tmp_path: Path, tiny_heads: Any) -> None:
        combined = write(opened(3, 1), tmp_path / "first", "modelopt").base.path
        other = MedusaCheckpoint.open(combined, tiny_heads(tmp_path / "other", "v1", 2, 2, dtype=torch.float16, seed=9))
        written = write(other, tmp_path / "second", "modelopt")
        assert (written.num_medusa_heads, written.num_medusa_layers) == (2, 2)
        assert_same_bits(contents(written), contents(other))
        assert read_config(tmp_path / "second")["medusa"] == {"num_medusa_heads": 2, "num_medusa_layers": 2}

    def test_a_pickled_base_model(self, opened: Opened, tmp_path: Path, base: Any) -> None:
        source = opened(1, 1)
        directory = base()
        tensors = load_file(directory / "model.safetensors")
        turned = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
        torch.save(turned, directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
        pickled = MedusaCheckpoint.open(directory, source.heads.source.files[0])
        write(pickled, tmp_path / "out", "modelopt")
        assert_same_bits(
            {name: tensor for name, tensor in stored(tmp_path / "out").items() if not name.startswith("medusa")},
            tensors,
        )


class TestRefusals:
    def test_unknown_layout(self, opened: Opened, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match="layout 'eagle': got an unknown name; expected one of medusa-v1, medusa-v2"
        ):
            write_heads(tmp_path / "out", opened(1, 1), "eagle")

    def test_files_in_the_way(self, opened: Opened, tmp_path: Path) -> None:
        source = opened(1, 1)
        directory = source.heads.source.files[0].parent
        before = {path: path.read_bytes() for path in directory.iterdir()}
        with pytest.raises(OutputError, match="got files in it; expected a new or an empty directory"):
            write_heads(directory, source, "medusa-v1")
        assert {path: path.read_bytes() for path in directory.iterdir()} == before

    def test_a_file_in_the_way(self, opened: Opened, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="a writable directory"):
            write_heads(tmp_path / "file/out", opened(1, 1), "medusa-v1")

    def test_a_dtype_without_a_name(self, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("medusa_export.exporter.write.heads.DTYPE_NAMES", {torch.float32: "F32"})
        with pytest.raises(CheckpointError, match=r"0\.0\.linear\.weight: got dtype float16; expected one of float32"):
            write_heads(tmp_path / "out", opened(1, 1), "medusa-v1")
        assert not (tmp_path / "out").exists()


def test_the_same_bytes_again(opened: Opened, tmp_path: Path) -> None:
    source = opened(2, 1, lm_head="base")
    for layout, name in product(LAYOUTS, ("a", "b")):
        write_heads(tmp_path / name / layout, source, layout)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
