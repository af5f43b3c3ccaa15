"""Medusa heads in every layout seen in the wild, under one set of names; counted from the tensors, never from a config.

- "medusa-v1" (FasterDecoding): ``{h}.{l}.linear.weight``, ``.bias`` and the head's own lm_head, ``{h}.{L}.weight``
- "medusa-v2" (FasterDecoding since ``"version": "2"``, TGI): the same without lm_heads; the base model's is used
- "modelopt": v1 or v2 names after ``medusa_heads.``, in one checkpoint with the base model
- "vllm": ``blocks.{h}.layers.{l}.weight``, ``lm_heads.{h}.weight`` or one ``lm_head.weight`` for all

Canonical names are ModelOpt's, for ``h`` below num_heads and ``l`` below num_layers = L:
``medusa_heads.{h}.{l}.linear.weight``, ``medusa_heads.{h}.{l}.linear.bias``, ``medusa_heads.{h}.{L}.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from os.path import lexists
from pathlib import Path
from typing import Any, NamedTuple

import torch

from medusa_export.core.errors import CheckpointError
from medusa_export.core.hub import HEAD_FILES
from medusa_export.core.hub import WEIGHT_FILES as LAYOUTS
from medusa_export.core.json_fields import HUGGING_FACE, read_json
from medusa_export.core.regular_files import found_instead
from medusa_export.heads.checkpoint import families
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.tensor_source import TensorSource

BLOCK_WEIGHT = "medusa_heads.{}.{}.linear.weight"
BLOCK_BIAS = "medusa_heads.{}.{}.linear.bias"
HEAD_LM_HEAD = "medusa_heads.{}.{}.weight"

_PREFIXES = ("medusa_heads.", "medusa_head.", "heads.")
# As str() writes them: Python's \d and int() also take "007", other scripts' digits and more digits than any head needs.
_HEAD, _LAYER = (rf"(?P<{name}>0|[1-9][0-9]{{0,8}})" for name in ("head", "layer"))
_BLOCKS = tuple(
    re.compile(pattern + r"\.(?P<part>weight|bias)")
    for pattern in (rf"{_HEAD}\.{_LAYER}\.linear", rf"blocks\.{_HEAD}\.layers\.{_LAYER}")
)
_HEAD_LM_HEAD = re.compile(rf"{_HEAD}\.{_LAYER}\.weight")
_VLLM_LM_HEAD = re.compile(rf"lm_heads\.{_HEAD}\.weight")
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class HeadWeights:
    """Heads that fit a base model.

    Attributes:
        layout: "medusa-v1", "medusa-v2", "modelopt" or "vllm".
        names: canonical name -> name in ``source``. Biases that are not stored (they are zero) have no entry, nor have
            the lm_heads of heads that share the base model's.
        warnings: where a config.json beside the heads contradicts the tensors.
    """

    source: TensorSource
    num_heads: int
    num_layers: int
    layout: str
    names: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def has_base(self) -> bool:
        """Whether a base model is stored beside them."""
        return _has_base(self.source)

    @property
    def shares_lm_head(self) -> bool:
        """Whether the heads' logits come from the base model's lm_head."""
        return HEAD_LM_HEAD.format(0, self.num_layers) not in self.names

    def canonical_names(self) -> tuple[str, ...]:
        """Every canonical name of these heads, stored or not, head by head."""
        blocks = [(layer, template) for layer in range(self.num_layers) for template in (BLOCK_WEIGHT, BLOCK_BIAS)]
        templates = [*blocks, (self.num_layers, HEAD_LM_HEAD)]
        return tuple(template.format(head, layer) for head in range(self.num_heads) for layer, template in templates)


def open_heads(path: Path, config: DecoderConfig, *, check_values: bool = True) -> HeadWeights:
    """Open a heads directory or file, in any layout, and check it against the base model.

    Args:
        path: a directory with medusa_lm_head.* or with a checkpoint that holds heads, or one weights file.
        config: the base model's.
        check_values: read every head tensor once, one at a time, to see that it is finite; otherwise only headers are read.

    Raises:
        CheckpointError: no heads, an unknown or missing tensor, a shape that does not fit the base model, a dtype that
            is not floating point, a truncated vocabulary, or a value that is not finite.
    """
    source = TensorSource.open(_heads_file(path))
    config_file = source.files[0].parent / "config.json"
    raw = read_json(config_file, *HUGGING_FACE) if lexists(config_file) else {}
    _refuse_truncated_vocabulary(source, raw, config)
    keys = _parse(source)
    if raw.get("original_lm_head"):
        keys = _with_original_lm_head(keys)
    heads, layers = _check_numbering(source, keys)
    names = _canonical(keys, heads, layers)
    source.require({stored: _shape(name, config) for name, stored in names.items()})
    if check_values:
        _require_finite(source, names.values())
    found = HeadWeights(source, heads, layers, _layout(source, keys), names, ())
    return replace(found, warnings=tuple(_disagreements(config_file, raw, found)))


def holds_heads(names: Iterable[str]) -> bool:
    """Whether a base checkpoint's tensors include Medusa heads, as ModelOpt's combined form does."""
    return any(name.startswith(_PREFIXES) for name in names)


class _Key(NamedTuple):
    """What a stored tensor is: ``part`` is "weight" or "bias" of a block, "lm_head" of a head, or "shared_lm_head".

    ``layer`` is None where the stored name has none: vLLM's lm_heads.
    """

    part: str
    head: int = 0
    layer: int | None = None


def _heads_file(path: Path) -> Path:
    """The weights file of a directory, or the directory where its checkpoint has to be looked into."""
    if found_instead(path) != "a directory":
        return path
    name = next((name for name in (*HEAD_FILES, *LAYOUTS) if lexists(path / name)), None)
    if name is None:
        expected = f"one of {', '.join((*HEAD_FILES, *LAYOUTS))}"
        raise CheckpointError(str(path), "a directory without weights", expected, "check the path of the heads")
    return path / name


def _refuse_truncated_vocabulary(source: TensorSource, raw: Mapping[str, Any], config: DecoderConfig) -> None:
    """vLLM's heads may rank only frequent tokens; neither TensorRT-LLM nor the graphs here can map them back."""
    size = raw.get("truncated_vocab_size", config.vocab_size)
    mapped = next((name for name in source.names if name.split(".")[-1] == "token_map"), None)
    if mapped is not None or size not in (None, config.vocab_size):
        got = f"a truncated vocabulary ({mapped or f'truncated_vocab_size {size}'})"
        raise CheckpointError(str(source.path), got, f"all {config.vocab_size} tokens", "use heads with a full lm_head")


