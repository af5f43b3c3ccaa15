"""medusa-tree as its user calls it, on a tiny engine: each command's file and words, the files given on, and wrong input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.engines.decoding.batch_trees import BatchTrees
from medusa_export.exporter.cli import tree as cli_tree
from medusa_export.heads.trees.acceptance import Acceptance
from medusa_export.heads.trees.tree import load_tree
from tests.unit.heads.roofline.test_shape import LLAMA_8B


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["medusa-tree", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli_tree.tree_main()
    return int(stopped.value.code or 0)


SEARCHED = ("search", "--engine", "ENGINE", "--prompts", "PROMPTS", "--max-new-tokens", "8")


@pytest.fixture
def engine(tiny_engine: Callable[..., Any]) -> Path:
    path: Path = tiny_engine(drafts_well=True).path
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"w{n} w{n + 3}", "category": "even" if n % 2 == 0 else "odd"} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_export_is_as_good_as_its_engine(
    engine: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export/engine").symlink_to(engine)
    given = ["--engine", tmp_path / "export", "--output", tmp_path / "out.json"]
    asked = ["--prompts", prompts, "--limit", 1, "--max-new-tokens", 2]
    assert run(monkeypatch, "calibrate", *given, *asked) == 0
    for flags in ([], ["--batch", 2]):
        assert run(monkeypatch, "cost", *given, "--max-nodes", 2, "--rounds", 1, "--past-length", 4, *flags) == 0
    costs = ["--cost", flat(tmp_path / "c.json")]
    assert run(monkeypatch, "search", *given, *costs, *asked) == 0


def flat(path: Path, nodes: int = 64, **curve: Any) -> Path:
    """Costs by which nodes are free."""
    rows = [{"nodes": 1, "ms": 10.0}, {"nodes": nodes, "ms": 10.0}]
    path.write_text(json.dumps({"curves": [{"verify": rows, **curve}]}))
    return path


def test_one_after_the_other(
    engine: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    acceptance, cost, tree, picture = (tmp_path / name for name in ("a.json", "c.json", "t.json", "t.svg"))
    flags = ["--engine", engine, "--prompts", prompts, "--max-new-tokens", "16"]
    assert run(monkeypatch, "calibrate", *flags, "--output", acceptance) == 0
    out = capfd.readouterr().out
    assert "6 prompts" in out
    assert "even" in out
    cost_flags = ["--engine", engine, "--max-nodes", "6", "--rounds", "2", "--past-length", "10", "--past-length", "40"]
    assert run(monkeypatch, "cost", *cost_flags, "--output", cost) == 0
    assert "40 tokens in the cache" in capfd.readouterr().out
    assert [curve["past_length"] for curve in json.loads(cost.read_text())["curves"]] == [10, 40]
    files = ["--acceptance", acceptance, "--cost", cost, "--output", tree, "--picture", picture]
    assert run(monkeypatch, "search", *files, "--max-draft-len", "5") == 0
    out = " ".join(capfd.readouterr().out.split())
    body = json.loads(tree.read_text())
    assert body["why"] in out
    assert [row["past_length"] for row in body["crossover"]] == [10, 40]
    assert load_tree(str(tree)).max_draft_len == body["max_draft_len"] <= 5
    assert picture.read_text().rstrip().endswith("</svg>")


def test_costs_of_a_gpu_that_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From config.json alone to a tree, a table and a picture, all of which say that costs are estimated."""
    model, cost, tree = tmp_path / "model", tmp_path / "c.json", tmp_path / "t.json"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_8B))
    flags = ["--gpu", "h100", "--ckpt", model, "--quant", "fp8", "--kv-cache", "fp8", "--batch", "1", "--batch", "512"]
    assert run(monkeypatch, "cost", *flags, "--past-length", "1024", "--output", cost) == 0
    assert "estimated for H100-80GB, not measured" in " ".join(capfd.readouterr().out.split())
    body = json.loads(cost.read_text())
    assert (body["estimated"]["weights"]["bits"], body["estimated"]["kv_bits"]) == (8.0, 8)
    paths = [{"choice": [0] * depth, "count": 90 - 20 * depth} for depth in (1, 2, 3)]
    acceptance = tmp_path / "a.json"
    acceptance.write_text(json.dumps({"positions": 100, "paths": paths}))
    picture = tmp_path / "t.svg"
    files = ["--acceptance", acceptance, "--cost", cost, "--output", tree, "--picture", picture]
    assert run(monkeypatch, "search", *files) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "costs are estimated for H100-80GB, not measured" in out
    assert "16 bit fp8 int4_awq" in out  # what the model does without heads
    assert "…" not in out  # nothing is cut at 80 columns
    one, many = json.loads(tree.read_text())["crossover"]
    assert one["speedup_interval"][0] < one["speedup"] < one["speedup_interval"][1]
    assert one["tokens_per_second"] > one["without_medusa"]
    assert many["speedup"] < one["speedup"]  # so many sequences fill the GPU without drafts
    assert "costs estimated for H100-80GB" in picture.read_text()


