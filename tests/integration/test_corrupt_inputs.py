"""medusa-export on wrong configs, heads, trees, prompts and tokenizers: one line that names the fault, nothing written, nothing run.

An input is damaged through a function of the inputs, which may give other flags for the command.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Change = Callable[[Any], dict[str, object] | None]

WITHOUT_TEMPLATE = {"engine": "onnxruntime"}  # what needs the chat template


def flags(**changes: object) -> Change:
    return lambda inputs: changes


def config(**values: object) -> Change:
    """Other values in the model's config.json; ``...`` removes a key."""
    return lambda inputs: inputs.set_config(**values)


def text(name: str, new: str | bytes) -> Change:
    """A file of the model with another content."""

    def change(inputs: Any) -> None:
        (inputs.model / name).write_bytes(new.encode() if isinstance(new, str) else new)

    return change


def edited(edit: Callable[[bytes], bytes]) -> Change:
    """The model's config.json, changed as text."""

    def change(inputs: Any) -> None:
        file = inputs.model / "config.json"
        file.write_bytes(edit(file.read_bytes()))

    return change


def instead(name: str, replace: Callable[[Path], None]) -> Change:
    """Something else in place of a file of the model."""

    def change(inputs: Any) -> None:
        (inputs.model / name).unlink(missing_ok=True)
        replace(inputs.model / name)

    return change


def rope(**scaling: object) -> Change:
    return config(rope_parameters=..., rope_scaling=scaling)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

