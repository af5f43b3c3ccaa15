"""The numbers of a model that a step's cost depends on, from config.json and the heads' headers: no weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from medusa_export.heads.checkpoint.decoder_config import DecoderConfig


@dataclass(frozen=True)
class Precision:
    """How a matrix is stored and multiplied.

    Attributes:
        bits: of a weight, its share of scales included.
        operations: which throughput of the GPU its products have, a key of :attr:`Gpu.operations`.
    """

    bits: float
    operations: str


HALF = Precision(16, "fp16")


@dataclass(frozen=True)
class ModelShape:
    """A decoder and its heads, as in config.json.

    Attributes:
        heads, head_layers: Medusa heads, and residual blocks of each. Each head reads a vocabulary projection of its own, as
            TensorRT-LLM stores one for each even where the checkpoint's heads share the base's.
        window: of sliding attention, in tokens; None attends to all.
    """

    layers: int
    hidden: int
    intermediate: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    heads: int
    head_layers: int
    window: int | None = None

    @classmethod
    def of(cls, config: DecoderConfig, heads: int, head_layers: int) -> ModelShape:
        """From a parsed config.json and the counts of the heads.

        Args:
            config: of the base model.
            heads: Medusa heads.
            head_layers: residual blocks of each.
        """
        return cls(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, config.vocab_size, heads, head_layers, config.sliding_window,
        )  # fmt: skip

    def layer_weights(self, tp: int) -> int:
        """Weights of one layer's linears on a rank; key/value heads that ranks share count on each of them."""
        query = math.ceil(self.attention_heads / tp) * self.head_dim
        attention = self.hidden * (2 * query + 2 * self.local_kv_heads(tp) * self.head_dim)
        return attention + 3 * self.hidden * math.ceil(self.intermediate / tp)

    def layer_activations(self, tp: int) -> int:
        """Values that a row reads and writes at the linears of one layer on a rank."""
        attention = 2 * self.query_width(tp) + self.kv_values(tp)
        return 4 * self.hidden + attention + 3 * math.ceil(self.intermediate / tp)

    def local_kv_heads(self, tp: int) -> int:
        """Key/value heads on a rank."""
        return math.ceil(self.kv_heads / tp)

    def kv_values(self, tp: int) -> int:
        """Keys and values of one token in one layer on a rank."""
        return 2 * self.local_kv_heads(tp) * self.head_dim

    def query_width(self, tp: int) -> int:
        """Width of the query on a rank."""
        return math.ceil(self.attention_heads / tp) * self.head_dim

    def projection_weights(self, tp: int) -> int:
        """Of one vocabulary projection on a rank."""
        return math.ceil(self.vocab / tp) * self.hidden

    def block_weights(self, tp: int) -> int:
        """Of one residual block of one head on a rank."""
        return math.ceil(self.hidden / tp) * self.hidden

    def resident_bytes(self, tp: int, weights: Precision, heads: Precision) -> float:
        """What a rank's GPU holds at least: layers, the embedding, all vocabulary projections and the heads.

        Args:
            tp: tensor-parallel ranks.
            weights: of the base's linears.
            heads: of the heads' linears and vocabulary projections.
        """
        layers = self.layers * self.layer_weights(tp) * weights.bits
        projections = (self.projection_weights(tp) + self.vocab * self.hidden) * HALF.bits
        each = self.projection_weights(tp) + self.head_layers * self.block_weights(tp)
        return (layers + projections + self.heads * each * heads.bits) / 8
