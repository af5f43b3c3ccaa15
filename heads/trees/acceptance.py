"""What heads get right, counted: ranks of true tokens, and from them accuracies, paths and tokens per step. Needs no torch.

``acceptance.json`` is written by medusa-train (on held-out answers) and by medusa-tree (on an engine), and read by the tree search.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.core.artifacts.output_file import write_output
from medusa_export.core.errors import ConfigError
from medusa_export.core.intervals import bootstrap
from medusa_export.core.json_fields import odd_value, read_json, whole
from medusa_export.heads.trees.search import Candidate, grow
from medusa_export.heads.trees.tree import MAX_DEPTH, MAX_TOP_K, Choice, Tree

ACCEPTANCE_FILE = "acceptance.json"
TOP_K = 10
ABSENT = TOP_K  # the rank of a token that is not among the first TOP_K, and of what is behind the end of an answer
UNKNOWN = -1  # where there is no true token
TREE_NODES = 8  # draft nodes of the tree that tokens per step are reported for

Ranks = npt.NDArray[np.int64]  # [positions, heads]


@dataclass(frozen=True)
class Answer:
    """A prompt's answer as the heads saw it.

    Attributes:
        ranks: a row for every token of the answer, its last one too: the rank of the token ``h + 1`` later in head h.  # [T, H]
        lookup: tokens that prompt lookup would get right behind each; None where it was not counted.  # [T]
    """

    prompt: str
    category: str
    ranks: Ranks
    lookup: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Acceptance:
    """What the tree search needs of an ``acceptance.json``.

    Attributes:
        positions: how many were counted.
        paths: how often the true continuation is this path of ranks.
        answers: each answer's ranks, where the file has them.
    """

    positions: int
    paths: Mapping[Choice, int]
    answers: tuple[Answer, ...] = ()

    @classmethod
    def from_answers(cls, answers: Sequence[Answer]) -> Acceptance:
        """Count answers."""
        ranks = np.concatenate([answer.ranks for answer in answers])
        return cls(_positions(ranks), path_counts(ranks), tuple(answers))

    @classmethod
    def load(cls, path: Path) -> Acceptance:
        """Read a file.

        Raises:
            ConfigError: no acceptance.json.
        """
        expected = "positions and paths with choice and count, as medusa-tree calibrate writes them"
        body = read_json(path, expected, "calibrate again")
        try:
            paths = dict(map(_path, body["paths"]))
            answers = tuple(map(_answer, body.get("answers", ())))
            if len({answer.ranks.shape[1] for answer in answers}) > 1:
                raise ValueError("answers of different numbers of heads")
            positions = whole(body, "positions")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(str(path), odd_value(error), expected, "calibrate again") from error
        if not positions:
            action = "calibrate again, on prompts that are answered at more length"
            raise ConfigError(str(path), "0 positions", "answers of two tokens and more, which are counted", action)
        most = max(paths.values(), default=0)
        if most > positions:
            got = f"a path seen {most} times at {positions} positions"
            raise ConfigError(str(path), got, "no path more often than positions", "calibrate again")
        return cls(positions, paths, answers)

    def walk(self, tree: Tree) -> tuple[float, tuple[float, float]] | None:
        """Tokens per step with a tree on the counted answers, and its interval over prompts; None without answers."""
        return _yield(_walk(_accepted(tree, answer.ranks)) for answer in self.answers)

    def speedup_interval(self, candidate: Candidate) -> tuple[float, float] | None:
        """What a tree's speed-up may be: tokens per step at the ends of their interval, over its cost at the ends of its own.

        Where both are uncertain, the worst of both and the best of both. None where neither's uncertainty is known.
        """
        walk = self.walk(candidate.tree)
        if walk is None and candidate.cost_range is None:
            return None
        low, high = walk[1] if walk else (candidate.tokens_per_step, candidate.tokens_per_step)
        cheap, dear = candidate.cost_range or (candidate.cost_ratio, candidate.cost_ratio)
        return low / dear, high / cheap

    def lookup(self) -> tuple[float, tuple[float, float]] | None:
        """The same of prompt lookup; None where it was not counted."""
        counted = [answer.lookup for answer in self.answers if answer.lookup is not None]
        return _yield(map(_walk, counted)) if len(counted) == len(self.answers) else None


def steps_of(tree: Tree, ranks: Ranks) -> tuple[int, int]:
    """Tokens and steps of one answer that is decoded with the tree, the first token aside.  # [T, H]"""
    return _walk(_accepted(tree, ranks))


