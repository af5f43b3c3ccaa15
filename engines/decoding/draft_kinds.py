"""``--drafts``: who drafts, by name, and the drafter of an engine's directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from medusa_export.core.errors import ConfigError
from medusa_export.core.flags import requirement_error
from medusa_export.engines.decoding.batch_trees import BatchTrees
from medusa_export.engines.decoding.draft_flags import AUTO, require_known
from medusa_export.engines.decoding.drafters import Drafter, PayingDrafter, TreeDrafter, fitting_paths
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.acceptance import ACCEPTANCE_FILE, Acceptance
from medusa_export.heads.trees.followers import FOLLOWERS_FILE, Followers
from medusa_export.heads.trees.step_costs import COST_FILE, PRIOR_COSTS, StepCosts, load_costs
from medusa_export.heads.trees.tree import Choice

# Where no acceptance was counted: what the heads in examples/ gave on 52 of Spec-Bench's questions.
PRIOR_PATHS: Mapping[Choice, float] = {
    (0,): 0.296,
    (1,): 0.112,
    (0, 0): 0.084,
    (2,): 0.053,
    (3,): 0.036,
    (0, 0, 0): 0.028,
}


@dataclass(frozen=True)
class Engine:
    """What a drafter is made for.

    Attributes:
        directory: has ``cost.json`` and ``acceptance.json`` where they were measured, and ``followers.npz`` where the heads came
            with it.
        trees: of the heads alone.
        max_nodes: that a step takes.
    """

    directory: Path
    info: EngineInfo
    trees: BatchTrees
    max_nodes: int


def _none(engine: Engine) -> Drafter:
    return TreeDrafter([AUTOREGRESSIVE], engine.info)


def _heads(engine: Engine) -> Drafter:
    return TreeDrafter(list(engine.trees.by_batch.values()), engine.info, engine.trees)


def _text(engine: Engine) -> Drafter:
    return PayingDrafter({}, _costs(engine), engine.max_nodes)


def _both(engine: Engine) -> Drafter:
    return PayingDrafter(_paths(engine), _costs(engine), engine.max_nodes, _followers(engine))


DRAFTS: Mapping[str, Callable[[Engine], Drafter]] = {"heads": _heads, "text": _text, "both": _both, "none": _none}
NEED_HEADS = ("both",)  # an engine without heads has the empty tree for ``heads``
OF_TREES = ("heads",)  # what takes its drafts from a tree
OF_RUNTIMES = ("heads", "none")  # what TensorRT-LLM's own decoding can do


def settle_drafts(drafts: str, info: EngineInfo, *, own_tree: bool) -> str:
    """What ``auto`` is for an engine; any other name as it is.

    Args:
        own_tree: whether the user gave a tree, which only heads alone draft for.

    Raises:
        ConfigError: as for :func:`require_drafts`, or drafts that would not use the user's tree.
    """
    if drafts == AUTO:
        decodes_itself = info.backend not in PRIOR_COSTS
        return "heads" if own_tree or decodes_itself else "both" if info.max_depth else "text"
    require_drafts(drafts, info)
    if own_tree and drafts not in OF_TREES:
        raise requirement_error("--tree", f"one with --drafts {drafts}", f"--drafts {' or '.join(OF_TREES)}")
    return drafts


def require_drafts(drafts: str, info: EngineInfo) -> None:
    """Raise ConfigError for a name that there is not, or drafts that an engine's own runtime does not take."""
    require_known(drafts)
    if info.backend not in PRIOR_COSTS and drafts not in (AUTO, *OF_RUNTIMES):
        got = f"{drafts} for an engine of {info.backend}, whose Medusa mode drafts with heads only"
        raise ConfigError("--drafts", got, " or ".join(OF_RUNTIMES), "choose one of them")
    if drafts in NEED_HEADS and not info.max_depth:
        raise ConfigError("--drafts", f"{drafts} for an engine without heads", "text or none", "choose one of them")


def drafts_possible(drafts: str, info: EngineInfo) -> bool:
    """Whether an engine can decode with them, and whether they are others than the rest: without heads, heads draft nothing."""
    return bool(info.max_depth) or drafts in ("text", "none")


def open_drafter(drafts: str, engine: Engine) -> Drafter:
    """The drafter of a name in :data:`DRAFTS`.

    Raises:
        ConfigError, TreeError: what :func:`require_drafts` refuses, or a file of the engine that cannot be used.
    """
    return DRAFTS[settle_drafts(drafts, engine.info, own_tree=False)](engine)


def _paths(engine: Engine) -> Mapping[Choice, float]:
    path = engine.directory / ACCEPTANCE_FILE
    if not path.is_file():
        return fitting_paths(PRIOR_PATHS, 1, engine.info)
    counted = Acceptance.load(path)
    return fitting_paths(counted.paths, counted.positions, engine.info)


def _followers(engine: Engine) -> Followers | None:
    path = engine.directory / FOLLOWERS_FILE
    return Followers.load(path, engine.info.vocab_size) if path.is_file() else None


def _costs(engine: Engine) -> StepCosts:
    path = engine.directory / COST_FILE
    return StepCosts(load_costs(path) if path.is_file() else PRIOR_COSTS[engine.info.backend])
