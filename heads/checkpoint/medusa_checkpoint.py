"""A base model and its Medusa heads as one lazy source of tensors with canonical names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medusa_export.core.errors import CheckpointError
from medusa_export.core.hub import HEAD_FILES
from medusa_export.heads.checkpoint import families
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig, refuse_adapter
from medusa_export.heads.checkpoint.head_layouts import HeadWeights, holds_heads, open_heads
from medusa_export.heads.checkpoint.tensor_source import TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_ROWS = 4096


WRAPPER = "module."  # of torch's DistributedDataParallel
BARE = ("embed_tokens.", "layers.", "norm.")  # first parts of the base's names without "model."
FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class MedusaCheckpoint:
    """Base and heads, checked against config.json and each other; nothing but headers is kept in memory.

    Names are Hugging Face's for the base (see ``DecoderConfig.tensor_shapes``) and ``head_formats``' for the heads.
    Every indirection is resolved: a tied ``lm_head.weight`` reads the embedding, the lm_head of heads that have none
    reads the base's, and a bias that is not stored reads zeros.

    Attributes:
        warnings: what is odd but not wrong, one line each, for the user to see.
    """

    config: DecoderConfig
    base: TensorSource = field(repr=False)
    heads: HeadWeights = field(repr=False)
    warnings: tuple[str, ...]

    @classmethod
    def open(cls, ckpt: Path, heads: Path | None = None, *, check_values: bool = True) -> MedusaCheckpoint:
        """Open a base checkpoint's directory and the heads for it.

        Args:
            ckpt: Hugging Face directory of the base model.
            heads: directory or file of the heads; None looks for them in ``ckpt``.
            check_values: also check what takes reading weights: finite heads, and one lm_head where it is tied.

        Raises:
            ConfigError: config.json cannot be used.
            CheckpointError: weights that are missing, damaged or do not fit together; no heads.
        """
        config, base = _open_base(ckpt)
        base.require(config.tensor_shapes())
        _refuse_more_layers(base, config)
        if config.tie_word_embeddings and families.LM_HEAD in base:
            _refuse_two_lm_heads(base, config, check_values)
        found = open_heads(_heads_inside(ckpt, base) if heads is None else heads, config, check_values=check_values)
        warnings = [*_surplus(base, config), *found.warnings]
        if heads is not None and found.has_base and heads.resolve() != ckpt.resolve():
            warnings.append(f"{heads}: it holds a base model too; the one in {ckpt} is used")
        return cls(config, base, found, tuple(warnings))

    @classmethod
    def open_base(cls, ckpt: Path) -> MedusaCheckpoint:
        """Open a base checkpoint without heads, as if it had none: what conversations are generated with."""
        config, base = _open_base(ckpt)
        base.require(config.tensor_shapes())
        _refuse_more_layers(base, config)
        if config.tie_word_embeddings and families.LM_HEAD in base:
            _refuse_two_lm_heads(base, config, True)
        return cls(config, base, HeadWeights(base, 0, 0, "none", {}, ()), ())

    def announcing(self, before_read: Callable[[Path], None]) -> MedusaCheckpoint:
        """The same, but ``before_read`` is called with a file before matrices are read from it."""
        heads = replace(self.heads, source=replace(self.heads.source, before_read=before_read))
        return replace(self, base=replace(self.base, before_read=before_read), heads=heads)

    @property
    def num_medusa_heads(self) -> int:
        """Heads stored: how many tokens beyond the next one are drafted."""
        return self.heads.num_heads

    @property
    def num_medusa_layers(self) -> int:
        """Residual blocks of every head, before its lm_head."""
        return self.heads.num_layers

    @property
    def heads_share_lm_head(self) -> bool:
        """Whether all heads use the base model's lm_head."""
        return self.heads.shares_lm_head

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that was or may be read, each once: the configs and the weights."""
        configs = (file.parent / "config.json" for file in (*self.base.files[:1], *self.heads.source.files[:1]))
        present = (file for file in configs if file.is_file())
        return tuple(dict.fromkeys((*present, *self.base.files, *self.heads.source.files)))

    @property
    def names(self) -> tuple[str, ...]:
        """Every canonical name: the base model's with lm_head.weight last, then the heads'."""
        base = dict.fromkeys((*self.config.tensor_shapes(), families.LM_HEAD))
        return (*base, *self.heads.canonical_names())

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        if self._is_zero_bias(name):
            return (self.config.hidden_size,)
        source, stored = self._locate(name)
        return source.shape(stored)

    def dtype(self, name: str) -> str:
        """Dtype of one tensor, without reading it: "float16", "bfloat16", "float32" or "float64"."""
        source, stored = self._locate(_weight_of(name) if self._is_zero_bias(name) else name)
        return source.dtype(stored)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, backed by its file."""
        if self._is_zero_bias(name):
            return torch.zeros(self.shape(name), dtype=getattr(torch, self.dtype(name)))
        source, stored = self._locate(name)
        return source.read(stored)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start .. stop - 1`` of one tensor.  # [stop - start, ...]

        Args:
            name: canonical name of a tensor.
            start: first row.
            stop: behind the last row.
        """
        if self._is_zero_bias(name):
            return self.read(name)[start:stop]
        source, stored = self._locate(name)
        return source.read_rows(stored, start, stop)

    def read_columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns ``start .. stop - 1`` of one matrix, a strided view.  # [rows, stop - start]

        Args:
            name: canonical name of a matrix.
            start: first column.
            stop: behind the last column.
        """
        source, stored = self._locate(name)
        return source.read_columns(stored, start, stop)

    def _locate(self, name: str) -> tuple[TensorSource, str]:
        """Where a canonical name is stored."""
        if name in self.heads.names:
            return self.heads.source, self.heads.names[name]
        if name in self.heads.canonical_names():  # biases aside, only the lm_heads of heads can be absent
            name = families.LM_HEAD
        if name == families.LM_HEAD and self.config.tie_word_embeddings:
            name = families.EMBED_TOKENS
        return self.base, name

    def _is_zero_bias(self, name: str) -> bool:
        return name.endswith(".bias") and name in self.heads.canonical_names() and name not in self.heads.names


