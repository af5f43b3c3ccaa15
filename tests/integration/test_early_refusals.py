"""What a command refuses it refuses before its first long step: here every long step is a failure of the test."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.exporter.cli import data, export, run, train

LONG = (  # where time goes, by command
    "medusa_export.exporter.pipeline.parts.PartWriter.write",
    "medusa_export.heads.training.cached.run.build_cache",
    "medusa_export.heads.training.cached.run.load_reference",
    "medusa_export.heads.training.full.run.build",
    "medusa_export.exporter.engine_dirs.onnxruntime.write_base_engine",
    "medusa_export.engines.bench.run.run_prompts",
)
MAINS = {"export": export.export_main, "train": train.train_main, "data": data.data_main, "run": run.run_main}


@pytest.fixture
def place(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Any, tiny_tokenizer: Any, monkeypatch: Any
) -> Path:
    """A model, heads of three layers, conversations, an adapter beside weights, and what is in the way of outputs."""

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("a long step began")

    for name in LONG:
        monkeypatch.setattr(name, too_late)
    tiny_tokenizer(tiny_checkpoint(tmp_path / "model"))
    tiny_tokenizer(tiny_checkpoint(tmp_path / "adapted"), chat_template=False)
    (tmp_path / "adapted/adapter_config.json").write_text("{}")
    tiny_tokenizer(tiny_checkpoint(tmp_path / "bare"), chat_template=False)
    tiny_heads(tmp_path / "heads", "v2", num_layers=3)
    tiny_heads(tmp_path / "own", "v1")
    row = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3 w4"}]}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row | {"id": number}) + "\n" for number in range(4)))
    others = {
        "key": "k",
        "messages": row["messages"],
        "model": "another",
        "sampling": {},
        "usable": True,
        "completion_tokens": 1,
    }
    (tmp_path / "others.jsonl").write_text(json.dumps(others) + "\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


EXPORT, TRAIN, DATA = "--ckpt model --heads own", "--data data.jsonl --output made", "--prompts data.jsonl"
CASES = [
    ("export", f"{EXPORT} --output taken", "taken: got files, but no medusa.json"),
    ("export", "--ckpt adapted --heads own", "adapter_config.json: got a PEFT adapter .* merge the adapter first"),
    ("export", "--ckpt bare --heads own", "no chat template; .* pass --chat-template FILE to medusa-export"),
    ("export", f"{EXPORT} --chat-template absent.jinja", "--chat-template absent.jinja: got no such file"),
    ("export", f"{EXPORT} --revision main", "--revision: got main for the local path model"),
    ("export", f"{EXPORT} --draft-vocab -1", "--draft-vocab: got -1"),
    ("train", f"--ckpt model {TRAIN} --heads heads --num-layers 1", "got 3 heads of 3 layers; expected at most 3 heads of 1"),
    ("train", f"--ckpt model {TRAIN} --heads heads --num-heads 2", "got 3 heads of 3 layers; expected at most 2 heads of 3"),
    ("train", f"--ckpt model {TRAIN} --reference --heads heads --num-heads 4", "expected 4 heads of 3"),
    ("train", f"--ckpt model {TRAIN} --heads own", "got heads with lm_heads of their own"),
    ("train", f"--ckpt model {TRAIN} --heads absent", "absent: got no such file or directory"),
    ("train", "--ckpt model --data data.jsonl --output taken", "taken: got something in it"),
    ("train", f"--ckpt adapted {TRAIN}", "merge the adapter first"),
    ("train", f"--ckpt bare {TRAIN}", "pass --chat-template FILE"),
    ("train", f"--ckpt model {TRAIN} --revision main", "--revision: got main for the local path model"),
    ("data", f"--model model {DATA} --output others.jsonl", "others.jsonl: got 1 rows of other prompts, another model"),
    ("data", f"--model adapted {DATA} --output made.jsonl", "merge the adapter first"),
    ("data", f"--model bare {DATA} --output made.jsonl", "pass --chat-template FILE"),
    ("data", f"--model model {DATA} --output made.jsonl --revision main", "--revision: got main for the local path"),
    ("data", f"--server http://127.0.0.1:9 {DATA} --output made.jsonl --revision main", "--revision requires --model"),
    ("run", "--engine model --prompts data.jsonl --reference adapted", "merge the adapter first"),
    ("run", "--engine model --prompts data.jsonl --revision main", "--revision requires --reference"),
    ("run", "--engine model --prompts data.jsonl --report absent/r.json", "absent/r.json: got no such directory"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "flags", "line"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_before_the_first_long_step(
    command: str, flags: str, line: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(sys, "argv", [f"medusa-{command}", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        MAINS[command]()
    out, err = capfd.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert len(err.splitlines()) == 1

    assert re.search(line, err), err
    assert "report this" not in err
    assert sorted(place.rglob("*")) == before


def test_heads_that_are_given_say_their_shape(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks a head, without --num-layers 3."""
    seen: list[Any] = []
    monkeypatch.setattr(
        "medusa_export.heads.training.cached.run.train_fast", lambda *given, **_: seen.append(given[5]) and None
    )
    flags = "--ckpt model --data data.jsonl --output made --heads heads"
    monkeypatch.setattr(sys, "argv", ["medusa-train", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        train.train_main()
    assert not stopped.value.code
    assert (seen[0].num_heads, seen[0].num_layers, seen[0].own_lm_head) == (3, 3, False)
