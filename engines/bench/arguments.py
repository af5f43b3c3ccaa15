"""The flags of medusa-run as a library takes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medusa_export.core.flags import COUNT, NUMBER, POSITIVE, Bounds, flag
from medusa_export.core.hub import REVISION_HELP
from medusa_export.engines.decoding.draft_flags import AUTO, DRAFTS_CHOICES, DRAFTS_HELP
from medusa_export.engines.trtllm.session import TIMEOUT
from medusa_export.heads.contract.engine_info import ENGINE_HELP

INPUT, RUN, SAMPLING, EXTRAS, TRTLLM = (
    "Input",
    "Run",
    "Sampling",
    "Comparisons",
    "TensorRT-LLM engines",
)  # headings of --help


@dataclass(frozen=True)
class RunArguments:
    """The flags of medusa-run; see its --help."""

    engine: Path = flag(help=ENGINE_HELP, panel=INPUT)
    prompts: Path = flag(help="Prompts: JSONL with turns, messages or prompt.", panel=INPUT)
    reference: Path | None = flag(
        None, help="Original checkpoint to compare the engine's numbers with: a directory, or owner/name on the hub.", panel=EXTRAS
    )  # fmt: skip
    tree: str | None = flag(
        None, help="Another tree: a JSON file or a preset.", panel=INPUT, default="the engine's own"
    )
    limit: int | None = flag(None, help="Use only the first N prompts.", panel=INPUT, metavar="N", bounds=NUMBER)
    max_new_tokens: int = flag(128, help="Maximum tokens to generate for a prompt.", panel=RUN, bounds=NUMBER)
    repeats: int = flag(3, help="Interleaved runs of every prompt.", panel=RUN, bounds=NUMBER)
    min_speedup: float | None = flag(
        None, help="Exit with 1 when the speed-up of whole answers is below this.", panel=RUN, bounds=POSITIVE
    )
    threads: int = flag(0, help="CPU threads; 0: one per core.", panel=RUN, bounds=COUNT)
    seed: int = flag(0, help="Seed for the order of the prompts, the bootstrap and the draws.", panel=RUN, bounds=COUNT)
    save_outputs: Path | None = flag(
        None, help="Write every prompt's outputs and times to this file, JSONL.", panel="Output"
    )
    temperature: float = flag(
        0.0, help="Draw tokens at this temperature, with the same random numbers in both modes; 0: decode greedily.",
        panel=SAMPLING, bounds=COUNT,
    )  # fmt: skip
    top_p: float = flag(
        1.0,
        help="Draw from the smallest set of tokens with this probability.",
        panel=SAMPLING,
        bounds=Bounds(above=0, most=1),
    )
    typical: bool = flag(
        False, help="Accept drafts by the Medusa paper's typical acceptance, which is not lossless.", panel=SAMPLING
    )
    drafts: str = flag(AUTO, help=DRAFTS_HELP, panel=RUN, choices=DRAFTS_CHOICES)
    each_drafts: bool = flag(
        False, help="Also run with the other kinds of drafts, interleaved, and compare them.", panel=EXTRAS
    )
    compare: Path | None = flag(
        None, help="Another engine of the same model, run interleaved: tokens, distributions, speed.", panel=EXTRAS
    )
    sweep_batch: tuple[int, ...] = flag(
        (),
        help="Also run N prompts at once, without and with the tree. Can be repeated.",
        panel=EXTRAS,
        metavar="N",
        bounds=NUMBER,
    )
    sweep_length: tuple[int, ...] = flag(
        (),
        help="Also run after prompts of N tokens. Can be repeated.",
        panel=EXTRAS,
        metavar="N",
        bounds=NUMBER,
    )
    trtllm_api: str = flag(
        "runner", help="TensorRT-LLM's API to run the engine with.", panel=TRTLLM,
        choices={"runner": "ModelRunnerCpp", "llm": "the LLM API, 0.20 and later"},
    )  # fmt: skip
    no_expectation: bool = flag(
        False,
        help="Do not compare tokens per step with acceptance.json, for prompts of another kind.",
        panel=EXTRAS,
    )
    timeout: float = flag(TIMEOUT, help="Seconds to wait for a step.", panel=TRTLLM, bounds=POSITIVE)
    revision: str | None = flag(None, help=REVISION_HELP, panel=EXTRAS)