def load_reference(ckpt: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """transformers' own model from a local directory, in evaluation mode: what exports are compared with.

    Args:
        ckpt: Hugging Face directory.
        dtype: that weights are cast to.
        device: where they go.

    Raises:
        ConfigError: a PEFT adapter lies beside the weights.
        CheckpointError: transformers cannot load it, or would have filled in weights that are not stored.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    refuse_adapter(ckpt)
    transformers_logging.disable_progress_bar()  # the commands have their own
    auto: Any = AutoModelForCausalLM  # its annotation does not know output_loading_info
    try:
        model, report = auto.from_pretrained(
            ckpt,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=any(ckpt.glob("*.safetensors")),
            output_loading_info=True,
            **_key_mapping(ckpt),
        )
    except Exception as error:  # transformers raises whatever its parts do on values that they did not expect
        raise CheckpointError(
            str(ckpt), f"no loadable model ({error})", "a causal LM", "check the directory"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{ckpt}: {missing[0]}", f"{len(missing)} missing tensors", "all of them", "use the whole checkpoint"
        )
    loaded: PreTrainedModel = model.eval()
    torch.nn.Module.to(loaded, device)  # transformers' own annotation of it hides its argument
    return loaded


def _key_mapping(ckpt: Path) -> dict[str, dict[str, str]]:
    """What lets transformers load weights that were saved out of a wrapper."""
    wrapped = any(name.startswith(WRAPPER) for name in TensorSource.open(ckpt).names)
    return {"key_mapping": {rf"^(?:{re.escape(WRAPPER)})+": ""}} if wrapped else {}


def _open_base(ckpt: Path) -> tuple[DecoderConfig, TensorSource]:
    """The base's config and weights, under the names that transformers gives them.

    Where config.json has no dtype it is the weights', as in transformers.
    """
    config, base = DecoderConfig.from_dir(ckpt), TensorSource.open(ckpt)
    base = base.renamed({name: _canonical(name) for name in base.names})
    if config.tie_word_embeddings and families.EMBED_TOKENS not in base:
        base = base.renamed({families.LM_HEAD: families.EMBED_TOKENS})
    stored = base.dtype(families.EMBED_TOKENS) if families.EMBED_TOKENS in base else ""
    if config.raw.get("dtype") is None and config.raw.get("torch_dtype") is None and stored in FLOATS:
        config = replace(config, dtype=stored)
    return config, base


def _canonical(name: str) -> str:
    """Without what a wrapper puts before it, and with what a model saved without its lm_head lacks."""
    while name.startswith(WRAPPER):
        name = name.removeprefix(WRAPPER)
    return f"model.{name}" if name.startswith(BARE) else name


def _heads_inside(ckpt: Path, base: TensorSource) -> Path:
    """The heads of a checkpoint that brings its own: a file beside the weights, or tensors among them."""
    files = [ckpt / name for name in HEAD_FILES if lexists(ckpt / name)]
    combined = holds_heads(base.names)
    if files and combined:
        raise CheckpointError(
            str(ckpt), f"heads in the checkpoint and in {files[0].name}", "one of them", "pass --heads to say which"
        )
    if not files and not combined:
        raise CheckpointError(str(ckpt), "no Medusa heads in it", "heads", "pass --heads with their directory or file")
    return files[0] if files else ckpt


def _refuse_two_lm_heads(base: TensorSource, config: DecoderConfig, check_values: bool) -> None:
    """A tied model may store its lm_head too, but not another one: transformers 4 would ignore it, 5 would use it."""
    base.require({families.LM_HEAD: (config.vocab_size, config.hidden_size)})
    for start in range(0, config.vocab_size if check_values else 0, _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, config.vocab_size)
        if not torch.equal(*(base.read_rows(name, start, stop) for name in (families.EMBED_TOKENS, families.LM_HEAD))):
            raise CheckpointError(
                f"{base.path}: {families.LM_HEAD}",
                "another matrix than the embedding, with tie_word_embeddings true",
                "the same one",
                "set tie_word_embeddings to false to use it, or remove it from the weights",
            )


def _refuse_more_layers(base: TensorSource, config: DecoderConfig) -> None:
    """Other tensors without a place are pointed out; with layers left out it would be another model."""
    for name in base.names:
        number = re.match(r"model\.layers\.([0-9]{1,9})\.", name)
        if number and int(number[1]) >= config.num_hidden_layers:
            raise CheckpointError(
                f"{base.path}: {name}", f"layer {number[1]}",
                f"layers 0 .. {config.num_hidden_layers - 1}, as num_hidden_layers says", "correct config.json",
            )  # fmt: skip


def _surplus(base: TensorSource, config: DecoderConfig) -> list[str]:
    """A warning about tensors that config.json gives no place, for instance biases without attention_bias."""
    known = {*config.tensor_shapes(), families.LM_HEAD}
    surplus = [name for name in base.names if name.startswith("model.") and name not in known]
    unused = [name for name in surplus if not name.endswith("rotary_emb.inv_freq")]  # older transformers stored these
    return [f"{base.path}: {len(unused)} tensors are not used, the first one {unused[0]}"] if unused else []


def _weight_of(bias: str) -> str:
    return bias.removesuffix("bias") + "weight"
