"""What TensorRT-LLM raises on in the config.json of a Medusa checkpoint, and what it silently takes for something else.

An error is what builds wrong or not at all; a note is what is unusual and right, such as a key that has the right default.

Sources: tensorrt_llm/models/modeling_utils.py (PretrainedConfig, QuantConfig), models/{medusa,llama,qwen}/config.py, mapping.py, and
TensorRT-LLM issue 7208: before 1.2 a Qwen checkpoint got Llama's defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from medusa_export.core.json_fields import read_json
from medusa_export.exporter.verify.trtllm_loader.modules import (
    ALGOS,
    BUILDER_QUANTIZES,
    DEFAULT_GROUP_SIZE,
    FINAL_NORM,
    KV_ALGOS,
    exclude_patterns,
    excluded,
    is_quantized,
    is_qwen,
    medusa_modules,
    padding,
)

ARCHITECTURES = ("MedusaForCausalLM", "MedusaLlamaForCausalLM")
# Every key whose absence is an error, or has a default that is wrong for some model: None where there is no default.
KEYS: dict[str, tuple[type | tuple[type, ...], Any]] = {
    "architecture": (str, None),
    "dtype": (str, None),
    "vocab_size": (int, None),
    "hidden_size": (int, None),
    "intermediate_size": (int, "four times hidden_size"),
    "num_hidden_layers": (int, None),
    "num_attention_heads": (int, None),
    "num_key_value_heads": (int, "num_attention_heads"),
    "head_size": (int, None),
    "hidden_act": (str, "gelu"),
    "norm_epsilon": ((int, float), "1e-5"),
    "position_embedding_type": (str, "learned_absolute"),
    "max_position_embeddings": (int, None),
    "rotary_base": ((int, float), "10000"),
    "attn_bias": (bool, None),
    "mlp_bias": (bool, None),
    "model_type": (str, "llama"),
    "num_medusa_heads": (int, "4"),
    "num_medusa_layers": (int, "1"),
    "max_draft_len": (int, "63"),
    "mapping": (dict, "a single rank"),
    "quantization": (dict, "16 bit"),
}
QWEN_KEYS: dict[str, tuple[type | tuple[type, ...], Any]] = {
    "qwen_type": (str, "nothing before 1.2"),
    "seq_length": (int, "nothing before 1.2"),
    "use_logn_attn": (bool, "nothing before 1.2"),
}
VALUES: dict[str, tuple[Any, ...]] = {
    "architecture": ARCHITECTURES,
    "dtype": ("float16", "bfloat16"),
    "logits_dtype": ("float32", "float16", None),
    "hidden_act": ("silu",),
    "position_embedding_type": ("rope_gpt_neox",),
    "embedding_sharding_dim": (0, 1, None),
}
# Keys whose absence builds what is meant: NVIDIA's own converter leaves them out.
DEFAULTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "head_size": lambda config: config["hidden_size"] // config["num_attention_heads"],
    "attn_bias": lambda config: is_qwen({"model_type": config["model_type"]}),  # without one nothing is known
    "mlp_bias": lambda config: False,
    "mapping": lambda config: {},
    "quantization": lambda config: {},
}
MAPPING_DEFAULTS = {"world_size": 1, "tp_size": 1, "pp_size": 1}
ROTARY_SCALINGS = ("none", "linear", "dynamic", "longrope", "llama3", "yarn", "mrope")
LLAMA_ONLY = ("fc_after_embed", "residual_mlp")  # layers that no Medusa checkpoint has
READ_ONLY = ("kv_dtype", "quant_mode", "quant_algo")  # properties of the config's class: setting one raises
MAPPING_KEYS = {
    "world_size", "tp_size", "pp_size", "cp_size", "gpus_per_node", "moe_cluster_size", "moe_tp_size", "moe_ep_size",
    "attn_tp_size", "attn_cp_size", "auto_parallel", "enable_attention_dp",
}  # fmt: skip
QUANTIZATION_KEYS = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val", "use_meta_recipe",
    "has_zero_point", "pre_quant_scale", "exclude_modules",
}  # fmt: skip
POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_size", "max_position_embeddings", "num_medusa_heads", "num_medusa_layers", "max_draft_len",
)  # fmt: skip


def read_config(trt_dir: Path) -> dict[str, Any]:
    """A checkpoint's config.json as TensorRT-LLM would complete it; ConfigError where it cannot be read."""
    return with_defaults(read_json(trt_dir / "config.json"))


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the keys that may be absent, but for those whose default follows from something missing or no number."""
    full = dict(config)
    for key, default in DEFAULTS.items():
        try:
            full.setdefault(key, default(config))
        except (KeyError, TypeError, ZeroDivisionError):
            continue  # what it follows from is an error of its own
    if isinstance(full["mapping"], dict):
        full["mapping"] = {**MAPPING_DEFAULTS, **full["mapping"]}
    quantization = full["quantization"]
    if isinstance(quantization, dict):
        full["quantization"] = {"quant_algo": None, **quantization}
        if quantization.get("quant_algo") in ALGOS and ALGOS[quantization["quant_algo"]].group_sizes:
            full["quantization"] = {"group_size": DEFAULT_GROUP_SIZE, "has_zero_point": False, **full["quantization"]}
    return full


def config_notes(config: Mapping[str, Any]) -> list[str]:
    """What is unusual in a config.json without being wrong, one line each."""
    full = with_defaults(config)
    sections = {"": (config, full)}
    for name in ("mapping", "quantization"):
        if isinstance(config.get(name), dict):
            sections[f"{name}."] = (config[name], full[name])
    notes = [
        f"config.json: no {section}{key}; TensorRT-LLM takes {completed[key]!r}"
        for section, (given, completed) in sections.items()
        for key in completed
        if key not in given
    ]
    if "attn_bias" not in config and is_qwen(config):
        notes[-1:] = [
            notes[-1],
            "config.json: some releases before 1.2 take attn_bias false for Qwen, and drop the bias",
        ]
    if config.get("share_embedding_table"):
        notes.append("config.json: share_embedding_table is set; later releases only warn of it")
    if full["quantization"].get("use_meta_recipe"):
        notes.append("config.json: use_meta_recipe leaves attention, and the first and last layer, in 16 bit")
    return notes


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with a config.json, one line each; later rules are applied only where the earlier ones hold."""
    config = with_defaults(config)
    for rules in (_key_problems, _value_problems, _layout_problems, _module_problems):
        problems = [f"config.json: {problem}" for problem in rules(config)]
        if problems:
            return problems
    return []


