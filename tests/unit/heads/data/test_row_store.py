"""open_rows: what is on the disk after every way to end, and what the next run makes of it."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import OutputError
from medusa_export.heads.data.conversations import Conversation
from medusa_export.heads.data.row_store import KEPT, Maker, open_rows
from medusa_export.heads.decoding.sampling import Sampling

MAKER = Maker("m", Sampling())
CHATS = [Conversation(f"id{i}", "s", "", (f"turn {i}",)) for i in range(4)]
JOURNAL = ".out.jsonl.journal"


def _row(conversation: Conversation, maker: Maker = MAKER, text: str = "ü\u2028") -> dict[str, Any]:
    return {
        "id": conversation.id,
        "source": conversation.source,
        "key": conversation.key,
        "messages": [{"role": "assistant", "content": text}],
        "model": maker.model,
        "sampling": maker.sampling.recorded(),
        "finish_reason": "stop",
        "completion_tokens": 1,
        "usable": True,
    }


def _fill(out: Path, rows: Sequence[dict[str, Any]], conversations: Sequence[Conversation] = CHATS) -> None:
    """As a run that is stopped after so many rows."""
    with pytest.raises(KeyboardInterrupt) as caught, open_rows(out, conversations, MAKER) as store:  # noqa: PT012
        for row in rows:
            store.add(row)
        raise KeyboardInterrupt
    assert caught.value.__notes__ == [KEPT]  # type: ignore[attr-defined]


def _ids(out: Path) -> list[str]:
    return [json.loads(line)["id"] for line in out.read_text("utf-8").split("\n") if line]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_rows_come_back_in_the_order_of_the_conversations(out: Path) -> None:
    _fill(out, [_row(CHATS[2]), _row(CHATS[0])])
    assert not out.exists()
    with open_rows(out, CHATS, MAKER) as store:
        assert [chat.key in store for chat in CHATS] == [True, False, True, False]
        store.add(_row(CHATS[1]))
        store.publish(CHATS)
    assert _ids(out) == ["id0", "id1", "id2"]
    assert os.listdir(out.parent) == ["out.jsonl"]
    lines = out.read_bytes().split(b"\n")
    assert lines[0] == json.dumps(_row(CHATS[0]), ensure_ascii=False).encode()


def test_the_output_is_added_to(out: Path) -> None:
    with open_rows(out, CHATS[:2], MAKER) as store:
        store.add(_row(CHATS[1]))
        store.publish(CHATS[:2])
    renamed = [*CHATS[2:], *(Conversation(f"new {c.id}", "t", c.system, c.turns) for c in CHATS[:2])]
    with open_rows(out, renamed, MAKER) as store:
        assert store.others == 0
        store.add(_row(CHATS[3]))
        store.publish(renamed)
    assert _ids(out) == ["id3", "new id1"]


def test_rows_of_other_runs_are_counted(out: Path) -> None:
    cold, hot = Maker("m", Sampling()), Maker("m", Sampling(temperature=1.0))
    _fill(out, [_row(CHATS[0], cold), _row(CHATS[1], hot), _row(CHATS[2], Maker("n", Sampling())), _row(CHATS[3])])
    with open_rows(out, CHATS[:3], MAKER) as store:
        assert store.others == 3  # another temperature, another model, another prompt
        assert CHATS[0].key in store
        assert CHATS[1].key not in store


@pytest.mark.parametrize("damage", [b'{"key": "a', b"\0\0\0", b"", b"{}\n", b"\0\0\n"])
def test_a_torn_journal(out: Path, damage: bytes) -> None:
    _fill(out, [_row(CHATS[0])])
    journal = out.parent / JOURNAL / "rows.jsonl"
    with journal.open("ab") as file:
        file.write(damage)
    _fill(out, [_row(CHATS[1])])
    with open_rows(out, CHATS, MAKER) as store:
        assert [row["id"] for row in store.rows(CHATS)] == ["id0", "id1"]


def test_every_length_of_a_torn_line(out: Path) -> None:
    _fill(out, [_row(CHATS[0]), _row(CHATS[1])])
    journal = out.parent / JOURNAL / "rows.jsonl"
    whole = journal.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(0, len(whole) + 1, 7):
        journal.write_bytes(whole[:length])
        with open_rows(out, CHATS, MAKER) as store:
            assert (CHATS[0].key in store) == (length >= first)
            store.add(_row(CHATS[3]))
            assert [row["id"] for row in store.rows(CHATS)][-1] == "id3"


def test_a_kill_between_the_rename_and_the_end(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(out, [_row(chat) for chat in CHATS])
    with monkeypatch.context() as patch:
        patch.setattr(
            "medusa_export.heads.data.row_store.shutil.rmtree", lambda path: (_ for _ in ()).throw(SystemExit(9))
        )
        with pytest.raises(SystemExit), open_rows(out, CHATS, MAKER) as store:
            store.publish(CHATS)
    before = out.read_bytes()
    assert (out.parent / JOURNAL).is_dir()
    with open_rows(out, CHATS, MAKER) as store:
        store.publish(CHATS)
    assert out.read_bytes() == before
    assert os.listdir(out.parent) == ["out.jsonl"]


def test_one_process_at_a_time(out: Path) -> None:
    with open_rows(out, CHATS, MAKER) as store:
        store.add(_row(CHATS[0]))
        with pytest.raises(OutputError, match=r"out\.jsonl: got another process"), open_rows(out, CHATS, MAKER):
            pass
        store.publish(CHATS)
    assert _ids(out) == ["id0"]


def test_nothing_is_left_of_a_run_without_rows(out: Path) -> None:
    with pytest.raises(RuntimeError) as caught, open_rows(out, CHATS, MAKER):
        raise RuntimeError
    assert not hasattr(caught.value, "__notes__")
    assert os.listdir(out.parent) == []


def test_a_file_of_somebody_elses_is_left_alone(out: Path) -> None:
    for text in ("{}\n", "text\n", "[" * 10_000, json.dumps({**_row(CHATS[0]), "usable": "yes"})):
        out.write_text(text)
        with pytest.raises(OutputError, match=r"out\.jsonl:1: got a line that"), open_rows(out, CHATS, MAKER):
            pass
        assert out.read_text() == text
        assert os.listdir(out.parent) == ["out.jsonl"]


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nothing")
    for name, message in (
        ("", "a directory"),
        ("fifo", "a FIFO"),
        ("link", "a link to nothing"),
        ("file/out", "cannot be read|no write access"),
        ("absent/out", "got no such directory; expected an existing one"),
    ):
        with pytest.raises(OutputError, match=message), open_rows(tmp_path / name, CHATS, MAKER):
            pass
    assert not (tmp_path / "absent").exists()


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "out.jsonl").write_text("")
    link = tmp_path / "link.jsonl"
    link.symlink_to("real/out.jsonl")
    with open_rows(link, CHATS, MAKER) as store:
        store.add(_row(CHATS[0]))
        store.publish(CHATS)
    assert link.is_symlink()
    assert _ids(tmp_path / "real" / "out.jsonl") == ["id0"]


def test_a_full_disk(out: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OutputError, match="a file larger"), open_rows(out, CHATS, MAKER) as store:  # noqa: PT012
            for chat in CHATS:
                store.add(_row(chat, text="x" * 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with open_rows(out, CHATS, MAKER) as store:
        assert [chat.key in store for chat in CHATS] == [True, True, False, False]
        store.publish(CHATS)
    assert _ids(out) == ["id0", "id1"]