def test_efficiencies_and_formats_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    for flags, said in (
        (["--bandwidth-efficiency", "1.5"], "--bandwidth-efficiency: got 1.5; expected above 0 and at most 1"),
        (["--quant", "nvfp4"], "nvfp4 needs SM 100"),
        (["--tp", "3"], "--tp"),
        (["--num-heads", "0"], "--num-heads"),
        (["--batch", "0"], "--batch"),
        (["--batch", "4096", "--past-length", "32768"], "does not fit into its memory"),
    ):
        output = tmp_path / "c.json"
        assert run(monkeypatch, "cost", "--gpu", "h100", "--ckpt", tmp_path, *flags, "--output", output) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert said in line
        assert not output.exists()


def test_batches(
    engine: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    acceptance, cost, tree = (tmp_path / name for name in ("a.json", "c.json", "t.json"))
    flags = ["--engine", engine, "--prompts", prompts, "--max-new-tokens", "16", "--output", acceptance]
    assert run(monkeypatch, "calibrate", *flags) == 0
    flags = ["--engine", engine, "--batch", "1", "--batch", "3", "--max-nodes", "4", "--rounds", "1", "--output", cost]
    assert run(monkeypatch, "cost", *flags, "--past-length", "10") == 0
    capfd.readouterr()
    files = ["--acceptance", acceptance, "--cost", cost, "--batch", "3", "--output", tree]
    assert run(monkeypatch, "search", *files) == 0
    rows = json.loads(tree.read_text())["crossover"]
    assert [row["batch"] for row in rows] == [1, 3]
    trees = BatchTrees.load(tree, unmeasured=4)
    assert [len(row["medusa_choices"]) for row in rows] == [trees(1).max_draft_len, trees(3).max_draft_len]
    assert trees(4).max_draft_len == 0
    out = capfd.readouterr().out
    assert "best tree by batch and context" in out
    assert "…" not in out  # nothing is cut at 80 columns


def test_what_no_file_says_is_measured_and_trees_are_run(
    engine: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cost = flat(tmp_path / "free.json", nodes=5)
    flags = ["--engine", engine, "--prompts", prompts, "--max-new-tokens", "16", "--output", tmp_path / "t.json"]
    assert run(monkeypatch, "search", *flags, "--cost", cost, "--confirm", "2") == 0
    body = json.loads((tmp_path / "t.json").read_text())
    assert len(body["measured"]) == 2
    first, second = (len(item["medusa_choices"]) for item in body["measured"])
    assert first != second
    assert {first, second} <= {1, 2, 3, 4}
    assert "measured" in capfd.readouterr().out


def test_a_small_context_needs_no_flags(
    tiny_engine: Callable[..., Any],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Costs are measured behind half of it, by both commands, as an export does."""
    engine = tiny_engine(drafts_well=True, max_length=100).path
    cost, tree = tmp_path / "c.json", tmp_path / "t.json"
    assert run(monkeypatch, "cost", "--engine", engine, "--rounds", "1", "--output", cost) == 0
    (curve,) = json.loads(cost.read_text())["curves"]
    assert (curve["past_length"], max(row["nodes"] for row in curve["verify"])) == (50, 48)
    flags = ["--engine", engine, "--prompts", prompts, "--max-new-tokens", "8", "--output", tree]
    assert run(monkeypatch, "search", *flags, "--max-draft-len", "3") == 0
    assert [row["past_length"] for row in json.loads(tree.read_text())["crossover"]] == [50]
    assert "with 50 tokens in the cache" in " ".join(capfd.readouterr().out.split())


def test_measured_and_estimated_costs_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What was measured has no alternatives; only what was estimated is marked, and the sentence says which row it is about."""
    rows = [{"nodes": 1, "ms": 10.0}, {"nodes": 64, "ms": 900.0}]
    others = [{"name": "prompt lookup", "ms": 9.0}]
    curves = [
        {"past_length": 128, "verify": rows},
        {
            "past_length": 4096,
            "verify": [rows[0], rows[1] | {"ms": 11.0}],
            "estimated": "X-1GB",
            "alternatives": others,
        },
    ]
    files = ["--acceptance", tmp_path / "a.json", "--cost", tmp_path / "c.json", "--output", tmp_path / "t.json"]
    (tmp_path / "a.json").write_text(json.dumps({"positions": 10, "paths": [{"choice": [0], "count": 4}]}))
    (tmp_path / "c.json").write_text(json.dumps({"curves": curves}))
    assert run(monkeypatch, "search", *files) == 0
    out = capfd.readouterr().out
    assert "costs measured, or with * estimated for X-1GB" in " ".join(out.split())
    table = [line.split() for line in out.splitlines() if line.split()[1:2] in (["128"], ["4096"])]
    assert [(line[0], line[-1]) for line in table] == [("1", "-"), ("1*", "111")]
    assert "No tree pays here, at batch 1 with 128 tokens in the cache" in " ".join(out.split())
    (tmp_path / "c.json").write_text(json.dumps({"curves": curves[1:]}))
    assert run(monkeypatch, "search", *files) == 0
    assert "*" not in capfd.readouterr().out
    assert run(monkeypatch, "search", *files, "--nodes", "3") == 2
    assert "got 3: no tree of so many nodes was timed and counted; expected 2 .. 2" in capfd.readouterr().err


def test_nothing_is_claimed_of_answers_of_one_token(
    engine: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    body = json.loads((engine / "engine.json").read_text()) | {"eos_token_ids": list(range(97))}
    (engine / "engine.json").write_text(json.dumps(body))
    acceptance = tmp_path / "a.json"
    flags = ["--engine", engine, "--prompts", prompts, "--max-new-tokens", "8"]
    assert run(monkeypatch, "calibrate", *flags, "--output", acceptance) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "every answer has one token: nothing to count" in line
    assert not acceptance.exists()
    acceptance.write_text(json.dumps({"positions": 10, "paths": [{"choice": [0], "count": 4}]}))
    files = ["--acceptance", acceptance, "--cost", flat(tmp_path / "c.json"), "--output", tmp_path / "t.json"]
    assert run(monkeypatch, "search", *flags, *files, "--confirm", "1") == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "predicted 1.40x, not measured: every answer has one token" in out
    assert "nan" not in out
    assert json.loads((tmp_path / "t.json").read_text(), parse_constant=pytest.fail)["measured"][0]["speedup"] is None


def test_free_nodes_are_all_taken(
    engine: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    acceptance = tmp_path / "a.json"
    flags = ["--engine", engine, "--prompts", prompts, "--max-new-tokens", "16"]
    assert run(monkeypatch, "calibrate", *flags, "--output", acceptance) == 0
    files = ["--acceptance", acceptance, "--cost", flat(tmp_path / "c.json"), "--output", tmp_path / "t.json"]
    assert run(monkeypatch, "search", *files, "--nodes", "3", "--nodes", "4") == 0
    assert load_tree(str(tmp_path / "t.json")).num_nodes in (3, 4)
    assert run(monkeypatch, "search", *files) == 0
    counted = Acceptance.load(acceptance)
    walk = counted.walk(load_tree(str(tmp_path / "t.json")))
    best = json.loads((tmp_path / "t.json").read_text())["predicted"]["tokens_per_step"]
    assert walk is not None
    assert walk[0] == pytest.approx(best, abs=1e-4)
    assert best > 2  # these heads draft well
    capfd.readouterr()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["search"], "--acceptance: got no engine"),
        (["search", "--engine", "ENGINE"], "--prompts"),
        (["search", "--acceptance", "a.json", "--cost", "c.json", "--confirm", "2"], "--confirm: got no engine"),
        (["search", "--acceptance", "absent.json", "--cost", "c.json"], "absent.json"),
        (["search", "--engine", "ENGINE", "--prompts", "PROMPTS", "--batch", "4"], "--batch"),
        (["search", "--acceptance", "a", "--cost", "c", "--picture", "tree.gif"], ".svg or .png"),
        (["search", "--acceptance", "a", "--cost", "c", "--max-draft-len", "0"], "--max-draft-len"),
        (["search", "--acceptance", "a", "--cost", "c", "--output", "absent/t.json"], "no such directory"),
        (["calibrate", "--engine", "ENGINE", "--prompts", "PROMPTS", "--max-new-tokens", "1"], "--max-new-tokens"),
        (["calibrate", "--engine", "ENGINE", "--prompts", "absent.jsonl"], "absent.jsonl"),
        (["cost", "--engine", "absent"], "absent"),
        (["cost"], "neither --engine nor --gpu"),
        (["cost", "--engine", "ENGINE", "--gpu", "h100"], "--gpu too"),
        (["cost", "--gpu", "h100"], "no --ckpt"),
        (["cost", "--gpu", "v100", "--ckpt", "absent"], "'v100'"),
        (["cost", "--gpu", "h100", "--ckpt", "absent"], "absent"),
        (["cost", "--engine", "ENGINE", "--batch", "0"], "--batch"),
        (["cost", "--engine", "ENGINE", "--past-length", "5000"], "--past-length"),
        (["cost", "--engine", "ENGINE", "--past-length", "8", "--past-length", "100", "--max-nodes", "64"], "got 100"),
        ([*SEARCHED, "--past-length", "0"], "--past-length: got 0; expected 1 .. 127"),
        ([*SEARCHED, "--past-length", "128"], "--past-length: got 128; expected 1 .. 127"),
        ([*SEARCHED, "--nodes", "100"], "--nodes: got 100, and --max-draft-len 63; expected 64 or less"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(
    flags: list[str],
    said: str,
    engine: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("acceptance.measure_acceptance", "cost.measure_cost"):  # all is refused before anything is run
        monkeypatch.setattr(f"medusa_export.engines.tuning.{name}", lambda *_, **__: pytest.fail("something was run"))
    before = sorted(path.name for path in tmp_path.iterdir())
    given = [{"ENGINE": str(engine), "PROMPTS": str(prompts)}.get(flag, flag) for flag in flags]
    assert run(monkeypatch, *given) == 2
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_batch_that_was_not_measured(
    engine: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--engine", engine, "--prompts", prompts, "--cost", flat(tmp_path / "c.json", batch=8)]
    assert run(monkeypatch, "search", *flags, "--output", tmp_path / "t.json") == 2
    assert "what was measured: batches 8; past lengths" in capfd.readouterr().err
    assert not (tmp_path / "t.json").exists()
