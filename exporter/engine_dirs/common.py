"""What every engine directory has, whichever backend runs it: engine.json, tree.json and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from medusa_export.core.text.model_tokens import ModelTokens
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.contract.engine_info import TREE_FILE, EngineInfo
from medusa_export.heads.trees.tree import Tree


def save_engine_files(
    out: Path,
    checkpoint: MedusaCheckpoint,
    tree: Tree,
    save_tokenizer: Callable[[Path], Any],
    tokens: ModelTokens | None,
    **own: Any,
) -> None:
    """Write them into ``out``.

    Args:
        tokens: None: the end tokens of config.json, and every row of the embedding is a token.
        own: the fields of :class:`~medusa_export.heads.contract.engine_info.EngineInfo` that do not follow from the checkpoint.
    """
    config = checkpoint.config
    EngineInfo(
        max_depth=checkpoint.num_medusa_heads,
        num_hidden_layers=config.num_hidden_layers,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids if tokens is None else tokens.ends,
        num_tokens=0 if tokens is None else tokens.count,
        **own,
    ).save(out)
    (out / TREE_FILE).write_text(tree.to_json(), encoding="utf-8")
    save_tokenizer(out)


Excluded = Callable[[str], bool]
MIN_TOP_K = 10  # so that other trees than the default one can be tried without a new export
