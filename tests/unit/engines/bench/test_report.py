"""The report's numbers from made-up runs whose results are known by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from medusa_export.engines.bench.compare import paired
from medusa_export.engines.bench.report import (
    build_report,
    divergence_lines,
    drafts_line,
    print_report,
    tokens_per_step,
)
from medusa_export.engines.bench.runner import PromptResult, RunResult
from medusa_export.engines.decoding.protocols import Generation
from medusa_export.engines.measure import machine
from medusa_export.engines.measure.machine import hardware, versions
from medusa_export.engines.verify.parity import Divergence
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.tree import Tree

INFO = EngineInfo(
    backend="onnxruntime", form="float", precision="float32 for the test", max_length=64, max_depth=3, top_k=4,
    num_hidden_layers=2, num_key_value_heads=2, head_dim=16, hidden_size=64, vocab_size=97, eos_token_ids=(2,),
    session_options={}, heads_session_options={}, source={"checkpoint": "somewhere", "quant": "none"},
)  # fmt: skip
TREE = Tree.from_choices([[0], [1], [0, 0]])
KEYS = {
    "tree_logits", "foretold", "expected", "findings",
    "parity", "speedup", "tokens_per_step", "tokens_per_second", "step_ms", "step_efficiency", "categories", "hardware",
    "versions", "tree", "arguments", "reference", "engine", "overhead_ms", "accepted", "latency_ms", "prompts",
    "comparison", "sweeps", "device", "counted_drafts", "drafts", "stopped", "decode_speedup", "decode_tokens_per_second",
}  # fmt: skip


def run(tokens: int, decode_ms: float, accepted: list[int], prefill_ms: float = 0.0) -> Generation:
    return Generation(
        tokens=[5] * tokens, accepted=accepted, prefill_ms=prefill_ms, decode_ms=decode_ms, backend_ms=decode_ms * 0.9
    )


def prompt(key: str, category: str, baseline_ms: list[float], medusa_ms: list[float], **fields: Any) -> PromptResult:
    """13 tokens: one from the prefill of 10 ms, then 12 steps without Medusa and 6 with it."""
    baseline = [run(13, ms - 10, [1] * 12, 10) for ms in baseline_ms]
    medusa = [run(13, ms - 10, [2] * 6, 10) for ms in medusa_ms]
    return PromptResult(key, category, [1, 2], baseline, medusa, **fields)


def report(prompts: list[PromptResult], **arguments: Any) -> dict[str, Any]:
    return build_report(RunResult(prompts, 0.01), TREE, INFO, {"seed": 0, "threads": 0, **arguments})


SAME = [prompt("a", "code", [130.0], [70.0]), prompt("b", "chat", [130.0], [70.0])]


def rows_of(body: dict[str, Any]) -> dict[str, list[str]]:
    """What is printed on a terminal of 80 columns: cells by the first of them, of rows that fit on a line."""
    text = io.StringIO()
    print_report(body, Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    return {cells[0]: cells for line in lines if (cells := [cell.strip() for cell in line.split("│")[1:-1]])}


def test_drafts_in_one_line() -> None:
    """The prefill of 10 ms is left out: 120 ms without drafts, 60 with the heads', 40 with the text's."""
    text = {"ways": {"text": [run(13, 40.0, [3] * 4, 10)]}, "way_verdicts": {"text": "tie"}}
    body = report([prompt("a", "code", [130.0], [70.0], **text), prompt("b", "chat", [130.0], [70.0], **text)])
    assert body["drafts"] == [
        {
            "drafts": "heads",
            "decode_speedup": 2.0,
            "tokens_per_step": 2.0,
            "equal_outputs": 2,
            "ties": 0,
            "mismatches": 0,
        },
        {
            "drafts": "text",
            "decode_speedup": 3.0,
            "tokens_per_step": 3.0,
            "equal_outputs": 0,
            "ties": 2,
            "mismatches": 0,
        },
    ]
    assert drafts_line(body["drafts"]) == "heads 2.00x, text 3.00x"


def test_one_or_two_prompts_have_no_interval() -> None:
    rows = [prompt(str(i), "math_reasoning" if i < 3 else "chat", [130.0 + i], [70.0]) for i in range(5)]
    body = report(rows)
    intervals = {row["category"]: (row["decode_speedup_ci95"], row["speedup_ci95"]) for row in body["categories"]}
    assert intervals["chat"] == (None, None)
    assert intervals["math_reasoning"] == ([2.0, round(122 / 60, 4)], [round(130 / 70, 4), round(132 / 70, 4)])
    shown = {each["parity"]["prompts"]: rows_of(each) for each in (body, report(SAME))}
    assert shown[5]["chat"][2:4] == ["2.06x", "1.91x"]
    assert shown[5]["math_reasoning"][2:4] == ["2.02x (2.00 .. 2.03)", "1.87x"]
    assert ".." in shown[5]["speed-up, decoding (95% CI)"][1]
    assert ".." in shown[5]["speed-up, whole answers (95% CI)"][1]
    assert shown[2]["speed-up, decoding (95% CI)"][1] == "2.00x"
    assert shown[2]["speed-up, whole answers (95% CI)"][1] == "1.86x"


def test_one_ratio() -> None:
    body = report(SAME)
    assert body["tokens_per_second"] == {"baseline": 100.0, "medusa": round(13e3 / 70, 3)}
    assert body["decode_tokens_per_second"] == {"baseline": 100.0, "medusa": 200.0}
    assert body["speedup"] == {"median": round(130 / 70, 4), "ci95": [round(130 / 70, 4)] * 2}
    assert body["decode_speedup"] == {"median": 2.0, "ci95": None}, "two prompts have no interval"
    assert body["tokens_per_step"] == 2.0
    assert body["step_ms"] == {"baseline": 10.0, "medusa": 10.0}
    assert body["overhead_ms"] == {"baseline": 1.0, "medusa": 1.0}
    assert body["step_efficiency"] == 1.0


def test_a_long_prefill_hides_what_drafts_do_in_whole_answers_only() -> None:
    """13 tokens behind a prefill of 300 ms: 120 and 60 ms of steps, and a longer answer of 240 and 80."""
    short = [
        PromptResult(str(at), "qa", [1], [run(13, 120, [1] * 12, 300)], [run(13, 60, [2] * 6, 300)]) for at in range(2)
    ]
    longer = PromptResult("c", "qa", [1], [run(25, 240, [1] * 24, 300)], [run(25, 80, [3] * 8, 300)])
    body = report([*short, longer])
    assert body["decode_speedup"]["median"] == round(480 / 200, 4)
    assert body["decode_tokens_per_second"] == {"baseline": 100.0, "medusa": 240.0}
    assert body["decode_speedup"]["ci95"] == [2.0, 3.0], "between the prompts drawn alone"
    assert body["speedup"]["median"] == round((2 * 420 + 540) / (2 * 360 + 380), 4)
    (category,) = body["categories"]
    assert (category["decode_speedup"], category["decode_speedup_ci95"]) == (2.4, [2.0, 3.0])
    assert [row["decode_ms"] for row in body["prompts"]][1:] == [
        {"baseline": 120, "medusa": 60},
        {"baseline": 240, "medusa": 80},
    ]
    assert rows_of(body)["tokens/s, decoding"][1] == "100.0 without, 240.0 with"


def test_an_answer_of_one_token_was_not_decoded() -> None:
    """Its few microseconds behind the prefill are nobody's, and a sample of such prompts alone has no ratio."""
    one = PromptResult("x", "chat", [1], [run(1, 0.004, [], 10)], [run(1, 0.002, [], 10)])
    body = report([*SAME, one])
    assert body["decode_speedup"] == {"median": 2.0, "ci95": None}, "two prompts of three were decoded"
    assert [row["decode_speedup"] for row in body["categories"]] == [2.0, 2.0]
    body = report([prompt(str(at), "code", [130.0], [70.0]) for at in range(3)] + [one] * 40)
    assert body["decode_speedup"] == {"median": 2.0, "ci95": [2.0, 2.0]}
    assert body["decode_tokens_per_second"] == {"baseline": 100.0, "medusa": 200.0}
    body = report([one])
    assert body["decode_speedup"] == {"median": None, "ci95": None}
    assert body["decode_tokens_per_second"] == {"baseline": None, "medusa": None}
    assert (body["step_efficiency"], body["drafts"][0]["decode_speedup"]) == (None, None)
    assert (drafts_line(body["drafts"]), rows_of(body)["tokens/s, decoding"][1]) == ("heads -", "-")