CONFIGS: dict[str, tuple[Change, str]] = {
    "no config": (instead("config.json", lambda path: None), "config.json: got"),
    "empty config": (text("config.json", ""), "config.json: got unreadable JSON"),
    "cut config": (edited(lambda body: body[:-20]), "config.json: got unreadable JSON"),
    "config is not UTF-8": (edited(lambda body: b'{"a": "\xff"}'), "config.json: got unreadable JSON"),
    "config in UTF-16": (edited(lambda body: body.decode().encode("utf-16")), "config.json: got unreadable JSON"),
    "config with a byte order mark": (edited(lambda body: b"\xef\xbb\xbf" + body), "config.json: got unreadable JSON"),
    "config is a list": (text("config.json", "[]"), "config.json: got a JSON list"),
    "config is null": (text("config.json", "null"), "config.json: got a JSON null"),
    "config is deep": (text("config.json", "[" * 100_000), "config.json: got unreadable JSON"),
    "config is a directory": (instead("config.json", Path.mkdir), "config.json: got a directory"),
    "config is a FIFO": (instead("config.json", os.mkfifo), "config.json: got a FIFO"),
    "config is a device": (
        instead("config.json", lambda path: path.symlink_to("/dev/zero")),
        "config.json: got a device",
    ),
    "config is a dangling link": (instead("config.json", lambda path: path.symlink_to("x")), "config.json: got"),
    "checkpoint is a file": (lambda inputs: {"ckpt": inputs.weights}, "model.safetensors/config.json: got"),
    "generation config is a FIFO": (instead("generation_config.json", os.mkfifo), "generation_config.json: got a FIFO"),
    "generation config is a list": (text("generation_config.json", "[]"), "generation_config.json: got"),
    "no model_type": (config(model_type=...), "model_type None"),
    "unknown model_type": (
        config(model_type="gpt2"),
        "model_type 'gpt2'; expected one of llama, mistral, qwen2, qwen3",
    ),
    "model_type is a list": (config(model_type=["llama"]), "model_type ['llama']"),
    "very long model_type": (config(model_type="x" * 10**6), "model_type 'xxx"),
    "mixtral": (config(model_type="mixtral", num_local_experts=8), "a mixture of experts"),
    "qwen2_moe": (config(model_type="qwen2_moe", num_experts=60), "a mixture of experts"),
    "qwen3_moe": (config(model_type="qwen3_moe"), "a mixture of experts"),
    "no hidden_size": (config(hidden_size=...), "hidden_size = None"),
    "no vocab_size": (config(vocab_size=...), "vocab_size = None"),
    "no layers": (config(num_hidden_layers=...), "num_hidden_layers = None"),
    "text for a number": (config(hidden_size="64"), "hidden_size = '64'"),
    "true for a number": (config(num_hidden_layers=True), "num_hidden_layers = True"),
    "fraction for a number": (config(hidden_size=64.5), "hidden_size = 64.5"),
    "float for a number": (config(vocab_size=97.0), "vocab_size = 97.0"),
    "negative size": (config(intermediate_size=-80), "intermediate_size = -80"),
    "no query heads": (config(num_attention_heads=0), "num_attention_heads = 0"),
    "no key heads": (config(num_key_value_heads=0), "num_key_value_heads = 0"),
    "no positions": (config(max_position_embeddings=0), "max_position_embeddings = 0"),
    "huge hidden_size": (config(hidden_size=2**62), "hidden_size = 4611686018427387904; expected at most"),
    "large hidden_size": (config(hidden_size=2**30), "expected [97, 1073741824]"),
    "huge vocab_size": (config(vocab_size=10**300), "vocab_size = 1000"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers = 1000000000; expected at most 1000"),
    "heads do not divide": (config(num_attention_heads=5, head_dim=...), "num_attention_heads = 5; expected a divisor"),
    "key heads do not divide": (config(num_key_value_heads=3), "num_key_value_heads = 3; expected a divisor"),
    "odd head_dim": (config(head_dim=17), "head_dim = 17; expected an even number"),
    "eps is NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps = nan"),
    "eps is a text": (config(rms_norm_eps="1e-6"), "rms_norm_eps = '1e-6'"),
    "eps is negative": (config(rms_norm_eps=-1e-6), "rms_norm_eps = -1e-06"),
    "theta is infinite": (config(rope_parameters=..., rope_theta=float("inf")), "rope_theta = inf"),
    "theta is 0": (config(rope_parameters=..., rope_theta=0), "rope_theta = 0"),
    "theta is a text": (config(rope_parameters={"rope_type": "default", "rope_theta": "1e4"}), "rope_theta = '1e4'"),
    "rope scaling is a list": (config(rope_scaling=["linear"]), "rope_scaling = ['linear']"),
    "unknown rope scaling": (rope(rope_type="spiral", factor=2.0), "rope_scaling type = 'spiral'"),
    "rope type is a number": (rope(rope_type=3, factor=2.0), "rope_scaling type = 3"),
    "rope factor missing": (rope(rope_type="linear"), "rope_scaling.factor = None"),
    "rope factor is 0": (rope(rope_type="linear", factor=0), "rope_scaling.factor = 0"),
    "rope factor is NaN": (rope(rope_type="yarn", factor=float("nan")), "rope_scaling.factor = nan"),
    "llama3 without its frequencies": (
        rope(**{**LLAMA3, "low_freq_factor": None}),
        "rope_scaling.low_freq_factor = None",
    ),
    "llama3 with equal frequencies": (
        rope(**{**LLAMA3, "low_freq_factor": 4.0}),
        "expected less than high_freq_factor",
    ),
    "longrope with too few factors": (
        rope(rope_type="longrope", short_factor=[1.0], long_factor=[1.0]),
        "rope_scaling.short_factor = [1.0]; expected a list of 8 numbers",
    ),
    "another activation": (config(hidden_act="gelu"), "hidden_act 'gelu'"),
    "activation is null": (config(hidden_act=None), "hidden_act None"),
    "unknown dtype": (config(dtype="float8_e4m3fn"), "dtype 'float8_e4m3fn'"),
    "tied as a text": (config(tie_word_embeddings="false"), "tie_word_embeddings = 'false'"),
    "bias as a number": (config(attention_bias=1), "attention_bias = 1"),
    "window as a text": (config(model_type="mistral", sliding_window="4k"), "sliding_window = '4k'"),
    "negative window": (config(model_type="mistral", sliding_window=-1), "sliding_window = -1"),
    "end of sequence as a text": (config(eos_token_id="</s>"), "eos_token_id"),
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config of 'gptq'"),
    "AWQ": (config(quantization_config={"quant_method": "awq"}), "quantization_config of 'awq'"),
    "FP8": (config(quantization_config={"quant_method": "fp8"}), "quantization_config of 'fp8'"),
    "bitsandbytes without a method": (config(quantization_config={"load_in_4bit": True}), "quantization_config of '?'"),
    "quantized, but how": (config(quantization_config="int8"), "quantization_config of 'int8'"),
    "another vocabulary": (config(vocab_size=98), "model.embed_tokens.weight: got shape [97, 64]; expected [98, 64]"),
    "another hidden_size": (
        config(hidden_size=128),
        "model.embed_tokens.weight: got shape [97, 64]; expected [97, 128]",
    ),
    "another intermediate_size": (
        config(intermediate_size=96),
        "mlp.gate_proj.weight: got shape [80, 64]; expected [96, 64]",
    ),
    "more layers": (config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight: got no such tensor"),
    "fewer layers": (config(num_hidden_layers=1), "model.layers.1."),
    "more query heads": (
        config(num_attention_heads=8, head_dim=16),
        "q_proj.weight: got shape [64, 64]; expected [128, 64]",
    ),
    "more key heads": (config(num_key_value_heads=4), "k_proj.weight: got shape [32, 64]; expected [64, 64]"),
    "another head_dim": (config(head_dim=32), "q_proj.weight: got shape [64, 64]; expected [128, 64]"),
    "biases that are not there": (config(attention_bias=True), "q_proj.bias: got no such tensor"),
    "another family": (config(model_type="qwen3"), "q_norm.weight: got no such tensor"),
    "an lm_head that is not tied": (
        config(tie_word_embeddings=True),
        "lm_head.weight: got another matrix than the embedding",
    ),
}


def heads(edit: Callable[[Tensors], Tensors | None]) -> Change:
    """Other head tensors: what ``edit`` gives, or its argument after it."""

    def change(inputs: Any) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(inputs.head_weights).items()}
        save_file(edit(tensors) or tensors, inputs.head_weights)

    return change


