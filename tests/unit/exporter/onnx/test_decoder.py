"""decoder.onnx and heads-{depth}.onnx against transformers and torch, in plain ONNX Runtime sessions without the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.onnx.decoder import require_supported, write_decoder
from medusa_export.exporter.onnx.linear import LinearWriter
from medusa_export.exporter.onnx.matrices import quantize_int8_blocks
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.trees.tree import Tree
from medusa_export.quantize.numerics import dequantize_fp8, fp8_scale, fused_scale, quantize_fp8

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
MAX_LENGTH = 64
PROMPT = [1, 40, 7, 7, 61, 12, 90, 3, 55, 28]
TREE = Tree.from_choices([[0], [1], [0, 0], [0, 1], [1, 0], [1, 0, 0]])
NODE_IDS = [5, 10, 20, 30, 31, 30, 40]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "head_dim": ("llama", {"head_dim": 32}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "tied qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "attention_bias": ("llama", {"attention_bias": True}),
    "mlp_bias": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "yarn rope": ("qwen2", {"rope_parameters": YARN}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "rope theta": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 200.0}}),
    "no groups": ("mistral", {"num_key_value_heads": 4}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "norm eps": ("llama", {"rms_norm_eps": 0.3}),
}
INT8_LOSS, FP8_LOSS = 0.05, 0.3  # root mean square of the logit error over that of the logits


class Decoder:
    """decoder.onnx behind the simplest loop there is: the caches go in and come out as arrays."""

    def __init__(self, session: Any, config: DecoderConfig) -> None:
        self.session = session
        shape = (1, config.num_key_value_heads, MAX_LENGTH, config.head_dim)
        names = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
        self.past = {f"past_key_values.{name}": np.zeros(shape, dtype=np.float32) for name in names}
        self.outputs = ["next_ids", "hidden_states", "logits", *(f"present.{name}" for name in names)]
        self.length = 0

    def run(self, ids: Sequence[int], tree: Tree | None = None) -> tuple[Any, Any, Any]:
        """next_ids [S], hidden [S, D] and logits [S, V] of new tokens: causal ones, or the nodes of a tree."""
        size, total = len(ids), self.length + len(ids)
        bias = np.zeros((1, 1, size, total), dtype=np.float32)
        if tree is not None:
            bias[..., self.length :] = np.where(tree.mask, 0, -1e30)
        depths = np.arange(size) if tree is None else tree.depths
        feeds = {
            "input_ids": np.array([ids]), "position_ids": (self.length + depths)[None], "attention_bias": bias,
            "seqlens_k": np.array([total - 1], dtype=np.int32), "total_sequence_length": np.array(total, dtype=np.int32),
            "output_rows": np.arange(size), **self.past,
        }  # fmt: skip
        next_ids, hidden, logits, *present = self.session.run(self.outputs, feeds)
        self.past, self.length = dict(zip(self.past, present, strict=True)), total
        return next_ids, hidden, logits


def reference_logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].numpy()  # [S, V]


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


@pytest.fixture
def decoder(
    make_case: Callable[..., Any], open_session: Callable[..., Any], tmp_path: Path
) -> Callable[..., tuple[Any, Decoder]]:
    """``decoder(family, form="float", *, activations, dtype, **config) -> (case, its decoder.onnx)``."""

    def make(
        family: str,
        form: str = "float",
        *,
        activations: torch.dtype | None = None,
        optimize: bool = True,
        **config: Any,
    ) -> tuple[Any, Decoder]:
        config = {"dtype": torch.float32, **({"head_dim": 32} if family == "qwen3" else {}), **config}
        case = make_case(family, **config)
        linear = LinearWriter(case.checkpoint, form, case.scales, activations=activations)
        write_decoder(tmp_path, case.checkpoint, linear, max_length=MAX_LENGTH)
        return case, Decoder(open_session(tmp_path / "decoder.onnx", optimize=optimize), case.checkpoint.config)

    return make


def check(case: Any, decoder: Decoder, tolerance: float = 1e-3) -> None:
    """Prefill, a single step and a tree step against transformers on every path."""
    model: Any = load_reference(case.model_dir, torch.float32)
    next_ids, hidden, logits = decoder.run(PROMPT[:-1])
    expected = reference_logits(model, PROMPT[:-1])
    np.testing.assert_allclose(logits, expected, atol=tolerance, rtol=0)
    assert next_ids.tolist() == logits.argmax(-1).tolist()
    with torch.no_grad():
        last_hidden = model.model(torch.tensor([PROMPT[:-1]])).last_hidden_state[0].numpy()
    np.testing.assert_allclose(hidden, last_hidden, atol=tolerance, rtol=0)
    _, _, logits = decoder.run(PROMPT[-1:])
    np.testing.assert_allclose(logits[0], reference_logits(model, PROMPT)[-1], atol=tolerance, rtol=0)
    _, _, logits = decoder.run(NODE_IDS, TREE)
    for path in TREE.retrieve_indices:
        nodes = path[path >= 0]
        alone = reference_logits(model, [*PROMPT, *(NODE_IDS[node] for node in nodes)])[len(PROMPT) :]
        np.testing.assert_allclose(logits[nodes], alone, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, decoder: Callable[..., Any]) -> None:
    check(*decoder(family))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, decoder: Callable[..., Any]) -> None:
    family, config = VARIANTS[variant]
    check(*decoder(family, **config))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_16_bit_checkpoints(family: str, dtype: torch.dtype, decoder: Callable[..., Any], tmp_path: Path) -> None:
    case, made = decoder(family, dtype=dtype)
    check(case, made)
    weights = (case.model_dir / "model.safetensors").stat().st_size
    assert (tmp_path / "decoder.onnx.data").stat().st_size < 1.5 * weights, "16-bit weights have to stay 16 bit"


def test_tied_embeddings_are_stored_once(decoder: Callable[..., Any], tmp_path: Path) -> None:
    import onnx

    decoder("llama", tie_word_embeddings=True)
    stored = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph.initializer
    assert [list(tensor.dims) for tensor in stored].count([97, 64]) == 1


def quantized_model(case: Any, quantize: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    """transformers' model with every linear of the layers replaced."""
    model: Any = load_reference(case.model_dir, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("proj.weight", "lm_head.weight")):
                parameter.copy_(quantize(name.removesuffix(".weight"), parameter))
    return model