def test_schema() -> None:
    body = report(SAME, max_new_tokens=13)
    assert body.keys() == KEYS
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert {"prompts", "exact", "ties", "mismatches"} <= body["parity"].keys()
    assert body["tree"] == {"max_draft_len": 3, "medusa_choices": [[0], [1], [0, 0]]}
    assert body["engine"] == {"backend": "onnxruntime", "precision": INFO.precision, "source": INFO.source}
    assert body["arguments"] == {"seed": 0, "threads": 0, "max_new_tokens": 13}
    assert body["reference"] is None


def test_interval_covers_what_the_prompts_vary() -> None:
    prompts = [prompt(str(i), "", [130.0], [70.0 + 8 * (i % 5)]) for i in range(20)]
    wide = report(prompts)["speedup"]
    low, high = wide["ci95"]
    assert 130 / 102 < low < wide["median"] < high < 130 / 70
    assert report(prompts)["speedup"] == wide, "the same seed gives the same interval"
    assert report(prompts, seed=1)["speedup"]["median"] == wide["median"]
    narrow_low, narrow_high = report(prompts * 16)["speedup"]["ci95"]
    assert (narrow_high - narrow_low) < 0.5 * (high - low)


def test_tokens_per_step_weighs_steps_not_prompts() -> None:
    many = PromptResult("a", "", [1], [run(31, 300, [1] * 30)], [run(31, 300, [3] * 10)])
    few = PromptResult("b", "", [1], [run(3, 20, [1] * 2)], [run(3, 20, [1] * 2)])
    assert tokens_per_step([many, few]) == pytest.approx(32 / 12)
    first_only = PromptResult("c", "", [1], [run(1, 0, [], 5)], [run(1, 0, [], 5)])
    assert tokens_per_step([first_only]) == 1.0
    body = report([first_only])
    assert body["step_ms"] == {"baseline": 0.0, "medusa": 0.0}
    assert body["speedup"]["median"] == 1.0