def put(name: str, tensor: torch.Tensor) -> Change:
    return heads(lambda tensors: tensors.update({name: tensor}))


def drop(*names: str) -> Change:
    return heads(lambda tensors: [tensors.pop(name) for name in names] and None)


def poison(name: str, value: float) -> Change:
    """One value of a tensor."""
    return heads(lambda tensors: tensors[name].view(-1)[-1:].fill_(value) and None)


def renamed(before: str, after: str) -> Change:
    return heads(lambda tensors: {name.replace(before, after): tensor for name, tensor in tensors.items()})


def vllm(*, keep: Callable[[str], bool] = lambda name: True, more: Tensors | None = None, **values: object) -> Change:
    """The heads in vLLM's layout, some of its tensors, other tensors beside them and other values in the config."""

    def change(inputs: Any) -> None:
        tensors = {}
        for name, tensor in load_file(inputs.head_weights).items():
            head, layer, *rest = name.split(".")
            block = f"blocks.{head}.layers.{layer}.{rest[-1]}"
            tensors[block if rest[0] == "linear" else f"lm_heads.{head}.weight"] = tensor
        inputs.head_weights.unlink()
        kept = {name: tensor for name, tensor in tensors.items() if keep(name)}
        save_file({**kept, **(more or {})}, inputs.heads / "model.safetensors")
        (inputs.heads / "config.json").write_text(json.dumps({"model_type": "medusa", **values}))

    return change


def empty_directory(inputs: Any) -> None:
    shutil.rmtree(inputs.heads)
    inputs.heads.mkdir()


def heads_config(new: str) -> Change:
    return lambda inputs: (inputs.heads / "config.json").write_text(new) and None