def accuracies(ranks: Ranks) -> list[dict[str, float]]:
    """For every head the share of positions at which the true token is among the best 1, 2, ... TOP_K."""
    found = []
    for column in ranks.T:
        valid = column[column >= 0]
        found.append({f"top{k}": float((valid < k).mean()) if len(valid) else 0.0 for k in range(1, TOP_K + 1)})
    return found


def mean_accuracy(found: Sequence[Mapping[str, float]]) -> float:
    """Mean top-1 accuracy over the heads, weighted 0.8 ** head: what early stopping looks at."""
    weights = [0.8**head for head in range(len(found))]
    return sum(w * head["top1"] for w, head in zip(weights, found, strict=True)) / sum(weights)


def path_counts(ranks: Ranks) -> dict[Choice, int]:
    """How often the true continuation is this path of ranks, for every path that was seen."""
    counts: dict[Choice, int] = {}
    for row in ranks.tolist():
        path: Choice = ()
        for rank in row:
            if not 0 <= rank < TOP_K:
                break
            path = (*path, rank)
            counts[path] = counts.get(path, 0) + 1
    return counts


def best_tree(ranks: Ranks, nodes: int = TREE_NODES) -> Tree:
    """The tree of ``nodes`` draft nodes that holds the true path most often: the joint frequencies, no independence assumed."""
    return Tree.from_choices(islice(grow(path_counts(ranks)), nodes))


def tokens_per_step(tree: Tree, ranks: Ranks, answers: npt.NDArray[np.int64]) -> float:
    """Tokens that a step yields when every answer is decoded with the tree: the walk that an engine takes, without the engine.

    Args:
        ranks: of all answers, see :class:`Answer`.  # [N, H]
        answers: number of the answer of each row.  # [N]
    """
    accepted = _accepted(tree, ranks)
    ends = (np.flatnonzero(np.diff(answers)) + 1).tolist()
    rows = np.array([_walk(part) for part in np.split(accepted, ends)])
    tokens, steps = rows.sum(0)
    return float(tokens / steps) if steps else 1.0


def summary(ranks: Ranks, answers: npt.NDArray[np.int64]) -> dict[str, Any]:
    """The body of ``acceptance.json``: positions, accuracy of every head, counts of true paths, and a small tree's yield."""
    tree = best_tree(ranks)
    counts = sorted(path_counts(ranks).items(), key=lambda item: (-item[1], item[0]))
    return {
        "positions": _positions(ranks),
        "heads": accuracies(ranks),
        "paths": [{"choice": list(path), "count": count} for path, count in counts],
        "tree": {
            "choices": [list(choice) for choice in tree.choices],
            "tokens_per_step": tokens_per_step(tree, ranks, answers),
        },
    }


def calibration(answers: Sequence[Answer]) -> dict[str, Any]:
    """The body of ``acceptance.json`` with intervals, categories, and every answer's ranks, which all of it follows from."""
    ranks = np.concatenate([answer.ranks for answer in answers])
    numbers = np.repeat(np.arange(len(answers)), [len(answer.ranks) for answer in answers])
    body = summary(ranks, numbers)
    for head, entry in enumerate(body["heads"]):
        entry["top1_ci95"] = _top1_interval(answers, head)
    return {
        **body,
        "prompts": len(answers),
        "categories": [_category(name, answers) for name in sorted({answer.category for answer in answers})],
        "answers": [_recorded(answer) for answer in answers],
    }