def test_parity_counts_and_explains() -> None:
    prompts = [
        *SAME,
        prompt("c", "chat", [130.0], [70.0], divergence=Divergence(3, 11, 12, 0.005), verdict="tie"),
        prompt("d", "chat", [130.0], [70.0], divergence=Divergence(5, 1, None, None), verdict="mismatch"),
    ]
    parity = report(prompts)["parity"]
    counts = [parity[key] for key in ("prompts", "exact", "ties", "mismatches", "logit_tolerance")]
    assert counts == [4, 2, 1, 1, 0.01]
    assert parity["divergences"] == [
        {
            "prompt": "c", "verdict": "tie", "position": 3, "baseline_token": 11, "medusa_token": 12, "logit_gap": 0.005,
        },
        {
            "prompt": "d", "verdict": "mismatch", "position": 5, "baseline_token": 1, "medusa_token": None,
            "logit_gap": None,
        },
    ]  # fmt: skip


def test_categories_are_apart() -> None:
    slower = prompt("c", "chat", [130.0], [130.0], verdict="mismatch")
    rows = report([*SAME, slower])["categories"]
    assert [(row["category"], row["prompts"], row["exact"]) for row in rows] == [("chat", 2, 1), ("code", 1, 1)]
    assert [row["speedup"] for row in rows] == [round(260 / 200, 4), round(130 / 70, 4)]
    assert {row["tokens_per_step"] for row in rows} == {2.0}


def test_hardware_and_versions() -> None:
    here, found = hardware(), versions()
    assert here["cpu"]
    assert here["cores"] >= 1
    assert here["memory_gib"] > 0
    assert {"python", "onnxruntime", "numpy", "torch"} <= found.keys()