def _key_problems(config: Mapping[str, Any]) -> Iterator[str]:
    keys = {**KEYS, **(QWEN_KEYS if is_qwen(config) else {})}
    for key, (kind, default) in keys.items():
        if key not in config:
            yield f"no {key}" + (f"; TensorRT-LLM would take {default}" if default else "")
        elif not isinstance(config[key], kind) or (isinstance(config[key], bool) and kind is not bool):
            yield f"{key} is {config[key]!r}"
    yield from (f"{key} at top level makes TensorRT-LLM raise" for key in READ_ONLY if key in config)
    for section, known in (("mapping", MAPPING_KEYS), ("quantization", QUANTIZATION_KEYS)):
        given = config.get(section)
        for key in sorted(given.keys() - known) if isinstance(given, dict) else []:
            yield f"{section}.{key} is unknown to TensorRT-LLM, which raises"


def _value_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for key, values in VALUES.items():
        if config.get(key) not in values:
            yield f"{key} is {config.get(key)!r}; expected one of {tuple(value for value in values if value is not None)}"
    yield from (f"{key} is below 1" for key in POSITIVE if config[key] < 1)
    yield from _rotary_problems(config.get("rotary_scaling"))
    yield from (
        f"{key} is set; TensorRT-LLM would ask for layers that are not there" for key in LLAMA_ONLY if config.get(key)
    )
    if config.get("share_embedding_table") and config["mapping"]["tp_size"] != 1 and not _shards_vocabulary(config):
        yield "share_embedding_table over ranks needs use_parallel_embedding with embedding_sharding_dim 0; TensorRT-LLM raises"
    if is_qwen(config) and config.get("qk_layernorm", False) != config["qwen_type"].startswith("qwen3"):
        yield f"qk_layernorm is {config.get('qk_layernorm', False)} with qwen_type {config['qwen_type']!r}"
    yield from _quantization_values(config["quantization"])


def _rotary_problems(scaling: object) -> Iterator[str]:
    if scaling is None:
        return
    if not isinstance(scaling, dict) or "type" not in scaling:
        yield "rotary_scaling has no type"
    elif scaling["type"] not in ROTARY_SCALINGS:
        yield f"rotary_scaling.type {scaling['type']!r} is not one of {ROTARY_SCALINGS}; TensorRT-LLM raises"


