"""Which sequences share a run: a run reads as many rows of the cache for each of its sequences as for the longest.

Beside one long conversation every short one would pay for rows that it does not have. Apart, they read the weights once more. What is
read in all decides, in bytes: a step on a CPU is as fast as its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 128  # rows by which a sequence's share of the cache grows


@dataclass(frozen=True)
class Plan:
    """Sequences in lanes, each lane one run of a step.

    Attributes:
        slots: of each lane, ascending.
        capacities: rows that each lane has for every one of its sequences.
        cost: bytes that a step reads.
    """

    slots: tuple[tuple[int, ...], ...]
    capacities: tuple[int, ...]
    cost: int


@dataclass(frozen=True)
class Traffic:
    """What a run reads.

    Attributes:
        weights: bytes, once a run.
        row: bytes of a row of the cache, all layers.
    """

    weights: int
    row: int

    def cost(self, sequences: int, capacity: int) -> int:
        """Bytes of one run."""
        return self.weights + sequences * capacity * self.row


def capacity(rows: int) -> int:
    """Rows in whole blocks."""
    return -(-rows // BLOCK) * BLOCK


def plan_lanes(rows: Sequence[int], traffic: Traffic) -> Plan:
    """The cheapest lanes for sequences of these lengths.

    Args:
        rows: of each slot, with room for what comes next.
        traffic: of the engine.
    """
    needed = [capacity(count) for count in rows]
    sizes = sorted(set(needed))
    best = [Plan((), (), 0)]  # of the sequences below each size
    for end in range(1, len(sizes) + 1):
        options = []
        for first in range(end):  # the last lane has the sizes first .. end - 1
            lane = tuple(slot for slot, size in enumerate(needed) if sizes[first] <= size <= sizes[end - 1])
            cost = best[first].cost + traffic.cost(len(lane), sizes[end - 1])
            options.append(Plan((*best[first].slots, lane), (*best[first].capacities, sizes[end - 1]), cost))
        best.append(min(options, key=lambda plan: plan.cost))
    return best[-1]
