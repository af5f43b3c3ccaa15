"""Examples do what they say: commands have the flags that are used, scripts run on tiny models, deployments fit the server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import yaml

from medusa_export.engines.serving.options import ServingOptions
from tests.command_lines import unknown_words
from tests.paths import ROOT
from tests.unit.exporter.cli.flags.test_help_page import COMMANDS

EXAMPLES = ROOT / "examples"
DEPLOY = EXAMPLES / "deploy"
GRACE = ServingOptions().grace_s


def command_lines() -> list[tuple[str, str]]:
    """Every medusa-* command of the examples, with the file that it stands in."""
    return [
        (path.name, found)
        for path in sorted(EXAMPLES.rglob("*"))
        if path.suffix in (".sh", ".yaml", ".md", ".py")
        for line in path.read_text(encoding="utf-8").splitlines()
        for found in map("".join, re.findall(r"(?:^ *|run: |\|\| )(medusa-[a-z]+ .*)$|# +(medusa-[a-z]+ --.*)$", line))
    ]


@pytest.mark.parametrize(("file", "line"), command_lines())
def test_commands_have_these_flags(file: str, line: str) -> None:
    assert unknown_words(line) == []


def test_there_are_commands() -> None:
    assert {file for file, _ in command_lines()} >= {
        "vicuna_to_trtllm.sh", "workflow.sh", "gate.yaml", "compose.yaml"
    }  # fmt: skip


@pytest.fixture
def models(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Callable[..., Path], tiny_tokenizer: Any
) -> tuple[Path, Path, Path]:
    """A tiny model, heads for it, and prompts."""
    model = tiny_tokenizer(tiny_checkpoint(tmp_path / "model", dtype=torch.float16))
    heads = tiny_heads(tmp_path / "heads", dtype=torch.float16)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1 w2 w3"}\n{"prompt": "w4 w5"}\n')
    return model, heads, tmp_path / "prompts.jsonl"


def run(*command: object, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_library(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, heads, prompts = models
    out = run(sys.executable, EXAMPLES / "library.py", model, heads, prompts, tmp_path / "out")
    speed, answer = out.splitlines()[:2]
    assert re.fullmatch(r"decoding \d+\.\d\dx, whole answers \d+\.\d\dx, 2 of 2 outputs equal", speed)
    assert re.match(r"\d+ tokens in \d+ steps: ", answer)
    assert len((EXAMPLES / "library.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_vicunas_template() -> None:
    """FastChat's vicuna_v1.1, from its conversation.py: a space after the system prompt and a question, </s> after an answer."""
    template = jinja2.Environment().from_string((EXAMPLES / "vicuna.jinja").read_text(encoding="utf-8"))
    turns = [("user", "Hello!"), ("assistant", "Hi!"), ("user", "How are you?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    said = template.render(messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert said == f"<s>{system} USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT:"
    own = template.render(
        messages=[{"role": "system", "content": "Be brief."}, messages[0]], bos_token="<s>", eos_token="</s>"
    )
    assert own == "<s>Be brief. USER: Hello! "


def served_flags(arguments: list[str]) -> None:
    known = {option for param in COMMANDS["medusa-serve",].params for option in param.opts}
    assert {word for word in arguments if word.startswith("--")} <= known


def test_compose() -> None:
    (service,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values()
    served_flags(service["command"])
    assert service["command"][service["command"].index("--api-key-env") + 1] in service["environment"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert int(service["stop_grace_period"].rstrip("s")) > GRACE
    assert ":8000/health" in service["healthcheck"]["test"][-1]
    compile(service["healthcheck"]["test"][-1], "healthcheck", "exec")
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    served_flags(yaml.safe_load(entry))


def test_kubernetes() -> None:
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    served_flags(container["args"])
    assert container["args"][container["args"].index("--api-key-env") + 1] in [
        each["name"] for each in container["env"]
    ]
    assert pod["terminationGracePeriodSeconds"] > GRACE
    probes = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {"startupProbe": "/health", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]


def test_the_gate_stops_what_is_not_faster() -> None:
    jobs = yaml.safe_load((DEPLOY / "gate.yaml").read_text())["jobs"]
    assert jobs["deploy"]["needs"] == "gate"
    runs = [step["run"] for step in jobs["gate"]["steps"] if "run" in step]
    assert not any("|| " in text or "continue-on-error" in text for text in runs)
    assert [text.split()[:2] for text in runs[1:]] == [["medusa-export", "verify"], ["medusa-run", "--engine"]]
    assert "--min-speedup" in runs[2]


@pytest.mark.slow
def test_the_workflow(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """examples/workflow.sh from prompts to a repository that is checked, by the flags of every step."""
    prompts = tmp_path / "many.jsonl"
    prompts.write_text("".join(f'{{"prompt": "w{n} w{n + 1}"}}\n' for n in range(12)))
    small = {
        "PROMPTS": prompts,
        "QUESTIONS": prompts,
        "COUNT": 12,
        "TOKENS": 8,
        "STEPS": 1,
        "ASKED": 2,
    }
    without_server = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    out = run(
        EXAMPLES / "workflow.sh", models[0], tmp_path / "out", **{k: str(v) for k, v in small.items()}, **without_server
    )
    titles = re.findall(r"^== \d ([\w -]+)", out, flags=re.MULTILINE)
    assert titles == ["data", "heads", "quantization-aware training", "export", "verify", "run", "Triton"]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["parity"]["prompts"] == 2
    assert {path.name for path in (tmp_path / "out/repository").iterdir()} >= {"medusa", "medusa_unary", "launch.sh"}
    assert "repository: complete and consistent" in out
    assert "no tritonserver on the PATH" in out