def write_calibration(path: Path, answers: Sequence[Answer], source: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``acceptance.json`` and return its body.

    Args:
        source: where the answers came from.
    """
    body = {**calibration(answers), "source": dict(source)}
    write_output(path, json.dumps(body, separators=(",", ":")) + "\n")
    return body


def _path(entry: Mapping[str, Any]) -> tuple[Choice, int]:
    """A path of a file, and how often it was seen."""
    choice: Choice = tuple(entry["choice"])
    if not 0 < len(choice) <= MAX_DEPTH or not all(type(rank) is int and 0 <= rank < MAX_TOP_K for rank in choice):
        raise ValueError(f"the choice {reprlib.repr(entry['choice'])}")
    return choice, whole(entry, "count")


def _answer(entry: Mapping[str, Any]) -> Answer:
    """An answer of a file."""
    ranks = np.array(entry["ranks"], dtype=np.int64)
    if ranks.ndim != 2 or not ranks.size:
        raise ValueError("ranks that are no row a token")
    lookup = np.array(entry["lookup"], dtype=np.int64) if "lookup" in entry else None
    if lookup is not None and (lookup.shape != ranks.shape[:1] or lookup.min() < 0):
        raise ValueError("lookup that is no count a token")
    return Answer(str(entry["prompt"]), str(entry["category"]), ranks, lookup)


def _recorded(answer: Answer) -> dict[str, Any]:
    found = {"prompt": answer.prompt, "category": answer.category, "ranks": answer.ranks.tolist()}
    return found if answer.lookup is None else {**found, "lookup": answer.lookup.tolist()}


def _category(name: str, answers: Sequence[Answer]) -> dict[str, Any]:
    group = [answer for answer in answers if answer.category == name]
    ranks = np.concatenate([answer.ranks for answer in group])
    top1 = [head["top1"] for head in accuracies(ranks)]
    return {"category": name, "prompts": len(group), "positions": _positions(ranks), "top1": top1}


def _top1_interval(answers: Sequence[Answer], head: int) -> list[float]:
    columns = [answer.ranks[:, head] for answer in answers]
    rows = [(int((column == 0).sum()), int((column >= 0).sum())) for column in columns]
    return list(bootstrap(rows, lambda right, known: right / np.maximum(known, 1)))


def _positions(ranks: Ranks) -> int:
    """Those at which there is a token to be right about."""
    return int((ranks[:, 0] >= 0).sum())


def _accepted(tree: Tree, ranks: Ranks) -> npt.NDArray[np.int64]:
    """Length of the longest path of the tree that is the true one, at every row.  # [N, H] -> [N]"""
    paths: set[Choice] = set(tree.choices)
    found = np.zeros(len(ranks), dtype=np.int64)
    for row, line in enumerate(ranks.tolist()):
        depth = 0
        while depth < len(line) and tuple(line[: depth + 1]) in paths:
            depth += 1
        found[row] = depth
    return found


def _yield(walks: Iterable[tuple[int, int]]) -> tuple[float, tuple[float, float]] | None:
    """Tokens per step over all answers, and the interval over prompts; None where no step was taken."""
    rows = np.array(list(walks))
    if not rows.size or not rows[:, 1].any():
        return None
    tokens, steps = rows.sum(0)
    return float(tokens / steps), bootstrap(rows, lambda tokens, steps: tokens / np.maximum(steps, 1))


def _walk(accepted: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Tokens and steps of one answer, the first token aside, which the prefill gives.  # [T]"""
    tokens, steps, row, last = 0, 0, 0, len(accepted) - 1
    while row < last:  # the step from the last row would yield what comes after the answer
        steps += 1
        tokens += min(int(accepted[row]) + 1, last - row)
        row += int(accepted[row]) + 1
    return tokens, steps