HEADS: dict[str, tuple[Change, str]] = {
    "no such directory": (flags(heads="absent"), "absent: got no such file or directory"),
    "empty directory": (empty_directory, "heads: got a directory without weights"),
    "config alone": (lambda inputs: inputs.head_weights.unlink(), "heads: got a directory without weights"),
    "FIFO in the directory": (
        lambda inputs: inputs.head_weights.unlink() or os.mkfifo(inputs.head_weights),
        "medusa_lm_head.safetensors: got a FIFO",
    ),
    "config is a FIFO": (
        lambda inputs: (inputs.heads / "config.json").unlink() or os.mkfifo(inputs.heads / "config.json"),
        "config.json: got a FIFO",
    ),
    "config is a list": (heads_config("[]"), "heads/config.json: got a JSON list"),
    "config is no JSON": (heads_config("{"), "heads/config.json: got unreadable JSON"),
    "no heads named": (flags(heads=None), "got no Medusa heads in it"),
    "base model for heads": (lambda inputs: {"heads": inputs.model}, "no Medusa heads in 21 tensors"),
    "block of another width": (put("0.0.linear.weight", torch.ones(32, 32)), "0.0.linear.weight: got shape [32, 32]"),
    "bias of another width": (put("1.0.linear.bias", torch.ones(65)), "1.0.linear.bias: got shape [65]; expected [64]"),
    "another vocabulary": (put("2.1.weight", torch.ones(96, 64)), "2.1.weight: got shape [96, 64]; expected [97, 64]"),
    "transposed lm_head": (put("0.1.weight", torch.ones(64, 97)), "0.1.weight: got shape [64, 97]; expected [97, 64]"),
    "missing block": (drop("1.0.linear.weight"), "medusa_heads.1.0.linear.weight: got no such tensor"),
    "missing head": (drop("1.0.linear.weight", "1.0.linear.bias", "1.1.weight"), "medusa_heads.1.0.linear.weight: got"),
    "missing lm_head": (drop("1.1.weight"), "medusa_heads.1.1.weight: got no such tensor"),
    "missing bias": (drop("1.0.linear.bias"), "medusa_heads.1.0.linear.bias: got no such tensor"),
    "missing layer": (put("0.1.linear.weight", torch.ones(64, 64)), "got no such tensor; expected 3 heads of 2 layers"),
    "numbering from 1": (renamed("0.0.", "3.0."), "medusa_heads.0.0.linear.weight: got no such tensor"),
    "head 10**9 - 1": (put("999999999.0.linear.weight", torch.ones(64, 64)), "medusa_heads.3.0.linear.weight: got no"),
    "number of 5000 digits": (put("9" * 5000 + ".0.linear.weight", torch.ones(1)), "a tensor that no known layout has"),
    "head 007": (put("007.0.linear.weight", torch.ones(64, 64)), "007.0.linear.weight: got a tensor that no known"),
    "Arabic digits": (put("\u0663.0.linear.weight", torch.ones(64, 64)), "a tensor that no known layout has"),
    "two names for a tensor": (put("heads.0.0.linear.weight", torch.ones(64, 64)), "got the same tensor as"),
    "lm_head beside the heads": (put("lm_head.weight", torch.ones(97, 64)), "lm_head.weight: got one lm_head beside"),
    "something else": (put("fc.weight", torch.ones(4)), "fc.weight: got a tensor that no known layout has"),
    "NaN in a block": (poison("0.0.linear.weight", float("nan")), "0.0.linear.weight: got NaN or infinite values"),
    "NaN in a bias": (poison("2.0.linear.bias", float("nan")), "2.0.linear.bias: got NaN or infinite values"),
    "infinity in an lm_head": (poison("1.1.weight", float("-inf")), "1.1.weight: got NaN or infinite values"),
    "integers": (put("0.0.linear.weight", torch.ones(64, 64, dtype=torch.int8)), "0.0.linear.weight: got dtype int8"),
    "FP8": (put("0.1.weight", torch.ones(97, 64).to(torch.float8_e4m3fn)), "0.1.weight: got dtype float8_e4m3fn"),
    "quantized": (put("0.0.linear.weight_scale", torch.ones(1)), "weight_scale: got a tensor that no known layout has"),
    "vLLM's truncated vocabulary": (vllm(truncated_vocab_size=50), "a truncated vocabulary (truncated_vocab_size 50)"),
    "vLLM's token_map": (vllm(more={"token_map": torch.arange(50)}), "a truncated vocabulary (token_map)"),
    "vLLM's vocabulary as a text": (
        vllm(truncated_vocab_size="all"),
        "a truncated vocabulary (truncated_vocab_size all)",
    ),
    "vLLM without lm_heads": (vllm(keep=lambda name: "lm" not in name), "got no lm_heads"),
    "vLLM with one of three lm_heads": (
        vllm(keep=lambda name: "heads.1" not in name),
        "medusa_heads.1.1.weight: got no",
    ),
    "EAGLE": (
        heads(lambda tensors: {"fc.weight": torch.ones(64, 128)}),
        "fc.weight: got a tensor that no known layout",
    ),
}