def _parse(source: TensorSource) -> dict[_Key, str]:
    """What every stored tensor is -> its name; the base model's tensors of a combined checkpoint are left out."""
    has_base = _has_base(source)
    keys: dict[_Key, str] = {}
    for name in source.names:
        if has_base and not name.startswith((*_PREFIXES, "blocks.", "lm_heads.")) and not name[:1].isdigit():
            continue
        key = _key(name)
        if key is None:
            raise _error(source, name, "a tensor that no known layout has", "Medusa heads alone, not quantized")
        if key in keys:
            raise _error(source, name, f"the same tensor as {keys[key]}", "one of them")
        keys[key] = name
    return keys


def _has_base(source: TensorSource) -> bool:
    return any(name.startswith("model.") for name in source.names)


def _key(name: str) -> _Key | None:
    """One stored name, its prefix aside, in any of the layouts; None when it is none of theirs."""
    bare = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
    for pattern in _BLOCKS:
        if match := pattern.fullmatch(bare):
            return _Key(match["part"], int(match["head"]), int(match["layer"]))
    if match := _HEAD_LM_HEAD.fullmatch(bare):
        return _Key("lm_head", int(match["head"]), int(match["layer"]))
    if match := _VLLM_LM_HEAD.fullmatch(bare):
        return _Key("lm_head", int(match["head"]))
    return _Key("shared_lm_head") if bare == families.LM_HEAD else None


def _is_vllm(keys: Mapping[_Key, str]) -> bool:
    return any("blocks." in name for name in keys.values())


def _with_original_lm_head(keys: dict[_Key, str]) -> dict[_Key, str]:
    """vLLM's ``original_lm_head``: lm_heads.0 stands for all heads where it is the only one."""
    only = [key for key in keys if key.part == "lm_head"]
    if only != [_Key("lm_head", 0)]:
        return keys
    return {_Key("shared_lm_head") if key == only[0] else key: name for key, name in keys.items()}


