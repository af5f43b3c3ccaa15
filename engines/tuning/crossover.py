"""The best tree by batch and context, with tokens a second, and what other ways of decoding would give there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medusa_export.engines.tuning.search import search
from medusa_export.heads.trees.acceptance import Acceptance
from medusa_export.heads.trees.step_costs import cost_curve


def crossover_rows(
    counted: Acceptance, curves: Sequence[Mapping[str, Any]], max_draft_len: int
) -> list[dict[str, Any]]:
    """A row of every curve: the best tree, tokens a second of the whole batch, and the speed-up over no tree.

    Rows of estimated costs say so, and have tokens a second of the alternatives whose acceptance is known.

    Args:
        counted: acceptance.
        curves: rows of cost.json, one a batch size and past length.
        max_draft_len: most draft nodes of a tree.
    """
    return [_row(counted, curve, max_draft_len) for curve in curves]


def advice(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What is faster than the best tree, where anything is; None where nothing is, or nothing is known of others."""
    beaten: dict[str, list[float]] = {}
    for row in rows:
        for name, speed in row.get("alternatives", {}).items():
            if speed > row["tokens_per_second"]:
                beaten.setdefault(name, []).append(speed / row["tokens_per_second"])
    if not beaten:
        return None
    parts = [f"{name} in {len(each)} of {len(rows)} rows, by up to {max(each):.2f}x" for name, each in beaten.items()]
    return f"Faster than the best tree, by these estimates: {'; '.join(parts)}."


def _row(counted: Acceptance, curve: Mapping[str, Any], max_draft_len: int) -> dict[str, Any]:
    found = search(counted, cost_curve(curve), max_draft_len=max_draft_len)
    chosen, batch = found.chosen, curve["batch"]
    plain = next(row["ms"] for row in curve["verify"] if row["nodes"] == 1)
    return {
        "batch": batch,
        "past_length": curve["past_length"],
        "max_draft_len": chosen.tree.max_draft_len,
        "medusa_choices": [list(choice) for choice in chosen.tree.choices],
        "tokens_per_step": round(chosen.tokens_per_step, 4),
        "speedup": round(chosen.speedup, 4),
        "speedup_interval": [round(end, 4) for end in found.interval] if found.interval else None,
        "tokens_per_second": round(1e3 * batch * chosen.speedup / plain, 2),
        "without_medusa": round(1e3 * batch / plain, 2),
        **_estimated(counted, curve),
    }


def _estimated(counted: Acceptance, curve: Mapping[str, Any]) -> dict[str, Any]:
    if "estimated" not in curve:
        return {}
    lookup, speeds = counted.lookup(), {}
    for other in curve["alternatives"]:
        drafts = int(other.get("nodes", 1)) > 1
        if drafts and lookup is None:
            continue  # its acceptance was not counted
        tokens = lookup[0] if drafts and lookup else 1.0
        speeds[other["name"]] = round(1e3 * curve["batch"] * tokens / other["ms"], 2)
    return {"estimated": curve["estimated"], "alternatives": speeds}
