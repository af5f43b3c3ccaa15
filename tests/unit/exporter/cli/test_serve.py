"""medusa-serve refuses what it cannot serve before it loads anything."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medusa_export.core.flags import flags_of
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.exporter.cli.serve import ORIGIN, serve_main

STAND_IN: Any = SimpleNamespace(
    close=lambda: None, scheduler=SimpleNamespace(decoder=SimpleNamespace(slots=1)), options=ServingOptions()
)


@pytest.fixture
def engine(tiny_engine: Callable[..., Any]) -> Path:
    path: Path = tiny_engine().path
    return path


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr("sys.argv", ["medusa-serve", *map(str, arguments)])
    monkeypatch.setattr(
        "medusa_export.engines.serving.openai.server.run_front", lambda *_, **__: pytest.fail("it serves")
    )
    with pytest.raises(SystemExit) as stopped:
        serve_main()
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_an_address_in_use(engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} (Address already in use)" in refused(
            monkeypatch, capsys, "--engine", engine, "--port", port
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--port", 99999), "--port: got 99999"),
        (("--port", -1), "--port: got -1"),
        (("--host", "nowhere.invalid"), "nowhere.invalid"),
        (("--max-concurrent", 0), "--max-batch: got 0"),
        (("--max-queue", -1), "--max-queue: got -1"),
        (("--timeout-s", "nan"), "--timeout-s: got nan"),
        (("--tree", "none.json"), "none.json"),
        (("--api-key-env", "NOBODY_SET_THIS"), "no such variable"),
        (("--api-key-env", "SPACED"), "characters that a header cannot hold"),
        (("--name", "a\ud800"), "--name: got a\\xd800"),
        (("--cors-origin", "chat.example"), "--cors-origin: got chat.example"),
        (("--cors-origin", "https://chat.example/"), "--cors-origin: got https://chat.example/"),
        (("--cors-origin", "https://Chat.example"), "--cors-origin"),
        (("--cors-origin", "https://chat.example:443"), "--cors-origin"),
        (("--cors-origin", "http://a b"), "--cors-origin"),
        (("--kv-cache-mb", 1, "--max-text-bytes", 0), "--max-text-bytes"),
    ],
)
def test_flags(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: Any, message: str
) -> None:
    monkeypatch.setenv("SPACED", "a b")
    err = refused(monkeypatch, capsys, "--engine", engine, "--port", 0, *flags)
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "https://chat.example",
        "http://localhost:3000",
        "http://[::1]:80443",
        "https://a.example:80",
        "app://x",
    ],
)
def test_origins_that_browsers_send(engine: Path, monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    assert ORIGIN.fullmatch(origin) or origin in ("*", "null")
    served = []
    monkeypatch.setattr(
        "medusa_export.engines.serving.openai.server.run_front", lambda front, *_, **__: served.append(front.options)
    )
    monkeypatch.setattr("medusa_export.engines.serving.text_service.TextService", lambda *_, **__: STAND_IN)
    monkeypatch.setattr("sys.argv", ["medusa-serve", "--engine", str(engine), "--port", "0", "--cors-origin", origin])
    with pytest.raises(SystemExit) as stopped:
        serve_main()
    assert not stopped.value.code
    assert served[0].cors_origins == (origin,)


def test_lines_of_json(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What is wrong, and what to be warned of, in the log's form."""
    monkeypatch.setattr("medusa_export.engines.serving.openai.server.run_front", lambda *_, **__: None)
    monkeypatch.setattr("medusa_export.engines.serving.text_service.TextService", lambda *_, **__: STAND_IN)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flags, code in ((("--port", str(port)), 2), (("--port", "0", "--host", "0.0.0.0"), 0)):
            command = ["medusa-serve", "--engine", str(engine), "--log-format", "json", *flags]
            monkeypatch.setattr("sys.argv", command)
            with pytest.raises(SystemExit) as stopped:
                serve_main()
            assert (stopped.value.code or 0) == code
    captured = capsys.readouterr()
    assert captured.err == "", "nothing beside the log"
    assert all(json.loads(line)["level"] == "INFO" for line in captured.out.splitlines())
    said = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "medusa-serve"]
    assert [level for level, _ in said] == ["ERROR", "WARNING"]
    assert "Address already in use" in said[0][1]
    assert said[1][1].startswith("0.0.0.0 takes requests")


def test_every_option_of_a_server_is_a_flag() -> None:
    assert [item.field for item in flags_of(ServingOptions)] == [item.name for item in fields(ServingOptions)]


def test_another_backend(engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    info = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps({**info, "backend": "tensorrt-llm"}))
    assert "an engine for tensorrt-llm" in refused(monkeypatch, capsys, "--engine", engine)
    assert "no such" in refused(monkeypatch, capsys, "--engine", engine / "absent")


@pytest.mark.slow
def test_output_to_a_full_device_is_one_line(engine: Path) -> None:
    """It has nobody to tell that it serves, so it does not."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    program = Path(sys.executable).with_name("medusa-serve")
    with full.open("w") as out:
        command = [program, "--engine", engine, "--port", "0"]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: standard output: No space left on device\n",
    )


def test_a_warning_where_anybody_may_ask(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SERVE_KEY", "sesame")
    served = []
    monkeypatch.setattr(
        "medusa_export.engines.serving.openai.server.run_front", lambda front, *_, **__: served.append(front.options)
    )
    for flags, warns in (
        ((), False),
        (("--host", "0.0.0.0"), True),
        (("--host", "0.0.0.0", "--api-key-env", "SERVE_KEY"), False),
    ):
        monkeypatch.setattr("sys.argv", ["medusa-serve", "--engine", str(engine), "--port", "0", *flags])
        with pytest.raises(SystemExit) as stopped:
            serve_main()
        assert not stopped.value.code
        captured = capsys.readouterr()
        assert ("warning: 0.0.0.0" in captured.err) == warns
        assert "sesame" not in captured.out + captured.err
    assert [options.api_key for options in served] == [None, None, "sesame"]
    assert {options.name for options in served} == {"tiny"}