def fp8_weight(case: Any) -> Callable[[str, torch.Tensor], torch.Tensor]:
    def quantize(module: str, weight: torch.Tensor) -> torch.Tensor:
        if module == "lm_head":
            return weight
        prefix, _, name = module.rpartition(".")
        fused = next(
            (group for group in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}) if name in group), {name}
        )
        scale = fused_scale(case.scales.weight_amax, [f"{prefix}.{each}" for each in fused])
        return dequantize_fp8(quantize_fp8(weight, scale), scale)

    return quantize


def int8_weight(name: str, weight: torch.Tensor) -> torch.Tensor:
    values, scales = quantize_int8_blocks(weight, name)
    groups = (values.float() - 128).reshape(*scales.shape, -1)
    return (groups * scales[..., None]).reshape(weight.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_weights(family: str, decoder: Callable[..., Any]) -> None:
    case, made = decoder(family, "fp8")
    _, _, logits = made.run(PROMPT)
    model = quantized_model(case, fp8_weight(case))
    np.testing.assert_allclose(logits, reference_logits(model, PROMPT), atol=1e-3, rtol=0)
    source = reference_logits(load_reference(case.model_dir, torch.float32), PROMPT)
    assert 0 < rms(logits - source) < FP8_LOSS * rms(source)


def test_fp8_activations(decoder: Callable[..., Any]) -> None:
    """Every linear's input is rounded with its calibrated scale; a near tie of the rounding may fall either way."""
    case, made = decoder("llama", "fp8", activations=torch.float8_e4m3fn, optimize=False)
    model = quantized_model(case, fp8_weight(case))
    without = reference_logits(model, PROMPT)
    amax = case.scales.input_amax
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            prefix, _, last = name.rpartition(".")
            fused = ["q_proj", "k_proj", "v_proj"] if last in ("q_proj", "k_proj", "v_proj") else [last]
            fused = ["gate_proj", "up_proj"] if last in ("gate_proj", "up_proj") else fused
            scale = fp8_scale(max(amax[f"{prefix}.{each}"] for each in fused))
            module.register_forward_pre_hook(
                lambda _, args, scale=scale: (dequantize_fp8(quantize_fp8(args[0], scale), scale),)
            )
    _, _, logits = made.run(PROMPT)
    expected = reference_logits(model, PROMPT)
    close, far = np.abs(logits - expected).mean(), np.abs(without - expected).mean()
    assert close < 0.05 * far, (close, far)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_weights(family: str, decoder: Callable[..., Any]) -> None:
    case, made = decoder(family, "int8", optimize=False)  # unfused: the weights' rounding alone
    _, _, logits = made.run(PROMPT)
    np.testing.assert_allclose(logits, reference_logits(quantized_model(case, int8_weight), PROMPT), atol=1e-3, rtol=0)
    source = reference_logits(load_reference(case.model_dir, torch.float32), PROMPT)
    assert 0 < rms(logits - source) < INT8_LOSS * rms(source)


def rounded(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Values of INT8 codes."""
    return (x / scale).round().clamp(-128, 127) * scale


def int8_model(case: Any) -> Any:
    """transformers' model with INT8 weights a row and INT8 inputs, smoothed, as TensorRT-LLM computes; and rows of the projection."""
    model: Any = load_reference(case.model_dir, torch.float32)
    scales = case.scales
    with torch.no_grad():
        for name, module in model.named_modules():
            if name == "lm_head":
                module.weight = torch.nn.Parameter(by_row(module.weight))
                module.register_forward_pre_hook(
                    lambda _, args: (rounded(args[0], args[0].abs().amax(-1, keepdim=True) / 127),)
                )
            elif name.endswith("_proj"):
                factor, (owner, _, last) = scales.pre_quant_scale[name], name.rpartition(".")
                module.weight = torch.nn.Parameter(by_row(module.weight * (1 / factor)))
                group = next((group for group in SAME_INPUT if last in group), (last,))
                amax = max(scales.input_amax[f"{owner}.{each}"] for each in group)
                module.register_forward_pre_hook(
                    lambda _, args, factor=factor, scale=amax / 127: (rounded(args[0] * factor, scale),)
                )
    return model


def by_row(weight: torch.Tensor) -> torch.Tensor:
    return rounded(weight, weight.abs().amax(1, keepdim=True) / 127)


SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused_operators(path: Path) -> list[str]:
    """What ONNX Runtime makes of a graph's operators."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.use_per_session_threads, options.log_severity_level = False, 3
    options.optimized_model_filepath = str(path.with_name("fused.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path.with_name("fused.onnx"), load_external_data=False).graph.node]


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"mlp_bias": True, "attention_bias": True}),
        ("llama", {"tie_word_embeddings": True, "dtype": torch.bfloat16}),
        ("qwen3", {"head_dim": 32}),
    ],
    ids=["biases", "bfloat16, tied", "qwen3"],
)
def test_int8_integers(family: str, config: dict[str, Any], decoder: Callable[..., Any], tmp_path: Path) -> None:
    """Folded smoothing and products of integers give the numbers of the arithmetic that they stand for."""
    case, made = decoder(family, "int8_row", activations=torch.int8, **config)
    products = [node for node in fused_operators(tmp_path / "decoder.onnx") if "MatMul" in node]
    assert products == ["MatMulIntegerToFloat"] * (4 * 2 + 1), "every product is one of integers"
    _, _, logits = made.run(PROMPT)
    expected = reference_logits(int8_model(case), PROMPT)
    close = np.abs(logits - expected).max(-1) < 1e-3 * np.abs(expected).max()
    assert close.mean() >= 0.7, "a rounding that falls the other way changes a row and those behind it"
    source = reference_logits(load_reference(case.model_dir, torch.float32), PROMPT)
    assert rms(logits - source) > 30 * rms((logits - expected)[close])


class TestRefusals:
    @pytest.mark.parametrize("length", [15, 129])
    def test_max_length(self, length: int, make_case: Callable[..., Any]) -> None:
        with pytest.raises(ConfigError, match=r"--max-length.*16 \.\. 128"):
            require_supported(make_case().checkpoint.config, length)

    def test_sliding_window(self, make_case: Callable[..., Any]) -> None:
        config = make_case("mistral", sliding_window=32).checkpoint.config
        require_supported(config, 32)
        with pytest.raises(ConfigError, match=r"sliding_window.*--max-length 32"):
            require_supported(config, 33)

    def test_head_dim(self, make_case: Callable[..., Any]) -> None:
        with pytest.raises(ConfigError, match=r"head_dim: got 24; expected a multiple of 16.*--engine none"):
            require_supported(make_case("qwen3").checkpoint.config, 64)

    @pytest.mark.parametrize("rope_type", ["longrope", "unheard-of"])
    def test_rope(self, rope_type: str) -> None:
        raw = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 97, "hidden_size": 64,
            "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 128,
            "rope_scaling": {"rope_type": rope_type, "factor": 2.0},
        }  # fmt: skip
        with pytest.raises(ConfigError, match="rope_scaling"):
            require_supported(DecoderConfig.from_dict(raw), 64)
