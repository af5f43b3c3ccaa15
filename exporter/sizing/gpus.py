"""GPU memory of a TensorRT-LLM engine, rank by rank: what the layout decides, an estimate of the rest, and what fits.

Not counted: CUDA's context and libraries, NCCL's buffers, workspaces of kernels, the runtime's copies of logits.
Counted every time, although TensorRT may store it once: a tied embedding, and an lm_head that all heads share.
Source: TensorRT-LLM's "Memory Usage of TensorRT-LLM" (docs/source/reference/memory.md) and ``models/medusa``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from medusa_export.exporter.job.gpu_costs import unsupported_reason
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.plan.tensor_plan import TensorPlan
from medusa_export.heads.roofline import gpus
from medusa_export.heads.roofline.gpus import Gpu

FLOAT_BYTES, LOGIT_BYTES = 2, 4  # activations are 16 bit, logits float32 (config.json's logits_dtype)
KV_FRACTION = 0.9  # kv_cache_free_gpu_mem_fraction: the cache's part of what the engine leaves free
MAX_NUM_TOKENS = 8192  # of trtllm-build; it raises this to what a step of the whole batch needs
TOKENS_PER_BLOCK = 64  # of the paged cache in 0.17; later releases take 32, which rounds up less
GPUS = tuple(gpu for gpu in gpus.GPUS if gpu.data_centre)  # TensorRT-LLM's support matrix has no others
MAX_BATCH = 2048  # trtllm-build's default, and the largest batch that is looked for


@dataclass(frozen=True)
class RankMemory:
    """What the GPU of one rank holds, in bytes.

    Attributes:
        weights: of the engine.
        kv_token, kv_sequence, kv_batch: keys and values of one token, of one sequence of the context, and of the batch.
        activations, logits: estimates, see :func:`activation_bytes` and :func:`logits_bytes`.
    """

    weights: int
    kv_token: int
    kv_sequence: int
    kv_batch: int
    activations: int
    logits: int


@dataclass(frozen=True)
class Fit:
    """Whether ``tp`` GPUs of one kind run the engine.

    Attributes:
        memory: bytes of one GPU.
        cache_room: bytes that it has for keys and values, at the batch asked for; 0 where not even the weights fit.
        fits: the batch asked for does.
        largest_batch: of sequences of the context; 0 where none fits or the GPU cannot run the format.
        reason: why it cannot; empty where it can.
    """

    gpu: str
    sm: int
    memory: int
    cache_room: int
    fits: bool
    largest_batch: int
    reason: str


def built_bits(spec: ExportSpec, tensor: TensorPlan) -> int | None:
    """Bits of a weight's values where trtllm-build quantizes it; None where the engine takes it as it is in the file."""
    bits = spec.weight_format.trtllm.build_bits
    module, _, kind = tensor.name.rpartition(".")
    return bits if kind == "weight" and len(tensor.shape) == 2 and bits and not spec.is_excluded(module) else None


def engine_bytes(spec: ExportSpec, tensors: Iterable[TensorPlan]) -> int:
    """Weights of one rank in the engine: as in the file, or what trtllm-build makes of them and a 16-bit scale a row."""
    total = 0
    for tensor in tensors:
        bits = built_bits(spec, tensor)
        built = 0 if bits is None else math.prod(tensor.shape) * bits // 8 + FLOAT_BYTES * tensor.shape[0]
        total += built or tensor.nbytes
    return total


def kv_token_bytes(spec: ExportSpec) -> int:
    """Keys and values of one token on one rank, in bytes. Heads that several ranks hold count on each of them."""
    values = 2 * spec.config.num_hidden_layers * spec.local_kv_heads * spec.config.head_dim
    return values * spec.kv_cache.bytes


def kv_sequence_bytes(spec: ExportSpec, context: int) -> int:
    """Bytes of keys and values of a sequence of ``context`` tokens and the tree that is verified after them, in whole blocks."""
    blocks = -(-(context + spec.max_draft_len) // TOKENS_PER_BLOCK)
    return blocks * TOKENS_PER_BLOCK * kv_token_bytes(spec)


def activation_bytes(spec: ExportSpec, batch: int) -> int:
    """Estimate of TensorRT's activation memory: the widest point of one layer, as memory is reused between layers.

    ``2 bytes * tokens * (2 hidden + max(q + (q + 2 kv), 3 intermediate / tp))``: the residual stream and its norm beside
    either qkv and the attention's output, or fc, gate and their product;
    ``tokens = max(max_num_tokens, batch * (max_draft_len + 1))``.
    """
    config, tokens = spec.config, max(MAX_NUM_TOKENS, batch * (spec.max_draft_len + 1))
    attention = 2 * config.q_size // spec.tp + 2 * spec.local_kv_heads * config.head_dim
    mlp = 3 * config.intermediate_size // spec.tp
    return FLOAT_BYTES * tokens * (2 * config.hidden_size + max(attention, mlp))


def logits_bytes(spec: ExportSpec, batch: int) -> int:
    """Estimate: float32 logits, gathered from all ranks, and medusa_logits.

    ``4 bytes * (1 + heads) * batch * (max_draft_len + 1) * padded vocab``.
    """
    return LOGIT_BYTES * (1 + spec.num_medusa_heads) * batch * (spec.max_draft_len + 1) * spec.padded_vocab


def rank_memory(spec: ExportSpec, weights: int, *, batch: int, context: int) -> RankMemory:
    """One rank's needs for a batch of sequences of ``context`` tokens.

    Args:
        weights: bytes of the engine's weights on one rank.
    """
    sequence = kv_sequence_bytes(spec, context)
    return RankMemory(
        weights,
        kv_token_bytes(spec),
        sequence,
        batch * sequence,
        activation_bytes(spec, batch),
        logits_bytes(spec, batch),
    )


def fit(gpu: Gpu, spec: ExportSpec, weights: int, *, batch: int, context: int) -> Fit:
    """Whether a GPU runs one rank with that batch, and the largest batch with which it does.

    Args:
        gpu: its memory and architecture.
        spec: the layout.
        weights: bytes of a rank's engine.
        batch: sequences at once.
        context: tokens of each.
    """

    def room(size: int) -> int:
        return int(KV_FRACTION * (gpu.memory - weights - activation_bytes(spec, size) - logits_bytes(spec, size)))

    def lacks(size: int) -> bool:
        return size * kv_sequence_bytes(spec, context) > room(size)

    reason = why_unsupported(gpu, spec)
    largest = 0 if reason else bisect_left(range(1, MAX_BATCH + 1), True, key=lacks)  # needs only grow with the batch
    fits = not reason and not lacks(batch)
    return Fit(gpu.name, gpu.sm, gpu.memory, max(0, room(batch)), fits, largest, reason)


def why_unsupported(gpu: Gpu, spec: ExportSpec) -> str:
    """Why a GPU cannot run the formats, in a few words; empty where it can."""
    return unsupported_reason(gpu, spec.weight_format, spec.kv_cache)
