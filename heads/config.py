"""One normalised view of a Hugging Face config.json, whichever family and transformers version wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_export.heads import families
from medusa_export.heads.errors import ConfigError
from medusa_export.heads.families import FAMILIES, Family


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers that the exporters and engines need; names follow Hugging Face.

    Attributes:
        head_dim: width of one attention head (explicit in config.json or hidden_size / num_attention_heads).
        rope_scaling: None, or the full Hugging Face dictionary with ``rope_type``.
        dtype: "float16", "bfloat16" or "float32": what the checkpoint's weights are stored in.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    dtype: str
    eos_token_ids: tuple[int, ...]
    raw: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dir(cls, ckpt: Path) -> DecoderConfig:
        """Read ``ckpt/config.json`` (and generation_config.json for the end-of-sequence ids).

        Raises:
            ConfigError: no or unreadable config, an unsupported family, or numbers that contradict each other.
        """
        raw = read_json(ckpt / "config.json")
        generation = ckpt / "generation_config.json"
        return cls.from_dict(
            raw, where=str(ckpt / "config.json"), generation=read_json(generation) if generation.is_file() else {}
        )

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], *, where: str = "config.json", generation: Mapping[str, Any] | None = None
    ) -> DecoderConfig:
        """As :meth:`from_dir`, from parsed JSON."""
        family = _family(raw, where)
        need = _Reader(raw, where)
        hidden, heads = need.positive("hidden_size"), need.positive("num_attention_heads")
        kv_heads = need.positive("num_key_value_heads", heads)
        head_dim = need.positive("head_dim", 0 if hidden % heads else hidden // heads)
        if heads % kv_heads:
            raise ConfigError(
                where, f"{heads} query heads over {kv_heads} key/value heads", "a multiple", "fix config.json"
            )
        rope_theta, rope_scaling = _rope(raw, family, where)
        attention_bias = bool(raw.get("attention_bias") or family.qkv_bias)
        return cls(
            family=family,
            vocab_size=need.positive("vocab_size"),
            hidden_size=hidden,
            intermediate_size=need.positive("intermediate_size"),
            num_hidden_layers=need.positive("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_act=_hidden_act(raw, where),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=need.positive("max_position_embeddings", 2048),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=attention_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            sliding_window=_sliding_window(raw),
            dtype=_dtype(raw, where),
            eos_token_ids=_eos(raw, generation or {}, where),
            raw=dict(raw),
        )

    @property
    def o_bias(self) -> bool:
        """Llama's attention_bias also covers o_proj; Qwen2's bias does not."""
        return self.attention_bias and not self.family.qkv_bias

    @property
    def q_size(self) -> int:
        """Rows of q_proj."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj, and of v_proj."""
        return self.num_key_value_heads * self.head_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of every linear of one layer by its Hugging Face name pattern."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            families.Q_PROJ: (self.q_size, hidden),
            families.K_PROJ: (self.kv_size, hidden),
            families.V_PROJ: (self.kv_size, hidden),
            families.O_PROJ: (hidden, self.q_size),
            families.GATE_PROJ: (inner, hidden),
            families.UP_PROJ: (inner, hidden),
            families.DOWN_PROJ: (hidden, inner),
        }

    def has_bias(self, linear: str) -> bool:
        """Whether a linear (by its name pattern) carries a bias in the checkpoint."""
        if linear in (families.Q_PROJ, families.K_PROJ, families.V_PROJ):
            return self.attention_bias
        return self.o_bias if linear == families.O_PROJ else self.mlp_bias

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the base checkpoint must hold (a tied lm_head is left out)."""
        shapes: dict[str, tuple[int, ...]] = {families.EMBED_TOKENS: (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_hidden_layers):
            shapes[families.INPUT_LAYERNORM.format(layer)] = (self.hidden_size,)
            shapes[families.POST_ATTENTION_LAYERNORM.format(layer)] = (self.hidden_size,)
            if self.family.qk_norm:
                shapes[families.Q_NORM.format(layer)] = (self.head_dim,)
                shapes[families.K_NORM.format(layer)] = (self.head_dim,)
            for linear, shape in self.linear_shapes().items():
                shapes[linear.format(layer) + ".weight"] = shape
                if self.has_bias(linear):
                    shapes[linear.format(layer) + ".bias"] = shape[:1]
        shapes[families.FINAL_NORM] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes[families.LM_HEAD] = (self.vocab_size, self.hidden_size)
        return shapes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: missing, unreadable, not UTF-8, not JSON or not an object.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(str(path), "no such file", "a Hugging Face directory with it", "check the path") from error
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(
            str(path), f"unreadable JSON ({error})", "a JSON object", "download the file again"
        ) from error
    if not isinstance(body, dict):
        raise ConfigError(str(path), f"a JSON {type(body).__name__}", "a JSON object", "download the file again")
    return body


class _Reader:
    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def positive(self, key: str, default: int | None = None) -> int:
        """A positive integer; an absent or null key takes the default."""
        value = self.raw.get(key)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            raise ConfigError(self.where, f"{key} = {value!r}", "a positive integer", "fix config.json")
        return value


def _family(raw: Mapping[str, Any], where: str) -> Family:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(where, f"model_type {model_type!r}", f"one of {known}", "use a dense model of these families")
    return FAMILIES[model_type]


def _hidden_act(raw: Mapping[str, Any], where: str) -> str:
    act = raw.get("hidden_act", "silu")
    if act != "silu":
        raise ConfigError(where, f"hidden_act {act!r}", "'silu'", "this activation is not supported")
    return "silu"


def _rope(raw: Mapping[str, Any], family: Family, where: str) -> tuple[float, dict[str, Any] | None]:
    """transformers 5 moved rope_theta and rope_scaling into rope_parameters; both spellings are read."""
    parameters, older = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(older, dict):
        got = f"{parameters or older!r}"
        raise ConfigError(where, f"rope parameters {got}", "an object", "fix config.json")
    theta = parameters.get("rope_theta", raw.get("rope_theta", family.default_rope_theta))
    scaling = {**older, **parameters}
    scaling.pop("rope_theta", None)
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "default":
        return float(theta), None
    return float(theta), {**scaling, "rope_type": rope_type}


def _sliding_window(raw: Mapping[str, Any]) -> int | None:
    """The window in force: Qwen2 and Qwen3 carry one that ``use_sliding_window`` switches off."""
    default_on = raw["model_type"] == "mistral"
    window = raw.get("sliding_window") if raw.get("use_sliding_window", default_on) else None
    return int(window) if window else None


def _dtype(raw: Mapping[str, Any], where: str) -> str:
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ConfigError(where, f"dtype {dtype!r}", "float16, bfloat16 or float32", "fix config.json")
    return str(dtype)


def _eos(raw: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> tuple[int, ...]:
    ids = generation.get("eos_token_id", raw.get("eos_token_id"))
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if any(type(token) is not int for token in ids):
        raise ConfigError(where, f"eos_token_id {ids!r}", "an integer or a list of integers", "fix config.json")
    return tuple(ids)
