"""The base model's final hidden states over all answers, computed once and mapped: with a frozen base, heads need no more.

A row is a position ``t`` from which tokens of an answer are drafted: the token before it, and all of its own but the last.
Stored are the hidden state of ``t``, the token at ``t + 1`` and the number of the answer, so that head ``h``'s label, the token at
``t + 2 + h``, is the token of row ``+ 1 + h`` as long as that is in the same answer; and the base model's own distribution over that
token is what its lm_head makes of that row's hidden state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medusa_export.core.artifacts.manifest import check_free_space
from medusa_export.core.artifacts.staging import sync
from medusa_export.core.errors import ConfigError
from medusa_export.heads.training.dataset import Example, data_hash

SHARD_EXAMPLES = 64
BATCH_TOKENS = 2048
INDEX = "index.json"
NO_LABEL = -100

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Rows:
    """What heads are trained on; :attr:`hidden` is mapped from files, the rest is in memory.

    Attributes:
        hidden: bfloat16 [shards][rows, hidden_size].
        starts: first row of every shard, and the number of all rows.  # [shards + 1]
        tokens: the token after each row's position.  # int64 [N]
        answers: number of the answer that each row belongs to.  # int64 [N]
    """

    hidden: tuple[torch.Tensor, ...]
    starts: torch.Tensor
    tokens: torch.Tensor
    answers: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def labels(self, num_heads: int) -> torch.Tensor:
        """Every head's label, or NO_LABEL behind the end of an answer.  # int64 [N, num_heads]"""
        labels = torch.full((len(self), num_heads), NO_LABEL, dtype=torch.int64)
        for head in range(num_heads):
            ahead = head + 1
            same = self.answers[ahead:] == self.answers[:-ahead]
            labels[: len(same), head] = torch.where(same, self.tokens[ahead:], NO_LABEL)
        return labels

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Hidden states of some rows.  # int64 [R] -> float32 [R, hidden_size]"""
        out = torch.empty(len(rows), self.hidden[0].shape[1], dtype=torch.float32)
        shard = torch.searchsorted(self.starts, rows, right=True) - 1
        for index in shard.unique().tolist():
            chosen = (shard == index).nonzero()[:, 0]
            out[chosen] = self.hidden[index][rows[chosen] - self.starts[index]].float()
        return out


def cache_bytes(examples: Sequence[Example], hidden_size: int) -> int:
    """What a cache of these examples takes on the disk."""
    return sum(_count(example) for example in examples) * (2 * hidden_size + 16)


def build_cache(
    directory: Path,
    model: Callable[[], Any],
    examples: Sequence[Example],
    *,
    key: str,
    hidden_size: int,
    progress: Progress = lambda done, total: None,
) -> Rows:
    """Rows of all examples. Shards in ``directory`` are read and missing ones computed, so an interrupted run continues where it was.

    Args:
        directory: of the shards; made when missing. A shard's name is the hash of its examples: data that is appended keeps them.
        model: gives the base model in transformers; called only when a shard is missing.
        key: names the model's weights and the dtype that they are computed in.
        progress: called with (examples done, examples in all).

    Raises:
        ConfigError: a directory of another model, or states that are not finite.
        OutputError: not enough room on the disk.
    """
    _claim(directory, key)
    parts = [examples[start : start + SHARD_EXAMPLES] for start in range(0, len(examples), SHARD_EXAMPLES)]
    files = [directory / f"hidden-{data_hash(part)[:16]}.bf16" for part in parts]
    missing = [index for index, file in enumerate(files) if not file.exists()]
    if missing:
        check_free_space(directory, sum(cache_bytes(parts[index], hidden_size) for index in missing))
        decoder = model()
        for index in missing:
            progress(index * SHARD_EXAMPLES, len(examples))
            _write(files[index], compute_states(decoder, parts[index]))
    progress(len(examples), len(examples))
    return _open(files, parts, hidden_size)


def _open(files: Sequence[Path], parts: Sequence[Sequence[Example]], hidden_size: int) -> Rows:
    shards, starts, tokens, answers = [], [0], list[int](), list[int]()
    for path, part in zip(files, parts, strict=True):
        for example in part:
            for start, stop in _spans(example):
                answers += [answers[-1] + 1 if answers else 0] * (stop - start)
                tokens += example.input_ids[start:stop]
        rows = len(tokens) - starts[-1]
        if path.stat().st_size != rows * hidden_size * 2:
            got = f"{path.stat().st_size} bytes"
            raise ConfigError(str(path), got, f"{rows * hidden_size * 2}", "delete the cache and run again")
        mapped = torch.from_file(str(path), size=rows * hidden_size, dtype=torch.bfloat16) if rows else torch.empty(0)
        shards.append(mapped.view(rows, hidden_size))
        starts.append(len(tokens))
    return Rows(tuple(shards), torch.tensor(starts), torch.tensor(tokens), torch.tensor(answers))


def _spans(example: Example) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) token of every answer."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], example.answer_mask, [False]]).astype(np.int8)))
    yield from ((int(start), int(stop)) for start, stop in edges.reshape(-1, 2) if start > 0)


def _count(example: Example) -> int:
    return sum(stop - start for start, stop in _spans(example))


def compute_states(model: Any, part: Sequence[Example]) -> torch.Tensor:
    """Hidden states of one shard's rows, in the order of its examples.  # bfloat16 [rows, hidden_size]"""
    found: dict[int, torch.Tensor] = {}
    order = sorted(range(len(part)), key=lambda index: len(part[index].input_ids))
    while order:
        longest = len(part[order[-1]].input_ids)
        batch = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // longest)))]
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, index in enumerate(batch):
            ids[row, : len(part[index].input_ids)] = torch.tensor(part[index].input_ids)
        device = next(model.parameters()).device
        with torch.inference_mode():
            # No mask: causal attention does not look at the padding on the right.
            output = model.model(input_ids=ids.to(device), use_cache=False)
        states = output.last_hidden_state.to(torch.bfloat16).cpu()  # [B, S, D]
        for row, index in enumerate(batch):
            spans = [states[row, start - 1 : stop - 1] for start, stop in _spans(part[index])]
            found[index] = torch.cat(spans) if spans else states[row, :0]
    joined = torch.cat([found[index] for index in range(len(part))])
    if not bool(torch.isfinite(joined).all()):
        raise ConfigError("base model", "hidden states that are not finite", "finite ones", "try --dtype float32")
    return joined


def _write(path: Path, states: torch.Tensor) -> None:
    scratch = path.with_suffix(".partial")
    scratch.write_bytes(states.contiguous().view(torch.uint8).numpy().data)
    sync(scratch)
    scratch.rename(path)


def _claim(directory: Path, key: str) -> None:
    """Mark the directory with the key; shards of another model would train wrong heads."""
    directory.mkdir(parents=True, exist_ok=True)
    index = directory / INDEX
    if index.exists():
        found = json.loads(index.read_text(encoding="utf-8")).get("key")
        if found != key:
            raise ConfigError(
                str(directory), "a cache of another model or dtype", "this run's", "delete it or choose another"
            )
    elif any(directory.iterdir()):
        raise ConfigError(str(directory), "files that are no cache", "an empty directory", "choose another")
    else:
        index.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