def tree(body: object) -> Change:
    """--tree with a file: text, bytes, or anything as JSON."""

    def change(inputs: Any) -> dict[str, object]:
        file = inputs.root / "tree.json"
        raw = body if isinstance(body, (str, bytes)) else json.dumps(body)
        file.write_bytes(raw.encode() if isinstance(raw, str) else raw)
        return {"tree": file}

    return change


def fifo(flag: str, **more: object) -> Change:
    def change(inputs: Any) -> dict[str, object]:
        os.mkfifo(inputs.root / "fifo")
        return {flag: inputs.root / "fifo", **more}

    return change


EVERY_PATH = [[*path] for path in ([a, b, c] for a in range(16) for b in range(16) for c in range(16))]
WIDE = [[a] for a in range(16)] + [[a, b] for a in range(16) for b in range(16)] + EVERY_PATH

TREES: dict[str, tuple[Change, str]] = {
    "no such tree": (flags(tree="oak"), "tree oak: got no such file or preset"),
    "choices on the command line": (flags(tree=str(EVERY_PATH)), "got a path that cannot be read (File name too long)"),
    "tree is a directory": (lambda inputs: {"tree": inputs.root}, "got a directory; expected a JSON file"),
    "tree is a FIFO": (fifo("tree"), "got a FIFO; expected a JSON file"),
    "empty file": (tree(""), "tree.json: got unreadable JSON"),
    "no JSON": (tree("[[0],"), "tree.json: got unreadable JSON"),
    "not UTF-8": (tree(b"[[0], \xff]"), "tree.json: got unreadable JSON"),
    "deep JSON": (tree("[" * 100_000), "tree.json: got unreadable JSON"),
    "number of 5000 digits": (tree(f"[[{'9' * 5000}]]"), "tree.json: got unreadable JSON"),
    "a text": (tree('"medusa-63"'), "tree.json: got a JSON text"),
    "another object": (tree({"choices": [[0]]}), "tree.json: got no medusa_choices"),
    "no choices": (tree([]), "--tree: got an empty tree"),
    "empty choice": (tree([[]]), "tree choice []: got no list of integers"),
    "choices are numbers": (tree([0, 1]), "tree choice 0: got no list of integers"),
    "texts for numbers": (tree([["0"]]), "tree choice ['0']: got no list of integers"),
    "floats for numbers": (tree([[0.0]]), "tree choice [0.0]: got no list of integers"),
    "true for a number": (tree([[True]]), "tree choice [True]: got no list of integers"),
    "choice of a million letters": (tree(["x" * 10**6]), "got no list of integers"),
    "the same twice": (tree([[0], [1], [0]]), "tree choice [0]: got the same path twice"),
    "no parent": (tree([[0], [1, 0]]), "tree choice [1, 0]: got no parent [1]"),
    "negative": (tree([[-1]]), "tree choice [-1]: got top-k index -1"),
    "top-k of 16": (tree([[16]]), "tree choice [16]: got top-k index 16"),
    "deeper than the heads": (
        tree([[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]),
        "got a path of depth 4; expected at most 3",
    ),
    "too deep for anything": (tree([[0] * depth for depth in range(1, 40)]), "got depth 17; expected at most 16"),
    "a path of a million levels": (tree([[0] * 10**6]), "got depth 1000000; expected at most 16"),
    "too many nodes": (tree(WIDE), "tree: got 4368 choices; expected at most 1024"),
}


def prompts(*lines: object) -> Change:
    """--calib with a file of such lines: bytes, text, or anything as JSON."""

    def change(inputs: Any) -> dict[str, object]:
        raw = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
        parts = [line.encode() if isinstance(line, str) else line for line in raw]
        (inputs.root / "calib.jsonl").write_bytes(b"\n".join(parts))
        return {"calib": inputs.root / "calib.jsonl"}

    return change


ASK = {"role": "user", "content": "w1"}

PROMPTS: dict[str, tuple[Change, str]] = {
    "no such file": (flags(calib="absent.jsonl"), "absent.jsonl: got no readable file"),
    "a directory": (lambda inputs: {"calib": inputs.root}, "got no readable file (a directory)"),
    "a FIFO": (fifo("calib"), "got no readable file (a FIFO)"),
    "a device": (flags(calib="/dev/zero"), "/dev/zero: got no readable file (a device)"),
    "a name that is too long": (flags(calib="c" * 5000), "got no readable file"),
    "empty file": (prompts(), "calib.jsonl: got no prompts"),
    "empty lines": (prompts("", "  ", ""), "calib.jsonl: got no prompts"),
    "one JSON list": (prompts([{"prompt": "w1"}]), "calib.jsonl:1: got a JSON list"),
    "pretty JSON": (prompts("{", '  "prompt": "w1"', "}"), "calib.jsonl:1: got no JSON"),
    "plain text": (prompts("w1 w2"), "calib.jsonl:1: got no JSON"),
    "not UTF-8": (prompts({"prompt": "w1"}, b'{"prompt": "\xff\xfe"}'), "calib.jsonl:2: got bytes that are not UTF-8"),
    "binary": (prompts(bytes(range(256))), "calib.jsonl:1: got no JSON"),
    "deep JSON": (prompts('{"prompt": ' + "[" * 100_000), "calib.jsonl:1: got no JSON"),
    "number of 5000 digits": (prompts('{"id": ' + "9" * 5000 + "}"), "calib.jsonl:1: got no JSON"),
    "other keys": (
        prompts({"prompt": "w1"}, {"question": "w1", "answer": "w2"}),
        "calib.jsonl:2: got the keys answer,",
    ),
    "prompt is a number": (prompts({"prompt": 5}), "calib.jsonl:1: got the message"),
    "prompt is empty": (prompts({"prompt": " "}), "calib.jsonl:1: got nothing that a user asks"),
    "no turns": (prompts({"turns": []}), "calib.jsonl:1: got"),
    "messages are a text": (prompts({"messages": "w1"}), "calib.jsonl:1: got text for a list"),
    "unknown role": (prompts({"messages": [{**ASK, "role": "tool"}]}), "expected a role of system, user, assistant"),
    "the user says nothing": (
        prompts({"messages": [{"role": "assistant", "content": "w1"}]}),
        "nothing that a user asks",
    ),
    "half of a surrogate pair": (prompts('{"prompt": "\\ud800"}'), "calib.jsonl:1: got"),
}


def template(body: str) -> Change:
    def change(inputs: Any) -> dict[str, object]:
        (inputs.model / "chat_template.jinja").write_text(body)
        return {"engine": "onnxruntime"}

    return change


def tokenizer_config(**values: object) -> Change:
    def change(inputs: Any) -> None:
        file = inputs.model / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def own_code(inputs: Any) -> dict[str, str]:
    """A module of the checkpoint's own that leaves a mark when it is imported. Returns ``auto_map``."""
    mark = f"open({str(inputs.root / 'owned')!r}, 'w')\n"
    names = ("Config", "Model", "Tokenizer")
    (inputs.model / "own.py").write_text(mark + "".join(f"class {name}: pass\n" for name in names))
    return {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": "own.Tokenizer"}


def own_model(inputs: Any) -> None:
    inputs.set_config(model_type="own", auto_map=own_code(inputs))


def own_tokenizer(inputs: Any) -> None:
    places = {"AutoTokenizer": [own_code(inputs)["AutoTokenizer"], None]}
    tokenizer_config(tokenizer_class="Tokenizer", auto_map=places)(inputs)


TOKENIZERS: dict[str, tuple[Change, str]] = {
    "no tokenizer": (instead("tokenizer.json", lambda path: None), "model: got no tokenizer"),
    "empty tokenizer": (text("tokenizer.json", ""), "model: got an unreadable tokenizer"),
    "tokenizer is no JSON": (text("tokenizer.json", "{"), "model: got an unreadable tokenizer"),
    "tokenizer is an empty object": (text("tokenizer.json", "{}"), "model: got an unreadable tokenizer"),
    "tokenizer is a list": (text("tokenizer.json", "[]"), "model: got an unreadable tokenizer"),
    "tokenizer is binary": (text("tokenizer.json", bytes(range(256))), "model: got an unreadable tokenizer"),
    "tokenizer is deep": (text("tokenizer.json", "[" * 100_000), "model: got an unreadable tokenizer"),
    "tokenizer is a directory": (instead("tokenizer.json", Path.mkdir), "model: got no tokenizer"),
    "tokenizer is a FIFO": (instead("tokenizer.json", os.mkfifo), "tokenizer.json: got a FIFO"),
    "settings are a FIFO": (instead("tokenizer_config.json", os.mkfifo), "tokenizer_config.json: got a FIFO"),
    "settings are a list": (text("tokenizer_config.json", "[]"), "model: got an unreadable tokenizer"),
    "settings are no JSON": (text("tokenizer_config.json", "{"), "model: got an unreadable tokenizer"),
    "template is a FIFO": (instead("chat_template.jinja", os.mkfifo), "chat_template.jinja: got a FIFO"),
    "no template": (
        lambda inputs: (inputs.model / "chat_template.jinja").unlink() or {"engine": "onnxruntime"},
        "model: got no chat template",
    ),
    "template with a syntax error": (template("{% if %}"), "chat template: got a refusal"),
    "template that refuses": (template("{{ raise_exception('no user') }}"), "a refusal (no user)"),
    "template that divides by 0": (template("{{ 1 / 0 }}"), "chat template: got a refusal (division by zero)"),
    "template of a wrong type": (template("{{ messages + 1 }}"), "chat template: got a refusal"),
    "template with a large range": (
        template("{% for i in range(10 ** 12) %}{% endfor %}"),
        "chat template: got a refusal",
    ),
    "template that leaves the sandbox": (
        template("{{ messages.__class__.__base__.__subclasses__() }}"),
        "chat template: got a refusal",
    ),
    "a model's own code": (own_model, "model_type 'own'"),
    "a tokenizer's own code": (own_tokenizer, "model: got an unreadable tokenizer"),
}

ALL = {"config": CONFIGS, "heads": HEADS, "tree": TREES, "prompts": PROMPTS, "tokenizer": TOKENIZERS}


@pytest.mark.timeout(60, method="thread")  # a FIFO that is opened waits forever
@pytest.mark.parametrize(
    ("change", "message"),
    [pytest.param(*case, id=f"{kind}: {name}") for kind, table in ALL.items() for name, case in table.items()],
)
def test_refused(change: Change, message: str, inputs: Any, refused: Any) -> None:
    assert message in refused(**(change(inputs) or {}))


@pytest.mark.parametrize("name", ["a billion layers", "huge vocab_size"])
def test_refused_in_little_memory(name: str, inputs: Any, refused: Any) -> None:
    change, message = CONFIGS[name]
    change(inputs)
    assert message in refused.alone()