def _shards_vocabulary(config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_parallel_embedding")) and config.get("embedding_sharding_dim", 0) == 0


def _quantization_values(quantization: Mapping[str, Any]) -> Iterator[str]:
    algo, kv_algo = quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo")
    if algo is not None and algo not in ALGOS:
        yield f"quantization.quant_algo {algo!r} is not one of {tuple(ALGOS)}"
    if kv_algo is not None and kv_algo not in KV_ALGOS:
        yield f"quantization.kv_cache_quant_algo {kv_algo!r} is not one of {KV_ALGOS}"
    patterns = quantization.get("exclude_modules")
    if patterns is not None and not (isinstance(patterns, list) and all(isinstance(each, str) for each in patterns)):
        yield f"quantization.exclude_modules is {patterns!r}; expected a list of patterns"
    sizes = ALGOS[algo].group_sizes if algo in ALGOS else ()
    if sizes:
        if quantization.get("group_size") not in sizes:
            yield f"quantization.group_size {quantization.get('group_size')!r} is not one of {sizes} under {algo}"
        for key, value in (("has_zero_point", False), ("pre_quant_scale", True)):
            if quantization.get(key) is not value:
                yield f"quantization.{key} is {quantization.get(key)!r} under {algo}"


def _layout_problems(config: Mapping[str, Any]) -> Iterator[str]:
    mapping = config["mapping"]
    tp, others = mapping.get("tp_size"), [mapping.get(key, 1) for key in ("pp_size", "cp_size")]
    if type(tp) is not int or tp < 1 or mapping.get("world_size") != tp or others != [1, 1]:
        yield f"mapping {mapping}; expected world_size = tp_size and pp_size 1"
        return
    for key in ("num_attention_heads", "hidden_size", "intermediate_size"):
        if config[key] % tp:
            yield f"{key} {config[key]} is not divisible by tp {tp}"
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if max(kv_heads, tp) % min(kv_heads, tp):
        yield f"neither num_key_value_heads {kv_heads} nor tp {tp} divides the other"
    if heads % kv_heads:
        yield f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}"


def _module_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What quantizing module by module would do."""
    algo, patterns = config["quantization"].get("quant_algo"), exclude_patterns(config)
    if algo is None:
        return
    modules = {module.name: module for module in medusa_modules(config)}
    if not ALGOS[algo].listed and not excluded(patterns, FINAL_NORM):
        yield (
            f"quantization.exclude_modules lacks *ln_f: TensorRT-LLM 0.17 and 0.18 would make {FINAL_NORM} a row-wise norm under "
            f"{algo}, and the build ends in \"'tuple' object has no attribute 'rank'\""
        )
    if ALGOS[algo].by_builder and not excluded(patterns, "transformer.vocab_embedding"):
        yield f"the embedding has to be excluded under {algo}, which would make it an INT8 one"
    for name, module in modules.items():
        quantized, gate = is_quantized(config, module), name.removesuffix("fc") + "gate"
        if quantized and (odd := padding(config, module)):
            yield f"{name} under {algo}: {odd}, so TensorRT-LLM would pad it and refuse the tensor"
        if name.endswith(".mlp.fc") and quantized != is_quantized(config, modules[gate]):
            yield f"{name} and its gate, which trtllm-build fuses, are not both excluded"
        if module.is_linear and not ALGOS[algo].listed and quantized and excluded(patterns, name):
            yield f"{name} is excluded, but {algo} quantizes attention and MLP whatever the list says"
        if ALGOS[algo].by_builder and module.is_linear:
            yield from _weight_only_problems(algo, patterns, name)


def _weight_only_problems(algo: str, patterns: tuple[str, ...], name: str) -> Iterator[str]:
    """The builder matches patterns against modules when it declares them, and against tensors when it quantizes them."""
    last = name.rsplit(".", 1)[-1]
    if last not in BUILDER_QUANTIZES:
        if last == "lm_head" and not excluded(patterns, name):
            yield f"{name} has to be excluded under {algo}: trtllm-build quantizes {', '.join(BUILDER_QUANTIZES)} only"
    elif excluded(patterns, name) != excluded(patterns, f"{name}.weight"):
        yield f"{name} matches exclude_modules, {name}.weight does not or the other way round: end the pattern with *"