def _check_numbering(source: TensorSource, keys: Mapping[_Key, str]) -> tuple[int, int]:
    """Heads and layers per head, after checking that none is missing and none is left over."""
    blocks = [key for key in keys if key.part == "weight"]
    if not blocks:
        seen = ", ".join(source.names[:6])
        raise _error(
            source, "", f"no Medusa heads in {len(source.names)} tensors ({seen} ...)", "0.0.linear.weight ..."
        )
    heads = 1 + max(key.head for key in blocks)
    layers = 1 + max(key.layer or 0 for key in blocks)
    parts = {key.part for key in keys}
    if _is_vllm(keys) and not parts & {"lm_head", "shared_lm_head"}:
        raise _error(source, "", "no lm_heads", "lm_heads.0.weight ... or lm_head.weight beside blocks")
    if "shared_lm_head" in parts and ("lm_head" in parts or not _is_vllm(keys)):
        raise _error(source, keys[_Key("shared_lm_head")], "one lm_head beside Medusa heads", "vLLM's layout with it")
    expected = _numbered(parts, heads, layers, None if _is_vllm(keys) else layers)
    counted = set()
    for key in expected:
        if key not in keys:
            raise _error(source, _canonical_name(key, layers), "no such tensor", f"{heads} heads of {layers} layers")
        counted.add(key)
    for key, name in keys.items():
        if key not in counted:
            raise _error(source, name, "a tensor outside the numbering", f"{heads} heads of {layers} layers")
    return heads, layers


def _numbered(parts: set[str], heads: int, layers: int, lm_head_layer: int | None) -> Iterator[_Key]:
    """Every key of that many heads and layers, for the parts that are stored."""
    for head in range(heads):
        for part in ("weight", "bias"):
            if part in parts:
                yield from (_Key(part, head, layer) for layer in range(layers))
        if "lm_head" in parts:
            yield _Key("lm_head", head, lm_head_layer)
    if "shared_lm_head" in parts:
        yield _Key("shared_lm_head")


def _canonical_name(key: _Key, layers: int) -> str:
    forms = {"weight": BLOCK_WEIGHT, "bias": BLOCK_BIAS}
    return forms[key.part].format(key.head, key.layer) if key.part in forms else HEAD_LM_HEAD.format(key.head, layers)


def _canonical(keys: Mapping[_Key, str], heads: int, layers: int) -> dict[str, str]:
    """Canonical name -> stored name; a shared lm_head of vLLM's becomes every head's."""
    names = {_canonical_name(key, layers): name for key, name in keys.items() if key.part != "shared_lm_head"}
    shared = keys.get(_Key("shared_lm_head"))
    if shared is not None:
        names |= {HEAD_LM_HEAD.format(head, layers): shared for head in range(heads)}
    return names


def _layout(source: TensorSource, keys: Mapping[_Key, str]) -> str:
    if _is_vllm(keys):
        return "vllm"
    if _has_base(source):
        return "modelopt"
    return "medusa-v1" if any(key.part == "lm_head" for key in keys) else "medusa-v2"


def _shape(canonical: str, config: DecoderConfig) -> tuple[int, ...]:
    if canonical.endswith(".linear.weight"):
        return (config.hidden_size, config.hidden_size)
    return (config.hidden_size,) if canonical.endswith(".bias") else (config.vocab_size, config.hidden_size)


def _require_finite(source: TensorSource, stored: Iterable[str]) -> None:
    for name in dict.fromkeys(stored):
        tensor = source.read(name)
        if not all(bool(torch.isfinite(rows).all()) for rows in tensor.split(_CHUNK_ROWS)):
            raise _error(source, name, "NaN or infinite values", "finite weights")


def _disagreements(config_file: Path, raw: Mapping[str, Any], heads: HeadWeights) -> Iterator[str]:
    """A config.json that says otherwise is reported, and the tensors are believed."""
    said = raw["medusa"] if isinstance(raw.get("medusa"), dict) else raw
    is_vllm = raw.get("model_type") == "medusa"  # in a base model's config num_hidden_layers is something else
    for what, stored, names in (
        ("heads", heads.num_heads, ("medusa_num_heads", "num_medusa_heads", *(("num_heads",) if is_vllm else ()))),
        (
            "layers",
            heads.num_layers,
            ("medusa_num_layers", "num_medusa_layers", *(("num_hidden_layers",) if is_vllm else ())),
        ),
    ):
        for name in names:
            if said.get(name, stored) != stored:
                yield f"{config_file}: {name} is {said[name]}, but {stored} {what} are stored; using {stored}"
    if str(raw.get("version")) == "2" and not heads.shares_lm_head:
        yield f"{config_file}: version 2 heads have no lm_head of their own, but these do; using it"
    if raw.get("original_lm_head") and len({name for name in heads.names.values() if "lm_head" in name}) > 1:
        yield f"{config_file}: original_lm_head, but every head has an lm_head of its own; using those"
    if raw.get("medusa_fc_bias") is False and BLOCK_BIAS.format(0, 0) in heads.names:
        yield f"{config_file}: medusa_fc_bias is false, but biases are stored; using them"


def _error(source: TensorSource, name: str, got: str, expected: str) -> CheckpointError:
    where = f"{source.path}: {name}" if name else str(source.path)
    return CheckpointError(where, got, expected, "check that these are the heads of this base model")
