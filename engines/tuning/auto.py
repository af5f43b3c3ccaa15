"""The tree of an engine that was just written: calibrated, timed, searched, and left in its directory with what it rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from medusa_export.core.text.prompts import Prompt
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.measure.prompts import encode_all
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.tuning.acceptance import AT_ONCE, measure_acceptance
from medusa_export.engines.tuning.cost import SingleSteps, measure_cost, usual_past_length, write_costs
from medusa_export.engines.tuning.search import MAX_DRAFT_LEN, search, sentence, tree_json
from medusa_export.heads.contract.engine_info import TREE_FILE, EngineInfo
from medusa_export.heads.contract.tree_prompts import NEW_TOKENS, prompts_to_run
from medusa_export.heads.trees.acceptance import ACCEPTANCE_FILE, Acceptance, write_calibration
from medusa_export.heads.trees.step_costs import COST_FILE, cost_curve

ROUNDS = 5
# Sizes whose steps are timed; between them a cost is linear, as far as a tree can tell.
NODES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 64)
# For drafts that are chosen step by step; the tree rests on the first curve.
LONG_PASTS, LONG_NODES, LONG_ROUNDS = (1024,), (1, 2, 3, 4, 6, 8, 12, 16), 3

Progress = Callable[[str, int, int], None]


def choose_tree(
    engine_dir: Path, prompts: Sequence[Prompt], progress: Progress = lambda stage, done, total: None
) -> str:
    """Write acceptance.json, cost.json and tree.json into an engine's directory; returns why the tree is what it is.

    Args:
        prompts: up to 64 of those that leave room for an answer are run, evenly spread over all of them.

    Raises:
        ConfigError: no prompt fits into the engine's context, or what :func:`measure_acceptance` refuses.
    """
    info, tokenizer = EngineInfo.load(engine_dir), read_tokenizer(engine_dir)
    encoded = encode_all(tokenizer, prompts)
    fitting = [encoded[index] for index in prompts_to_run([len(ids) for _, _, ids in encoded], info.max_length)]
    done = iter(range(1, len(fitting) + 1))
    answers = measure_acceptance(
        TreeBatchDecoder(engine_dir, slots=AT_ONCE), fitting, max_new_tokens=NEW_TOKENS,
        progress=lambda: progress("acceptance", next(done), len(fitting)),
    )  # fmt: skip
    write_calibration(engine_dir / ACCEPTANCE_FILE, answers, {"max_new_tokens": NEW_TOKENS})
    past_length = usual_past_length(info)
    steps = SingleSteps(OnnxRuntimeEngine(engine_dir))
    acceptance = Acceptance.from_answers(answers)
    most_tokens = (
        1 + sum(sorted(acceptance.paths.values())[-MAX_DRAFT_LEN:]) / acceptance.positions
    )  # of the largest tree
    curve = measure_cost(
        steps, sizes=NODES, past_length=past_length, rounds=ROUNDS, most_tokens=most_tokens,
        progress=lambda *at: progress("step costs", *at),
    )  # fmt: skip
    longer = [
        measure_cost(
            steps, sizes=LONG_NODES, past_length=length, rounds=LONG_ROUNDS,
            progress=lambda *at: progress("step costs behind more", *at),
        )
        for length in LONG_PASTS if past_length < length <= info.max_length - max(LONG_NODES)
    ]  # fmt: skip
    write_costs(engine_dir / COST_FILE, [curve, *longer], info)
    found = search(acceptance, cost_curve(curve))
    (engine_dir / TREE_FILE).write_text(tree_json(found), encoding="utf-8")
    return sentence(found)
