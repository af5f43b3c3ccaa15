"""Output directories: complete or absent, whatever ends the process; the manifest finds every later change."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.artifacts import hashing, staging
from medusa_export.core.artifacts.manifest import (
    check_free_space,
    hash_files,
    is_up_to_date,
    output_directory,
    read_manifest,
    verify_manifest,
)
from medusa_export.core.artifacts.staging import require_idle
from medusa_export.core.errors import ConfigError, OutputError

INPUTS = {"model.safetensors": "ab" * 32}
ARGUMENTS = {"format": "fp16", "tp": 1}
HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # sha256sum of "hello"

SLOW_WRITER = """
import sys, time
from pathlib import Path
from medusa_export.core.artifacts.manifest import output_directory
with output_directory(Path(sys.argv[1]), inputs={}, arguments={}) as work:
    (work.path / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


def _make(out: Path) -> Path:
    with output_directory(out, inputs=INPUTS, arguments=ARGUMENTS) as work:
        (work.path / "sub").mkdir()
        (work.path / "a.bin").write_text("hello")
        (work.path / "sub/b.json").write_text("{}")
    return out


def _write_and(out: Path, action: Callable[[], Any]) -> None:
    with output_directory(out, inputs={}, arguments={}) as work:
        (work.path / "half").write_text("x")
        action()


def test_a_complete_output(tmp_path: Path) -> None:
    out = _make(tmp_path / "deep/er/out")
    assert sorted(os.listdir(out)) == ["a.bin", "medusa.json", "sub"]
    body = json.loads((out / "medusa.json").read_text())
    assert body["files"] == {
        "a.bin": {"size": 5, "sha256": HELLO},
        "sub/b.json": {"size": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"},
    }
    assert body["format_version"] == 1
    assert body["inputs"] == INPUTS
    assert body["arguments"] == ARGUMENTS
    assert body["tool_version"] == body["versions"]["medusa-export"]
    assert body["created"].endswith("+00:00")
    assert "numpy" in body["versions"]
    assert shlex.split(body["command"]) == [Path(sys.argv[0]).name, *sys.argv[1:]]
    assert read_manifest(out) == body
    assert verify_manifest(out) == []
    assert os.listdir(tmp_path / "deep/er") == ["out"]


def test_the_output_appears_only_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_directory(out, inputs=INPUTS, arguments=ARGUMENTS) as work:
        assert work.path.parent == tmp_path / ".out.partial"
        assert not out.exists()
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert verify_manifest(_make(tmp_path / "out")) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_body_fails(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(error):
        _write_and(tmp_path / "out", fail)
    assert os.listdir(tmp_path) == []


def _start(out: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, str(out)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    return writer


def test_kill_9_leaves_no_output_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    writer = _start(out)
    writer.kill()
    writer.wait()
    assert os.listdir(tmp_path) == [".out.partial"]
    assert (tmp_path / ".out.partial/files/half").exists()
    (tmp_path / ".out2.partial").mkdir()  # of another output
    _make(out)
    assert verify_manifest(out) == []
    assert sorted(os.listdir(tmp_path)) == [".out2.partial", "out"]
    assert not (out / "half").exists()


def test_sigterm_cleans_up(tmp_path: Path) -> None:
    writer = _start(tmp_path / "out")
    writer.send_signal(signal.SIGTERM)
    assert writer.wait() == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []


def test_a_second_writer_is_refused_at_once(tmp_path: Path) -> None:
    writer = _start(tmp_path / "out")
    for attempt in (lambda: _make(tmp_path / "out"), lambda: require_idle(tmp_path / "out")):
        with pytest.raises(OutputError, match="out: got another process writing it; expected one at a time"):
            attempt()
    assert (tmp_path / ".out.partial/files/half").exists()
    _make(tmp_path / "other")
    writer.kill()
    writer.wait()
    require_idle(tmp_path / "out")
    _make(tmp_path / "out")


def test_a_second_writer_in_the_same_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="another process"):
        _write_and(out, lambda: _make(out))
    assert os.listdir(tmp_path) == []


def test_an_output_that_comes_up_while_the_lock_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is seen before the body runs, not hours later."""
    make_locked = staging.locking.make_locked

    def publish_and_lock(path: Path, out: Path) -> int:
        monkeypatch.undo()
        _make(out)
        return make_locked(path, out)

    monkeypatch.setattr(staging.locking, "make_locked", publish_and_lock)
    with (
        pytest.raises(OutputError, match="complete and up to date"),
        output_directory(tmp_path / "out", inputs=INPUTS, arguments=ARGUMENTS),
    ):
        pytest.fail("the body must not run")
    assert os.listdir(tmp_path) == ["out"]
    assert verify_manifest(tmp_path / "out") == []


def test_something_in_the_way_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="something that appeared meanwhile"):
        _write_and(out, lambda: (out / "mine").mkdir(parents=True))
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["mine"]


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    require_idle(tmp_path / "out")
    assert verify_manifest(_make(tmp_path / "out")) == []
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "out: no file locks there (No locks available): do not make it twice at the same time"
    )


def test_something_else_with_the_name_of_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine").touch()
    with pytest.raises(OutputError, match="no write access"):
        _make(tmp_path / "out")
    assert os.listdir(tmp_path / "elsewhere") == ["mine"]


def _os_error() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _library_error() -> None:
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def _really_full() -> None:
    Path("/dev/full").write_text("x")


@pytest.mark.parametrize("fill", [_os_error, _library_error, _really_full])
def test_a_full_disk(tmp_path: Path, fill: Callable[[], None]) -> None:
    with pytest.raises(OutputError, match=r"out: got no space left on the disk.*; free some space"):
        _write_and(tmp_path / "out", fill)
    assert os.listdir(tmp_path) == []


def test_other_errors_of_the_body_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), output_directory(tmp_path / "out", inputs={}, arguments={}):
        (tmp_path / "absent").read_text()


def test_a_parent_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    parents = [tmp_path / "file", tmp_path / "file/deeper", Path("/proc")]
    for parent in parents:
        with pytest.raises(OutputError, match="no write access"):
            _make(parent / "out")
    assert (tmp_path / "file").read_text() == "x"


def test_up_to_date(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not is_up_to_date(out, INPUTS, ARGUMENTS)
    _make(out)
    assert is_up_to_date(out, INPUTS, ARGUMENTS)
    assert not is_up_to_date(out, {"model.safetensors": "cd" * 32}, ARGUMENTS)
    assert not is_up_to_date(out, {**INPUTS, "more": "ab"}, ARGUMENTS)
    assert not is_up_to_date(out, INPUTS, {**ARGUMENTS, "tp": 2})
    assert not is_up_to_date(out, INPUTS, {"format": "fp16"})
    (out / "a.bin").write_text("hell")
    assert not is_up_to_date(out, INPUTS, ARGUMENTS)


def test_arguments_are_compared_as_json_gives_them_back(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"ckpt": Path("/m"), "choices": ((0,), (0, 1)), "limit": None}
    with output_directory(tmp_path / "out", inputs={}, arguments=arguments):
        pass
    assert is_up_to_date(tmp_path / "out", {}, arguments)
    assert not is_up_to_date(tmp_path / "out", {}, {**arguments, "choices": ((0,), (0, 2))})
    with pytest.raises(TypeError, match="cannot be kept"):
        is_up_to_date(tmp_path / "out", {}, {"x": object()})


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        (INPUTS, ARGUMENTS, "complete and up to date"),
        ({"model.safetensors": "00"}, ARGUMENTS, r"other inputs \(model\.safetensors\)"),
        (INPUTS, {"format": "fp8", "tp": 1}, r"other arguments \(format\).*choose another directory or delete"),
    ],
)
def test_a_present_output_is_never_overwritten(
    tmp_path: Path, inputs: dict[str, str], arguments: dict[str, Any], message: str
) -> None:
    out = _make(tmp_path / "out")
    with pytest.raises(OutputError, match=message), output_directory(out, inputs=inputs, arguments=arguments):
        pytest.fail("the body must not run")
    assert verify_manifest(out) == []


def test_other_things_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    damaged = _make(tmp_path / "damaged")
    (damaged / "a.bin").unlink()
    for name, message in (
        ("file", "got a file"),
        ("full", "files, but no medusa.json"),
        ("damaged", r"a\.bin: missing"),
    ):
        with pytest.raises(OutputError, match=message):
            _make(tmp_path / name)
    assert (tmp_path / "full/mine.txt").read_text() == "x"


def test_a_mount_point_cannot_be_renamed_onto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(OutputError, match=r"got a mount point.*use .*out/model"):
        _make(tmp_path / "out")


def test_a_link_as_output_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    _make(tmp_path / "out")
    assert verify_manifest(tmp_path / "real") == []
    assert (tmp_path / "out").is_symlink()


def test_a_link_inside_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="link: got a link"),
        output_directory(tmp_path / "out", inputs={}, arguments={}) as work,
    ):
        (work.path / "link").symlink_to("/etc/hostname")
    assert os.listdir(tmp_path) == []


def _flip(out: Path) -> None:
    (out / "a.bin").write_text("hellO")


def _add(out: Path) -> None:
    (out / "sub/new").write_text("x")


def _link(out: Path) -> None:
    (out / "a.bin").unlink()
    (out / "a.bin").symlink_to("absent")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_flip, "a.bin: its content is not what was written (SHA-256 differs)"),
        (_add, "sub/new: not in medusa.json"),
        (_link, "a.bin: a link"),
        (lambda out: (out / "sub/b.json").unlink(), "sub/b.json: missing"),
        (lambda out: shutil.rmtree(out / "sub"), "sub/b.json: missing"),
        (lambda out: (out / "a.bin").write_text("hello!"), "a.bin: 6 bytes, 5 were written"),
    ],
)
def test_verify_finds_every_change(tmp_path: Path, damage: Callable[[Path], Any], problem: str) -> None:
    out = _make(tmp_path / "out")
    damage(out)
    assert verify_manifest(out) == [f"{out}/{problem}"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inputs", None),
        ("inputs", []),
        ("arguments", []),
        ("files", []),
        ("files", {"a.bin": 5}),
        ("format_version", 2),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, name: str, value: object) -> None:
    out = _make(tmp_path / "out")
    body = {**read_manifest(out), name: value}
    (out / "medusa.json").write_text(json.dumps(body))
    with pytest.raises(OutputError, match="make it again"):
        read_manifest(out)
    assert len(verify_manifest(out)) == 1
    with pytest.raises(OutputError, match="make it again"):
        _make(out)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 99}'])
def test_no_manifest_at_all(tmp_path: Path, text: str) -> None:
    (tmp_path / "medusa.json").write_text(text)
    assert len(verify_manifest(tmp_path)) == 1
    (tmp_path / "medusa.json").unlink()
    assert "no such file" in verify_manifest(tmp_path)[0]


def test_hash_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.write_text("hello")
    monkeypatch.setattr(hashing, "CHUNK_BYTES", 2)
    assert hash_files([file]) == {str(file): HELLO}
    others = [tmp_path / f"{size}" for size in range(20)]
    for size, path in enumerate(others):
        path.write_bytes(b"x" * size)
    expected = {str(path): hashlib.sha256(b"x" * size).hexdigest() for size, path in enumerate(others)}
    assert list(hash_files(others).items()) == list(expected.items())
    with pytest.raises(ConfigError, match="absent: got no readable file"):
        hash_files([file, tmp_path / "absent"])


def test_check_free_space(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not/yet/there", 1)
    with pytest.raises(OutputError, match=r"GB free; expected 1000000000\.00 GB"):
        check_free_space(tmp_path, 10**18)


def test_what_engines_import_does_without_torch() -> None:
    """The TensorRT-LLM container and the Triton backend need these files, not a second torch."""
    modules = (
        "core.errors",
        "core.artifacts.manifest",
        "heads.trees.tree",
        "heads.decoding.accept",
        "core.text.tokenizer",
    )
    code = "import sys; " + "; ".join(f"import medusa_export.{name}" for name in modules)
    code += "; sys.exit(bool({'torch', 'transformers', 'safetensors'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
