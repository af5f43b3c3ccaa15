"""One wrong value in config.json makes hundreds of tensors look wrong: values that the rank files show are compared first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medusa_export.heads.checkpoint.tensor_source import TensorSource

EMBEDDING, NORM, LM_HEAD = "transformer.vocab_embedding.weight", "transformer.ln_f.weight", "lm_head.weight"
NUMBERED = {  # key of config.json: pattern of the names that it counts
    "num_hidden_layers": re.compile(r"transformer\.layers\.(\d+)\."),
    "num_medusa_heads": re.compile(r"medusa_heads\.(\d+)\."),
    "num_medusa_layers": re.compile(r"medusa_heads\.\d+\.medusa_layers\.(\d+)\."),
}
MOST_RANKS = 64


def config_causes(config: Mapping[str, Any], files: Sequence[TensorSource]) -> list[str]:
    """Values of config.json that the files contradict, each once; empty where single tensors have to be looked at.

    Args:
        files: the rank files that there are.
    """
    return [f"{key} {config.get(key)!r} in config.json, but {but}" for key, but in _seen(config, files)] + [
        f"tp_size {config['mapping']['tp_size']} in config.json, but the ranks are of {tp}"
        for tp in _ranks(config, files)
    ]


def _seen(config: Mapping[str, Any], files: Sequence[TensorSource]) -> Iterator[tuple[str, str]]:
    if not files:
        return
    first = files[0]
    if NORM in first:
        dtypes = {file.dtype(NORM) for file in files if NORM in file}
        if len(dtypes) == 1 and dtypes <= {"float16", "bfloat16"} - {config["dtype"]}:
            yield "dtype", f"the ranks hold {dtypes.pop()}"
        if len(first.shape(NORM)) == 1 and first.shape(NORM)[0] != config["hidden_size"]:
            yield "hidden_size", f"the last norm has {first.shape(NORM)[0]} values"
    split = config.get("use_parallel_embedding", False)
    if EMBEDDING in first and not split and first.shape(EMBEDDING)[0] != config["vocab_size"]:
        yield "vocab_size", f"the embedding has {first.shape(EMBEDDING)[0]} rows"
    for key, pattern in NUMBERED.items():
        found = {int(match[1]) for name in first.names if (match := pattern.match(name))}
        if found and found == set(range(len(found))) and len(found) != config[key]:
            yield key, f"the ranks have {len(found)}"


def _ranks(config: Mapping[str, Any], files: Sequence[TensorSource]) -> list[int]:
    """How many ranks the vocabulary was split over, where that is clear and not what config.json says."""
    vocab, said = config["vocab_size"], config["mapping"]["tp_size"]
    rows = {file.shape(LM_HEAD)[0] for file in files if LM_HEAD in file and file.shape(LM_HEAD)}
    if len(rows) != 1 or any(EMBEDDING in file and file.shape(EMBEDDING)[0] != vocab for file in files):
        return []
    height = rows.pop()
    if height == -(-vocab // said):
        return []
    return [tp for tp in range(1, MOST_RANKS + 1) if height == -(-vocab // tp)][:1]
