"""One normalised view of a Hugging Face config.json, whichever family and transformers version wrote it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from os.path import lexists
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.json_fields import HUGGING_FACE, Fields, read_json
from medusa_export.heads.checkpoint import families
from medusa_export.heads.checkpoint.families import FAMILIES, Family
from medusa_export.heads.checkpoint.rope import read_rope

SLIDING = "sliding_attention"
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers that the exporters and engines need; names follow Hugging Face.

    Attributes:
        head_dim: width of one attention head (explicit in config.json or hidden_size / num_attention_heads).
        rope_scaling: None, or the full Hugging Face dictionary with ``rope_type``.
        layer_windows: tokens that each layer attends to, its own among them; None is all. No window is as long as the context.
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
    layer_windows: tuple[int | None, ...]
    dtype: str
    eos_token_ids: tuple[int, ...]
    raw: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dir(cls, ckpt: Path) -> DecoderConfig:
        """Read ``ckpt/config.json`` (and generation_config.json for the end-of-sequence ids).

        Raises:
            ConfigError: no or unreadable config, an unsupported family, numbers that contradict each other, or an adapter that
                the weights beside it lack.
        """
        refuse_adapter(ckpt)
        raw = read_json(ckpt / "config.json", *HUGGING_FACE)
        generation = ckpt / "generation_config.json"
        return cls.from_dict(
            raw,
            where=str(ckpt / "config.json"),
            generation=read_json(generation, *HUGGING_FACE) if lexists(generation) else {},
        )

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], *, where: str = "config.json", generation: Mapping[str, Any] | None = None
    ) -> DecoderConfig:
        """As :meth:`from_dir`, from parsed JSON.

        Args:
            raw: body of config.json.
            where: what errors call it.
            generation: body of generation_config.json, where there is one.
        """
        family = _family(raw, where)
        _refuse_quantized(raw, where)
        fields = Fields(raw, where)
        heads = fields.positive("num_attention_heads")
        head_dim = _head_dim(fields, heads)
        rope_theta, rope_scaling = read_rope(raw, where, default_theta=family.default_rope_theta, head_dim=head_dim)
        return cls(
            family=family,
            vocab_size=fields.positive("vocab_size"),
            hidden_size=fields.positive("hidden_size"),
            intermediate_size=fields.positive("intermediate_size"),
            num_hidden_layers=fields.positive("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_kv_heads(fields, heads),
            head_dim=head_dim,
            hidden_act=_hidden_act(raw, where),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=fields.positive("max_position_embeddings", 2048),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=fields.flag("attention_bias") or family.qkv_bias,
            mlp_bias=fields.flag("mlp_bias"),
            layer_windows=_layer_windows(fields, family),
            dtype=_dtype(raw, where),
            eos_token_ids=_eos(raw, generation or {}, where),
            raw=dict(raw),
        )

    @property
    def sliding_window(self) -> int | None:
        """The smallest window of a layer; None where every layer attends to all tokens."""
        return min((window for window in self.layer_windows if window is not None), default=None)

    def windows_within(self, max_length: int) -> int | list[int] | None:
        """What a runtime is told for a context of ``max_length``: None, one window for all layers, or one for each of them."""
        windows = [min(window or max_length, max_length) for window in self.layer_windows]
        if min(windows) == max_length:
            return None
        return windows[0] if len(set(windows)) == 1 else windows

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


def refuse_adapter(directory: Path) -> None:
    """Raise ConfigError for a PEFT adapter: a model without it is another one, and transformers would load it in silence."""
    path = directory / "adapter_config.json"
    if lexists(path):
        action = "merge the adapter first: peft's merge_and_unload(), then save_pretrained()"
        raise ConfigError(str(path), "a PEFT adapter beside the weights", "weights that contain it", action)


def _family(raw: Mapping[str, Any], where: str) -> Family:
    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    got = f"model_type {reprlib.repr(model_type)}"
    if str(model_type).endswith("moe") or any(raw.get(key) for key in _EXPERT_KEYS):
        got += ", a mixture of experts: its router and experts have no place in what is written"
    raise ConfigError(where, got, f"one of {', '.join(FAMILIES)}", "use a dense model of these families")


def _refuse_quantized(raw: Mapping[str, Any], where: str) -> None:
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method", "?") if isinstance(raw[key], dict) else raw[key]
            expected = "weights in 16 to 64 bit floating point"
            action = "use the checkpoint that it was quantized from"
            raise ConfigError(where, f"{key} of {reprlib.repr(method)}", expected, action)


def _head_dim(fields: Fields, heads: int) -> int:
    hidden = fields.positive("hidden_size")
    if fields.raw.get("head_dim") is None and hidden % heads:
        raise fields.error("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}, or head_dim")
    head_dim = fields.positive("head_dim", hidden // heads)
    if head_dim % 2:
        raise fields.error("head_dim", head_dim, "an even number: the rotary embedding turns pairs")
    return head_dim


def _kv_heads(fields: Fields, heads: int) -> int:
    kv_heads = fields.positive("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads = {heads}")
    return kv_heads


def _hidden_act(raw: Mapping[str, Any], where: str) -> str:
    act = raw.get("hidden_act", "silu")
    if act != "silu":
        raise ConfigError(
            where, f"hidden_act {reprlib.repr(act)}", "'silu'", "use a model of these families as it was released"
        )
    return "silu"


def _layer_windows(fields: Fields, family: Family) -> tuple[int | None, ...]:
    """As transformers' configs have it: Mistral's is every layer's; Qwen's is off, or on from max_window_layers upwards.

    ``layer_types`` says it layer by layer where it is there. A window of null is none, an absent one is the family's.
    """
    layers = fields.positive("num_hidden_layers")
    types = _layer_types(fields, layers) if family.switches_window else None
    is_on = family.default_window is not None and (not family.switches_window or fields.flag("use_sliding_window"))
    window = _window(fields, family) if is_on else None
    if window is None:
        if types and SLIDING in types:
            raise fields.error("layer_types", SLIDING, "full_attention: the sliding window is off")
        return (None,) * layers
    first = _first_window_layer(fields) if family.switches_window else 0
    slides = [kind == SLIDING for kind in types] if types else [layer >= first for layer in range(layers)]
    is_shorter = window < fields.positive("max_position_embeddings", 2048)
    return tuple(window if slide and is_shorter else None for slide in slides)


def _window(fields: Fields, family: Family) -> int | None:
    if "sliding_window" in fields.raw and fields.raw["sliding_window"] is None:
        return None
    return fields.positive("sliding_window", family.default_window)


def _first_window_layer(fields: Fields) -> int:
    return 0 if fields.raw.get("max_window_layers") == 0 else fields.positive("max_window_layers", 28)


def _layer_types(fields: Fields, layers: int) -> list[str] | None:
    types = fields.raw.get("layer_types")
    if types is None:
        return None
    known = (SLIDING, "full_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
        raise fields.error("layer_types", types, f"{layers} of {' and '.join(known)}")
    return types


def _dtype(raw: Mapping[str, Any], where: str) -> str:
    dtype = next((raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None), "float32")
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ConfigError(where, f"dtype {reprlib.repr(dtype)}", "float16, bfloat16 or float32", "fix config.json")
    return str(dtype)


def _eos(raw: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Of both files: where they differ, each names tokens that the model ends with."""
    found: list[int] = []
    for ids in (generation.get("eos_token_id"), raw.get("eos_token_id")):
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if any(type(token) is not int for token in ids):
            raise ConfigError(
                where, f"eos_token_id {reprlib.repr(ids)}", "an integer or a list of integers", "fix config.json"
            )
        found += ids
    return tuple(dict.fromkeys(found))