@pytest.mark.parametrize(
    ("backend", "gpus", "num_gpus", "device"),
    [
        ("onnxruntime", ["NVIDIA H100"], 1, "cores of"),
        ("tensorrt", ["NVIDIA L40S", "NVIDIA T4"], 1, "NVIDIA L40S"),
        ("tensorrt-llm", ["NVIDIA H100"] * 8, 2, "2 x NVIDIA H100"),
        ("tensorrt-llm", [], 1, "a GPU whose name is unknown"),
    ],
)
def test_a_gpus_engine_is_not_said_to_run_on_cores(
    backend: str, gpus: list[str], num_gpus: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    result = RunResult(SAME, 0.01)
    body = build_report(result, TREE, replace(INFO, backend=backend), {"seed": 0}, num_gpus=num_gpus) | {"failures": []}
    output = io.StringIO()
    print_report(body, Console(file=output, width=120))
    (title,) = [line for line in output.getvalue().splitlines() if "float32 for the test" in line]
    assert device in body["device"]
    assert title.strip() == f"float32 for the test on {body['device']}"
    assert ("cores" in title) == (backend == "onnxruntime")


def test_printed_form_says_what_matters() -> None:
    prompts = [
        *SAME,
        prompt("c", "chat", [130.0], [70.0], divergence=Divergence(3, 11, 12, 0.005), verdict="tie"),
        prompt("d", "chat", [130.0], [70.0], divergence=Divergence(5, 1, None, None), verdict="mismatch"),
    ]
    reference = {
        "positions": 9, "greedy_agreement": 0.875, "kl_mean": 0.0123, "kl_max": 1.0, "logit_max_abs_diff": 2.0,
        "perplexity": {"engine": 5.5, "checkpoint": 5.4}, "parted": paired("likelihood", [0.25, 0.15]),
    }  # fmt: skip
    body = report(prompts) | {
        "reference": reference,
        "findings": [{"name": "parity", "message": f"wrong {n}"} for n in range(7)],
    }
    text = io.StringIO()
    print_report(body, Console(file=text, width=160))
    for expected in (
        "1.86x (1.86 .. 1.86)", "2.00x (2.00 .. 2.00)", "2 exact, 1 tie, 1 mismatch (", "10.0 / 10.0 ms",
        "87.5% of tokens, KL 0.012 nats", "drafts' likelihood", "+0.2 (+0.102 .. +0.298) over 2 prompts",
        "tie: prompt c at token 3, logit gap 0.005",
        "mismatch: prompt d at token 5, an output ended early", "FAILED parity: wrong 4",
        "FAILED parity: ... and 2 more", "code", "float32 for the test",
    ):  # fmt: skip
        assert expected in text.getvalue(), expected


@pytest.mark.parametrize(
    ("drafts", "said", "predicted"),
    [
        ("heads", "heads, in a tree of 3", "predicted by acceptance.json"), ("both", "heads and text", "predicted, heads alone"),
        ("text", "text", ""), ("none", "none", ""),
    ],
)  # fmt: skip
def test_what_drafted_is_named(drafts: str, said: str, predicted: str) -> None:
    """And what is predicted of heads, where they drafted."""
    body = report([prompt("a", "code", [130.0], [70.0])], drafts=drafts)
    body["foretold"] = {"tokens_per_step": 1.5, "interval": [1.25, 1.75]}
    rows = rows_of(body)
    assert rows["tokens per step"][1] == f"2.00, drafts from: {said}"
    found = {name: cells[1] for name, cells in rows.items() if name.startswith("predicted")}
    assert found == ({predicted: "1.50 (1.25 .. 1.75)"} if predicted else {})


def test_an_empty_tree_drafts_nothing() -> None:
    body = report(SAME) | {"tree": {"max_draft_len": 0, "medusa_choices": []}}
    assert rows_of(body)["tokens per step"][1] == "2.00, drafts from: none"


def test_the_first_places_where_outputs_part() -> None:
    """Mismatches before ties, five in all: hundreds of ties are usual with 8 bits."""
    ties = [prompt(f"t{n}", "x", [130.0], [70.0], divergence=Divergence(n, 1, 2, 0.5), verdict="tie") for n in range(9)]
    wrong = prompt("w", "x", [130.0], [70.0], divergence=Divergence(1, 1, 2, 9.0), verdict="mismatch")
    divergences = report([*ties, wrong])["parity"]["divergences"]
    assert divergence_lines(divergences) == [
        "mismatch: prompt w at token 1, logit gap 9",
        *(f"tie: prompt t{n} at token {n}, logit gap 0.5" for n in range(4)),
        "and 5 more, in the report (--report)",
    ]
    assert len(divergence_lines(divergences[:5])) == 5


def test_steps_and_latencies() -> None:
    slow = prompt("c", "code", [250.0, 250.0], [130.0, 70.0])
    slow.medusa[0].accepted = [1, 3, 3, 1, 2, 2]
    body = report([*SAME, slow])
    assert body["accepted"] == [2, 14, 2]
    latency = body["latency_ms"]
    assert latency["baseline"]["step"] == [10.0, 10.0, 15.0, 20.0, 20.0]  # runs of 10, 10, 20 and 20 ms a step
    assert latency["baseline"]["prefill"] == [10.0] * 5
    assert latency["medusa"]["token"][2] == 5.0  # of 5, 5, 10 and 5
    assert latency["medusa"]["step"][2] == 10.0


def test_every_prompt_is_in_it() -> None:
    first, second = report(SAME)["prompts"]
    assert first == {
        "prompt": "a", "category": "code", "input_tokens": 2, "tokens": {"baseline": 13, "medusa": 13},
        "total_ms": {"baseline": 130.0, "medusa": 70.0}, "decode_ms": {"baseline": 120.0, "medusa": 60.0},
        "tokens_per_step": 2.0, "verdict": "exact",
    }  # fmt: skip
    assert second["prompt"] == "b"
