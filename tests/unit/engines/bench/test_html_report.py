"""The page: what it says first, that it needs nothing else, that text is text, and how a browser shows it where there is one."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medusa_export.engines.bench.html_report import render, verdict
from medusa_export.engines.bench.runner import PromptResult
from medusa_export.engines.verify.parity import Divergence
from tests.browser import BROWSER, layout_problems, screenshot
from tests.unit.engines.bench.test_report import SAME, prompt, report, run

MORE = prompt("c", "code", [130.0], [70.0])


class Page(HTMLParser):
    """Texts, tags and whatever a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.texts.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.texts))


def whole(prompts: list[Any], **changes: Any) -> dict[str, Any]:
    """A report as medusa-run writes it."""
    body = report(prompts)
    for entry in body["parity"]["divergences"]:
        entry["text"] = {"before": "the answer is ", "baseline": "<b>four</b>", "medusa": "five"}
    extra = {
        "failures": [],
        "findings": [{"name": "tree-logits", "message": "a tree step differs <b>"}],
        "foretold": {"tokens_per_step": 2.5, "interval": [2.0, 3.0]},
        "files": {"decoder.onnx": {"size": 3, "sha256": "ab" * 32}},
        "heads": [],
        "path_shares": [],
    }
    return body | extra | {"command": "medusa-run --engine 'a b'"} | changes


def test_it_needs_nothing_else() -> None:
    page = Page(render(whole(SAME)))
    assert page.fetched == []
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert "@import" not in page.text
    assert "url(" not in page.text


def test_what_it_says() -> None:
    body = whole([*SAME, MORE], heads=[{f"top{k}": k / 20 for k in range(1, 11)}], path_shares=[0.31, 0.12, 0.07])
    text = Page(render(body)).text
    for part in (
        "Faster with drafts from the heads: decoding 2.00x, whole answers 1.86x; the same output on 3 of 3 prompts",
        "2.00 drafts from: heads, in a tree of 3, 2 deep",
        "Tokens per step on these prompts, predicted by acceptance.json: 2.50 (2.00 .. 3.00); it was 2.00, drafts from: heads",
        "speed-up, decoding 2.00x",
        "speed-up, whole answers 1.86x",
        "chat 1 2.00x - 1.86x - 2.00 1",
        "2.00",
        "31%",
        "12%",
        "50.0%",
        "ab" * 32,
        "medusa-run --engine 'a b'",
        "3 of 3 exactly equal; 0 ties, 0 mismatches",
        "100.0",
    ):
        assert part in text, part
    assert "No output differs in any token" in text


def test_what_is_estimated_for_a_gpu_says_so() -> None:
    row = {
        "batch": 4, "past_length": 1024, "max_draft_len": 0, "tokens_per_step": 1.0, "speedup": 1.0, "speedup_interval": [0.7, 1.2],
        "tokens_per_second": 412.0, "estimated": "H100-80GB", "alternatives": {"fp8 without Medusa": 640.0},
    }  # fmt: skip
    text = Page(render(whole(SAME, expected=[row]))).text
    assert "Expected on H100-80GB" in text
    assert "Estimated, not measured" in text
    assert "4 1024 no tree 1.00x 0.70 .. 1.20 412 640" in text
    assert "Estimated" not in Page(render(whole(SAME))).text


def test_texts_of_outputs_stay_texts() -> None:
    parted = prompt("x", "code", [130.0], [70.0], verdict="tie", divergence=Divergence(4, 5, 6, 0.002))
    page = Page(render(whole([parted, *SAME])))
    assert "<b>four</b>" in page.text
    assert "0.002" in page.text
    assert "b" not in page.tags[page.tags.index("mark") :]  # the cards have some, before


