"""DecoderConfig: both spellings of every field, the shapes it derives, and numbers that contradict each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoConfig

from medusa_export.core.errors import ConfigError
from medusa_export.core.json_fields import read_json
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.families import FAMILIES

RAW: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _config(**changes: Any) -> DecoderConfig:
    raw = {**RAW, **changes}
    return DecoderConfig.from_dict({name: value for name, value in raw.items() if value != "absent"})


def test_defaults() -> None:
    config = _config(num_key_value_heads="absent")
    assert config.num_key_value_heads == 4
    assert config.head_dim == 16
    assert (config.q_size, config.kv_size) == (64, 64)
    assert config.hidden_act == "silu"
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert (config.sliding_window, config.dtype, config.eos_token_ids) == (None, "float32", ())
    assert config.raw["vocab_size"] == 97


def test_an_explicit_head_dim() -> None:
    config = _config(head_dim=24)
    assert (config.head_dim, config.q_size, config.kv_size) == (24, 96, 48)
    assert _config(head_dim=None).head_dim == 16
    assert _config(hidden_size=66, head_dim=16).q_size == 64


def test_both_spellings_of_rope() -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = _config(rope_theta=5e5, rope_scaling=llama3)
    new = _config(rope_parameters={**llama3, "rope_theta": 5e5})
    assert (old.rope_theta, old.rope_scaling) == (new.rope_theta, new.rope_scaling) == (5e5, llama3)
    assert _config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}).rope_scaling is None
    assert _config(rope_scaling={"type": "linear", "factor": 2.0}).rope_scaling == {
        "type": "linear",
        "rope_type": "linear",
        "factor": 2.0,
    }


def test_both_spellings_of_dtype() -> None:
    assert _config(torch_dtype="bfloat16").dtype == "bfloat16"
    assert _config(dtype="float16", torch_dtype="bfloat16").dtype == "float16"


WINDOWS: dict[str, tuple[dict[str, Any], tuple[int | None, ...]]] = {
    "mistral": ({"model_type": "mistral", "sliding_window": 64}, (64, 64)),
    "mistral by default": ({"model_type": "mistral", "max_position_embeddings": 8192}, (4096, 4096)),
    "mistral without": ({"model_type": "mistral", "sliding_window": None}, (None, None)),
    "llama has none": ({"model_type": "llama", "sliding_window": 64, "use_sliding_window": True}, (None, None)),
    "qwen2, off": ({"model_type": "qwen2", "sliding_window": 64}, (None, None)),
    "qwen2, from layer 28": ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, (None, None)),
    "qwen2, all": (
        {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, (64, 64),
    ),
    "qwen2, above the first": (
        {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, (None, 64),
    ),
    "qwen3, by type": (
        {
            "model_type": "qwen3", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (64, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_are_those_of_transformers(case: str) -> None:
    changes, expected = WINDOWS[case]
    raw = {**RAW, "num_hidden_layers": 2, "max_position_embeddings": 256, **changes}
    assert DecoderConfig.from_dict(raw).layer_windows == expected
    theirs = AutoConfig.for_model(**raw)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention" if raw["model_type"] == "mistral" else ""] * 2
    window = getattr(theirs, "sliding_window", None)
    assert tuple(window if kind == "sliding_attention" else None for kind in types) == expected


def test_windows_within_a_context() -> None:
    def windows(length: int, **changes: Any) -> int | list[int] | None:
        qwen = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 2}
        return _config(**qwen, **changes).windows_within(length)

    assert windows(64, max_window_layers=0) is None
    assert windows(65, max_window_layers=0) == 64
    assert windows(128, max_window_layers=1) == [128, 64]
    assert windows(128) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types = 'sliding_attention'; expected full_attention"),
        ({"layer_types": ["full_attention"]}, "expected 2 of sliding_attention and full_attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "expected 2 of"),
        ({"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers = -1"),
    ],
)
def test_windows_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(model_type="qwen2", num_hidden_layers=2, **changes)


def test_end_of_sequence_ids() -> None:
    assert _config(eos_token_id=2).eos_token_ids == (2,)
    assert _config(eos_token_id=[2, 7]).eos_token_ids == (2, 7)
    generation = {"eos_token_id": [3, 4]}
    assert DecoderConfig.from_dict({**RAW, "eos_token_id": 2}, generation=generation).eos_token_ids == (3, 4, 2)


def test_biases_by_family() -> None:
    plain, llama, qwen2 = _config(), _config(attention_bias=True), _config(model_type="qwen2")
    bias, o_bias = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.o_proj.bias"
    assert [name in config.tensor_shapes() for config in (plain, llama, qwen2) for name in (bias, o_bias)] == [
        False, False, True, True, True, False,
    ]  # fmt: skip
    assert "model.layers.1.mlp.down_proj.bias" in _config(mlp_bias=True).tensor_shapes()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_shapes_are_what_transformers_writes(
    tmp_path: Path, family: str, tied: bool, tiny_checkpoint: Any
) -> None:
    ckpt = tiny_checkpoint(tmp_path, family, tie_word_embeddings=tied)
    with safe_open(ckpt / "model.safetensors", framework="np") as opened:
        written = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    assert DecoderConfig.from_dir(ckpt).tensor_shapes() == written


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_llama_biases_are_what_transformers_writes(tmp_path: Path, bias: str, tiny_checkpoint: Any) -> None:
    ckpt = tiny_checkpoint(tmp_path, "llama", **{bias: True})
    with safe_open(ckpt / "model.safetensors", framework="np") as opened:
        assert DecoderConfig.from_dir(ckpt).tensor_shapes().keys() == set(opened.keys())


def test_generation_config_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**RAW, "eos_token_id": 2}))
    assert DecoderConfig.from_dir(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert DecoderConfig.from_dir(tmp_path).eos_token_ids == (2, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2'; expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": "absent"}, "model_type None"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_size": "absent"}, "hidden_size = None; expected a positive integer"),
        ({"hidden_size": 64.0}, r"hidden_size = 64\.0"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers = '2'"),
        ({"num_hidden_layers": 1001}, "num_hidden_layers = 1001; expected at most 1000"),
        ({"vocab_size": 2**31}, "vocab_size = 2147483648; expected at most 2147483647"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3; expected a divisor of num_attention_heads = 4"),
        ({"hidden_size": 66}, "num_attention_heads = 4; expected a divisor of hidden_size = 66, or head_dim"),
        ({"head_dim": 15}, "head_dim = 15; expected an even number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan; expected a positive number"),
        ({"rms_norm_eps": True}, "rms_norm_eps = True; expected a positive number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false'; expected true or false"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window = -1"),
        ({"model_type": "qwen2", "use_sliding_window": 1}, "use_sliding_window = 1; expected true or false"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "model_type 'mixtral', a mixture of experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config of 'gptq'"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"torch_dtype": "float8"}, "dtype 'float8'"),
    ],
)
def test_numbers_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _config(**changes)
    assert caught.value.where == "config.json"


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"[" * 100_000])
def test_unreadable_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"config\.json: got (unreadable JSON|a JSON)") as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        DecoderConfig.from_dir(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="got a directory"):
        DecoderConfig.from_dir(tmp_path)
