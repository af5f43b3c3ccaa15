"""The operators of the portable graphs in PyTorch, as ONNX defines them (onnx.ai/onnx/operators, opset 24)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Operator = Callable[..., Any]
FP8_MAX, INT8_MAX = 448.0, 127.0


class Shared:
    """What several nodes of one run need and none is given: made once a run."""

    def __init__(self) -> None:
        # What a key names by id stays alive beside the result, so that no other tensor gets the same id.
        self._memo: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def clear(self) -> None:
        """Forget the run before."""
        self._memo.clear()

    def rows(self, size: int, past_length: torch.Tensor) -> torch.Tensor:
        """past_length .. past_length + size - 1.  # int64 [size]"""
        import torch

        key = ("rows", size, id(past_length))
        if key not in self._memo:
            self._memo[key] = past_length, torch.arange(size, device=past_length.device) + past_length
        return self._memo[key][1]

    def bias(self, visible: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """0 where something is visible, else -inf, for query heads that share a key head.  # [1, 1, groups * S, T]

        Args:
            visible: which keys a row sees.  # bool [1, 1, S, T]
            groups: query heads that share a key head.
            dtype: of the bias.
        """
        import torch

        key = ("bias", id(visible), groups)
        if key not in self._memo:
            _, _, size, length = visible.shape
            bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
            self._memo[key] = visible, bias.expand(groups, 1, size, length).reshape(1, 1, groups * size, length)
        return self._memo[key][1]


def operators(shared: Shared) -> dict[str, Operator]:
    """By name; each takes tensors (ints where the graph has constants of them) and the node's attributes."""
    import torch
    from torch.nn import functional

    def gather(x: torch.Tensor, index: torch.Tensor, *, axis: int = 0) -> torch.Tensor:
        picked = x.index_select(axis, index.reshape(-1))
        return picked.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])

    def reshape(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)])

    def split(x: torch.Tensor, sizes: list[int], *, axis: int = 0) -> tuple[torch.Tensor, ...]:
        return x.split(sizes, dim=axis)

    def gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, transB: int) -> torch.Tensor:  # noqa: N803
        return functional.linear(x, weight if transB else weight.T, bias)

    def norm(x: torch.Tensor, weight: torch.Tensor, *, axis: int, epsilon: float, stash_type: int) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[axis:], weight, epsilon)

    def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)  # [1, n, S, head_dim / 2]; cos and sin are [1, S, head_dim / 2]
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

    def scatter(
        past: torch.Tensor, rows: torch.Tensor, at: torch.Tensor, *, axis: int, mode: bytes = b""
    ) -> torch.Tensor:
        return past.index_copy_(axis, shared.rows(rows.shape[axis], at), rows)

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, *, scale: float, is_causal: int
    ) -> torch.Tensor:  # fmt: skip
        _, heads, size, width = query.shape
        groups = heads // key.shape[1]
        bias = shared.bias(visible, groups, query.dtype)
        query = query.reshape(1, key.shape[1], groups * size, width)  # keys are read once for all heads that share them
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        return out.reshape(1, heads, size, width)

    def top_k(x: torch.Tensor, count: list[int], *, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = x.topk(count[0], dim=axis)
        return values, indices

    def concat(*parts: torch.Tensor, axis: int) -> torch.Tensor:
        return torch.cat(parts, dim=axis)

    return {
        "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "MatMul": torch.matmul, "Sigmoid": torch.sigmoid,
        "Max": torch.maximum, "Min": torch.minimum, "Less": torch.lt, "And": torch.logical_and, "Or": torch.logical_or,
        "Identity": lambda x: x, "Concat": concat, "Gather": gather, "Reshape": reshape, "Split": split, "Gemm": gemm,
        "Transpose": lambda x, perm: x.permute(perm), "Cast": lambda x, to: x.to(to), "TopK": top_k,
        "ArgMax": lambda x, axis, keepdims: x.argmax(axis), "RMSNormalization": norm, "RotaryEmbedding": rotary,
        "TensorScatter": scatter, "Attention": attention, "QuantizeLinear": quantize, "DequantizeLinear": dequantize,
        "ScaledMatMul": scaled_matmul,
    }  # fmt: skip


def quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Codes of ``zero``'s dtype under one scale; the arithmetic is float32, as in ONNX Runtime.

    Args:
        x: floats of any shape.
        scale: a scalar.
        zero: a scalar whose dtype is that of the codes.
    """
    import torch

    codes = x.float() / scale.float()
    if zero.dtype == torch.int8:
        codes = codes.round()
        return codes.clamp(-INT8_MAX - 1, INT8_MAX).to(torch.int8)
    return codes.clamp(-FP8_MAX, FP8_MAX).to(zero.dtype)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None, *, axis: int = 1, block_size: int = 0
) -> torch.Tensor:
    """Codes times scales: one, one a slice of ``axis``, or one a block along it; in the scales' dtype.

    Args:
        codes: int8 or FP8.
        scale: a scalar, one a slice of ``axis``, or one a block along it.
        zero: has to be 0; QuantizeLinear's third input.
        axis: what scales are along.
        block_size: codes under a scale along ``axis``; 0: no blocks.
    """
    factor = scale.float()
    if block_size:
        factor = factor.repeat_interleave(block_size, dim=axis)
    elif factor.ndim == 1:
        factor = factor.reshape([-1 if dim == axis % codes.ndim else 1 for dim in range(codes.ndim)])
    return (codes.float() * factor).to(scale.dtype)


def scaled_matmul(
    x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor, *, dtype: torch.dtype
) -> torch.Tensor:
    """The product of FP8 codes by the device's own FP8 kernel, with float32 sums.  # [..., K], [K, N] -> [..., N]

    Args:
        x, weight: FP8 codes.
        x_scale, weight_scale: scalars.
        dtype: of the result.
    """
    import torch

    product = torch._scaled_mm(  # the weight's columns lie together
        x.reshape(-1, x.shape[-1]), weight, scale_a=x_scale, scale_b=weight_scale, out_dtype=dtype
    )
    return product.reshape(*x.shape[:-1], -1)