@pytest.mark.parametrize(
    ("low_high", "failures", "kind", "text"),
    [
        ([1.2, 1.4], [], "good", "faster with drafts from the heads: decoding 2.00x, whole answers 1.30x; the same"),
        ([0.9, 1.4], [], "even", "no clear difference"),
        ([0.7, 0.9], [], "bad", "slower with drafts from the heads: decoding 2.00x, whole answers 1.30x"),
        ([1.2, 1.4], ["3 prompts differ"], "bad", "3 prompts differ"),
    ],
)
def test_the_verdict(low_high: list[float], failures: list[str], kind: str, text: str) -> None:
    body = {**whole([*SAME, MORE]), "speedup": {"median": 1.3, "ci95": low_high}, "failures": failures}
    found = verdict(body)
    assert found["kind"] == kind
    assert text in found["text"]
    assert f'<h1 class="{kind}">' in render(body)


def test_a_verdict_needs_prompts_and_steps() -> None:
    """What one prompt gives, or the noise of prefills alone, is called neither faster nor slower."""
    found = verdict(whole(SAME))
    assert (found["kind"], found["text"].split(":")[0]) == (
        "even", "too few prompts to say whether it is faster with drafts from the heads",
    )  # fmt: skip
    assert Page(render(whole(SAME))).text.count("too few prompts for an interval") == 2
    one = [PromptResult(name, "x", [1], [run(1, 0.0, [], 10)], [run(1, 0.0, [], 20)]) for name in "abcd"]
    said = "every answer is one token, so nothing was decoded; the same output on 4 of 4 prompts"
    assert verdict(whole(one)) == {"kind": "even", "text": said}


@pytest.mark.parametrize(
    ("drafts", "card", "title"),
    [
        ("both", "2.00 drafts from: heads and text tokens/s", "Faster with drafts from heads and text"),
        ("text", "2.00 drafts from: text tokens/s", "Faster with drafts from the text"),
        (
            "none",
            "2.00 drafts from: none tokens/s",
            "No drafts in either run, so 2.00x in decoding and 1.86x in whole answers are the machine's noise",
        ),
    ],
)
def test_a_tree_that_nothing_used_is_not_shown(drafts: str, card: str, title: str) -> None:
    body = whole([*SAME, MORE])
    assert "The tree" in render(body)
    body["drafts"][0]["drafts"] = drafts
    page = Page(render(body))
    assert card in page.text
    assert title in page.text
    assert not {"svg"} & set(page.tags)
    assert ("predicted, heads alone: 2.50" in page.text) == (drafts == "both")
    assert "by kind of drafts" not in page.text


def test_every_kind_of_drafts_is_shown() -> None:
    text = {"ways": {"text": [run(13, 40.0, [3] * 4, 10)]}}
    prompts = [prompt(name, "x", [130.0], [70.0], **text, way_verdicts={"text": "tie"}) for name in "ab"]
    page = Page(render(whole(prompts)))
    assert "heads, in a tree of 3 2.00x 2.00 2 of 2 0 0 text 3.00x 3.00 0 of 2 2 0" in page.text


def test_one_of_something() -> None:
    tie = prompt("x", "code", [130.0], [70.0], verdict="tie", divergence=Divergence(4, 5, 6, 0.002))
    text = Page(render(whole([tie, *SAME]))).text
    assert "the same output on 2 of 3 prompts, and 1 that parts at a tie" in text
    assert "exactly equal; 1 tie, 0 mismatches" in text
    assert "of steps that reached one token fewer" in text
    assert "the same output on 1 of 1 prompt" in Page(render(whole(SAME[:1]))).text


def test_a_run_without_steps_and_without_a_tree() -> None:
    body = whole(SAME, accepted=[], tree={"max_draft_len": 0, "medusa_choices": []})
    body["latency_ms"] = {mode: {"token": [], "step": [], "prefill": [1.0] * 5} for mode in ("baseline", "medusa")}
    assert "The tree" not in Page(render(body)).text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    """Nothing sticks out at the side, on a phone either: wide tables scroll for themselves. Dark where the reader's system is."""
    (tmp_path / "report.html").write_text(render(whole(SAME)))
    assert layout_problems(tmp_path, ["report.html"], tmp_path) == []
    screenshot(tmp_path / "report.html", tmp_path / "dark.png", is_dark=True)
    assert np.asarray(Image.open(tmp_path / "dark.png").convert("L")).mean() < 80
