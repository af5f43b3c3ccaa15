"""The commands: exit codes, one line an error, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import logging
import os
import pickle
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from medusa_export.core.errors import OutputError
from medusa_export.engines.bench.run import RunArguments
from medusa_export.exporter.cli import export as cli
from medusa_export.exporter.cli.run import run_main
from medusa_export.exporter.job.arguments import ExportArguments
from medusa_export.heads.trees.tree import PRESETS
from medusa_export.quantize.formats import FORMATS, KV_CACHE

BIN = Path(sys.executable).parent


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def console(command: str, *flags: object, **environment: str) -> Result:
    """The installed console script, in a process of its own."""
    result = subprocess.run(
        [BIN / command, *map(str, flags)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    return Result(result.returncode, result.stdout, without_ends(result.stderr))


def without_ends(text: str) -> str:
    """stderr but for what every export says of the end of answers."""
    return re.sub(r"(?m)^end-of-sequence token.*\n", "", text)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """``run("export", *flags)``: the entry point that the console script calls, in this process."""

    def call(command: str, *flags: object) -> Result:
        monkeypatch.setattr(sys, "argv", [f"medusa-{command}", *map(str, flags)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            {"export": cli.export_main, "run": run_main}[command]()
        code = stopped.value.code
        assert isinstance(code, int)
        out, err = capfd.readouterr()
        return Result(code, out, without_ends(err))

    yield call
    logging.getLogger().setLevel(logging.WARNING)


def _each(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


@dataclass
class Inputs:
    """A tiny model with a tokenizer, heads for it, and the directory that both lie in."""

    root: Path
    model: Path
    heads: Path

    def flags(self, **changes: object) -> list[str]:
        """The smallest export; ``None`` drops a flag, and "" makes it a switch."""
        given = {"ckpt": self.model, "heads": self.heads, "engine": "none", "output": self.root / "out", **changes}
        repeated = [(name, each) for name, value in given.items() for each in _each(value)]
        pairs = ((f"--{name.replace('_', '-')}", value) for name, value in repeated if value is not None)
        return [str(part) for pair in pairs for part in pair if part != ""]


@pytest.fixture
def inputs(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Callable[..., Path], tiny_tokenizer: Any
) -> Inputs:
    model = tiny_tokenizer(tiny_checkpoint(tmp_path / "model", dtype=torch.float16))
    return Inputs(tmp_path, model, tiny_heads(tmp_path / "heads", dtype=torch.float16))


def one_line(result: Result, code: int = 2) -> str:
    """The error's line, after checking that it is all there is."""
    assert (result.code, result.out) == (code, "")
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    return line


class Touch:
    """Unpickled, it creates a file: what a hostile checkpoint would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def spy(monkeypatch: pytest.MonkeyPatch, function: str, result: object) -> list[Any]:
    """The first arguments that a function gets from now on; it only returns ``result``."""
    seen: list[Any] = []

    def called(*given: object) -> object:
        seen.append(given[0])
        return result

    monkeypatch.setattr(function, called)
    return seen


class TestExport:
    def test_success_and_again(self, run: Run, inputs: Inputs) -> None:
        flags = inputs.flags()
        assert run("export", *flags) == (0, f"wrote {inputs.root / 'out'}\n", "")
        assert run("export", *flags) == (0, f"up to date: {inputs.root / 'out'}\n", "")
        line = one_line(run("export", *flags, "--tp", "2"))
        assert "other arguments (tp)" in line

    @pytest.mark.slow
    def test_one_directory_is_enough(
        self, tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any, tiny_tokenizer: Any
    ) -> None:
        """A fresh process, because only there transformers' own warnings show."""
        ckpt = tiny_heads(tiny_tokenizer(tiny_checkpoint(tmp_path / "combined")), "modelopt")
        assert console("medusa-export", "--ckpt", ckpt, "--quant", "fp8") == (0, f"wrote {ckpt}-fp8\n", "")
        assert (tmp_path / "combined-fp8/engine/engine.json").is_file()

    def test_every_flag_reaches_the_export(
        self, run: Run, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = spy(monkeypatch, "medusa_export.exporter.pipeline.export.export", True)
        expected = ExportArguments(
            inputs.model, tmp_path / "o", "fp8", inputs.heads, "fp8", True, "bfloat16", 4, "cpu-4", tmp_path / "calib",
            5, "none", 99, 100, tmp_path / "scales", 64, ("*mlp.proj*", "*attention.dense*"), "1.0", 2, "hf",
            tmp_path / "served", tmp_path / "costs", "b200", "sm89", 16, "v1", tmp_path / "template",
        )  # fmt: skip
        default = ExportArguments(inputs.model, inputs.root / "model-none")
        unset = {
            item.name for item in fields(ExportArguments) if getattr(expected, item.name) == getattr(default, item.name)
        }
        assert unset == {"ckpt"}
        flags = {item.name: getattr(expected, item.name) for item in fields(ExportArguments)} | {"quant_heads": ""}
        assert run("export", *inputs.flags(**flags)).code == 0
        assert seen == [expected]
        run("export", "--ckpt", inputs.model)
        assert seen[1] == default


def remove(name: str) -> Callable[[Inputs], dict[str, object]]:
    def change(inputs: Inputs) -> dict[str, object]:
        (inputs.model / name).unlink()
        return {}

    return change


def flags(**changes: object) -> Callable[[Inputs], dict[str, object]]:
    return lambda _: changes


def tree(text: str) -> Callable[[Inputs], dict[str, object]]:
    def change(inputs: Inputs) -> dict[str, object]:
        (inputs.root / "tree.json").write_text(text)
        return {"tree": inputs.root / "tree.json"}

    return change


def cut_short(inputs: Inputs) -> dict[str, object]:
    path = inputs.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return {}


def no_header(inputs: Inputs) -> dict[str, object]:
    (inputs.heads / "medusa_lm_head.safetensors").write_bytes(b"\xff" * 500)
    return {}


def hostile_base(inputs: Inputs) -> dict[str, object]:
    (inputs.model / "model.safetensors").unlink()
    (inputs.model / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(inputs.root / "owned")))
    return {}


def hostile_heads(inputs: Inputs) -> dict[str, object]:
    path = inputs.root / "heads.pt"
    torch.save({"0.0.linear.weight": Touch(inputs.root / "owned")}, path)
    return {"heads": path}


def occupied(inputs: Inputs) -> dict[str, object]:
    (inputs.root / "mine").mkdir()
    (inputs.root / "mine/thesis.tex").write_text("x")
    return {"output": inputs.root / "mine"}


def bad_config(inputs: Inputs) -> dict[str, object]:
    (inputs.model / "config.json").write_text("{")
    return {}


def experts(inputs: Inputs) -> dict[str, object]:
    path = inputs.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "mixtral", "num_local_experts": 8}))
    return {}


def bad_prompts(inputs: Inputs) -> dict[str, object]:
    (inputs.root / "calib.jsonl").write_text('{"prompt": "w1"}\n{"question": "w2"}\n')
    return {"calib": inputs.root / "calib.jsonl"}


ERRORS: dict[str, tuple[Callable[[Inputs], dict[str, object]], str]] = {
    "no flags at all": (flags(ckpt=None), "--ckpt: got nothing"),
    "missing checkpoint": (flags(ckpt="absent"), "absent/config.json: got no such file"),
    "no weights": (remove("model.safetensors"), "expected one of model.safetensors"),
    "damaged config": (bad_config, "config.json: got unreadable JSON"),
    "cut short": (cut_short, "model.safetensors: got an unreadable file"),
    "no safetensors": (no_header, "medusa_lm_head.safetensors: got an unreadable file"),
    "hostile pickle": (hostile_base, "pytorch_model.bin: got a pickle that cannot be read safely"),
    "hostile heads": (hostile_heads, "heads.pt: got a pickle that cannot be read safely"),
    "no heads": (flags(heads=None), "got no Medusa heads in it; expected heads; pass --heads"),
    "missing heads": (flags(heads="absent"), "absent: got no such file or directory"),
    "no tokenizer": (remove("tokenizer.json"), "got no tokenizer"),
    "no chat template": (
        lambda inputs: {**remove("chat_template.jinja")(inputs), "engine": "onnxruntime"},
        "got no chat template",
    ),
    "unknown format": (
        flags(quant="fp9"),
        f"--quant: got 'fp9'; expected one of {', '.join(FORMATS)}; did you mean fp8?",
    ),
    "unknown cache": (flags(kv_cache="fp4"), "--kv-cache: got 'fp4'; expected one of none, fp8, int8"),
    "unknown engine": (
        flags(engine="vllm"),
        "--engine: got 'vllm'; expected one of onnxruntime, tensorrt, tensorrt-llm, none; choose one of them",
    ),
    "unknown dtype": (flags(dtype="int4"), "--dtype: got 'int4'; expected one of auto, float16, bfloat16;"),
    "16-bit heads only": (flags(quant_heads=""), "leave the heads in 16 bit"),
    "dims of int8": (
        flags(quant="int8_wo"),
        "in format int8_wo: got [80, 64] features over tp 1; expected multiples of",
    ),
    "dims of nvfp4": (flags(quant="nvfp4"), "no tp works with format nvfp4: use --quant fp8"),
    "group size": (
        flags(quant="int4_awq", group_size=32),
        "--group-size: got 32 for int4_awq; expected one of 64, 128; leave --group-size out",
    ),
    "group size of a tensor": (
        flags(quant="fp8", group_size=64),
        "--group-size: got 64 for fp8; expected none: it has no groups",
    ),
    "pipeline": (
        flags(pp=2),
        "--pp: got 2; expected 1 (TensorRT-LLM cannot build the Medusa graph on a stage that is not the last); use --tp 2",
    ),
    "pipeline and tensor": (flags(pp=2, tp=2), "; use --tp 4"),
    "no stage": (flags(pp=0), "--pp: got 0; expected 1"),
    "release without engines": (
        flags(trtllm_version="1.3.0"),
        "--trtllm-version: got 1.3.0, which has no engine backend and so no Medusa; expected at most 1.2.1; stay on 1.2.1, or "
        "serve the ONNX graph (OUT/engine, OUT/onnx)",
    ),
    "old release": (flags(trtllm_version="0.16"), "--trtllm-version: got 0.16; expected 0.17 or later"),
    "no release": (
        flags(trtllm_version="1.0.9"),
        "--trtllm-version: got 1.0.9, which was not released; expected one of",
    ),
    "no release number": (flags(trtllm_version="newest"), "--trtllm-version: got 'newest'"),
    "exclude nothing": (
        flags(quant="fp8", exclude=("*mlp.proj*", "mlp.prj")),
        "--exclude mlp.prj: got no such module; expected a pattern of TensorRT-LLM's names, such as '*mlp.proj*'",
    ),
    "exclude half of a pair": (
        flags(quant="fp8", exclude="*mlp.fc"),
        "--exclude: got only mlp.fc of layer 0; expected both or none (trtllm-build fuses them)",
    ),
    "exclude from 16 bit": (flags(exclude="*mlp.proj*"), "--exclude *mlp.proj*: got format none;"),
    "exclude from rows": (flags(quant="fp8_rowwise", exclude="*mlp.proj*"), "leave --exclude out, or use fp8"),
    "unknown form": (
        flags(format="nope"),
        "--format: got 'nope'; expected one of trtllm, hf, vllm-heads, medusa-v1, medusa-v2;",
    ),
    "smoothed unified form": (
        flags(format="hf", quant="int8_sq"),
        "--format hf with --quant int8_sq: got no writer for it; expected none, fp8, fp8_rowwise or nvfp4; use fp8",
    ),
    "unified form of two ranks": (flags(format="hf", tp=2), "--format hf with --tp: got an option of TensorRT-LLM's"),
    "unified form, integer cache": (flags(format="hf", kv_cache="int8"), "--format hf with --kv-cache int8: got"),
    "heads that medusa-v2 cannot hold": (flags(format="medusa-v2"), "write medusa-v1 instead"),
    "scales of nothing": (flags(quant="fp8", scales="absent"), "absent: got "),
    "experts": (
        experts,
        "config.json: got model_type 'mixtral', a mixture of experts: its router and experts have no place in what is "
        "written; expected one of llama, mistral, qwen2, qwen3;",
    ),
    "missing tree": (flags(tree="oak"), "tree oak: got no such file or preset; expected a JSON file or one of none,"),
    "no JSON tree": (tree("[[0],"), "tree.json: got unreadable JSON"),
    "tree without parent": (tree("[[0], [1, 0]]"), "tree choice [1, 0]: got no parent [1]"),
    "tree too deep": (tree("[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]"), "a path of depth 4; expected at most 3"),
    "empty tree": (flags(tree="none"), "--tree: got an empty tree"),
    "tp does not divide": (flags(tp=3), "4 query heads over tp 3; expected a multiple of 3; use tp 1, 2, 4"),
    "tp 0": (flags(tp=0), "--tp: got 0; expected 1 or more"),
    "long context": (flags(engine="onnxruntime", max_length=129), "--max-length: got 129; expected 16 .. 128"),
    "GPUs of nothing": (
        flags(gpu="sm89"),
        "--gpu: got sm89; expected none: --gpu requires --engine tensorrt; leave --gpu out",
    ),
    "unknown GPU": (flags(engine="tensorrt", gpu="h100"), "--gpu: got 'h100'; expected some of sm80, sm86, sm89"),
    "FP8 on Ampere": (
        flags(engine="tensorrt", gpu="sm80,sm89", quant="fp8"),
        "--gpu sm80: got --quant fp8; expected some of sm89, sm90, sm100, sm103, sm120, sm121: FP8 begins with SM 89; "
        "or take --quant int8_sq",
    ),
    "Hopper ahead of time": (
        flags(engine="tensorrt", gpu="sm89,sm90"),
        "--gpu sm89,sm90: got no GPU on this machine, and TensorRT-RTX has no target sm90; expected",
    ),
    "trees measured on a GPU": (
        flags(engine="tensorrt", gpu="sm89", tree="auto"),
        "--tree auto: got --engine tensorrt, --format trtllm;",
    ),
    "TensorRT beyond the model": (flags(engine="tensorrt", gpu="sm89", max_length=129), "--max-length: got 129"),
    "draft vocabulary": (flags(draft_vocab=-1), "--draft-vocab: got -1"),
    "missing prompts": (flags(calib="absent"), "absent: got no readable file"),
    "bad prompts": (bad_prompts, "calib.jsonl:2: got the keys question"),
    "occupied output": (occupied, "mine: got files, but no medusa.json; expected a new or an empty directory"),
    "output is a file": (lambda inputs: {"output": inputs.heads / "config.json"}, "config.json: got a file"),
    "output under a file": (
        lambda inputs: {"output": inputs.heads / "config.json/out"},
        "config.json: got no write access",
    ),
    "unwritable output": (flags(output="/proc/medusa/out"), "/proc/medusa: got no write access"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error(case: str, run: Run, inputs: Inputs) -> None:
    change, message = ERRORS[case]
    changed = inputs.flags(**change(inputs))
    before = sorted(inputs.root.rglob("*"))
    assert message in one_line(run("export", *changed))
    assert sorted(inputs.root.rglob("*")) == before


@pytest.fixture
def sized(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Callable[..., Path], tiny_tokenizer: Any
) -> Callable[..., Inputs]:
    """``sized(hidden, intermediate)``: inputs whose linears have the sizes that some format asks for."""

    def make(hidden: int, intermediate: int) -> Inputs:
        sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": hidden // 64}
        model = tiny_checkpoint(
            tmp_path / "model", dtype=torch.float16, **sizes, num_key_value_heads=hidden // 64, head_dim=64
        )
        heads = tiny_heads(tmp_path / "heads", hidden=hidden, dtype=torch.float16)
        return Inputs(tmp_path, tiny_tokenizer(model), heads)

    return make


@pytest.mark.slow
def test_the_group_size_that_fits_is_named(run: Run, sized: Callable[..., Inputs]) -> None:
    made = sized(192, 320)
    line = one_line(run("export", *made.flags(quant="int4_awq")))
    assert line.endswith("got [576, 192] features over tp 1; expected multiples of [128, 128]; use --group-size 64")
    assert not (made.root / "out").exists()
    assert run("export", *made.flags(quant="int4_awq", group_size=64, calib_prompts=1)).code == 0
    config = json.loads((made.root / "out/trtllm/config.json").read_text())
    assert config["quantization"]["group_size"] == 64


@pytest.mark.slow
def test_fp4_has_no_engine_here(run: Run, sized: Callable[..., Inputs]) -> None:
    made = sized(256, 256)
    line = one_line(run("export", *made.flags(quant="nvfp4", engine="onnxruntime")))
    assert "nvfp4" in line
    assert "--engine none" in line
    assert not (made.root / "out").exists()
    assert run("export", *made.flags(quant="nvfp4", calib_prompts=1)).code == 0


class TestTensorRt:
    @pytest.mark.slow
    def test_engines_for_two_gpus(self, run: Run, inputs: Inputs) -> None:
        pytest.importorskip("tensorrt_rtx_bindings")
        flags = inputs.flags(engine="tensorrt", gpu="sm89,sm120", quant="fp8", calib_prompts=2)
        assert run("export", *flags) == (0, f"wrote {inputs.root / 'out'}\n", "")
        out = inputs.root / "out"
        assert {path.suffix for path in (out / "engine").glob("rank0*")} == {".engine", ".json"}
        assert (out / "engine/tree.json").read_text() == (out / "tree.json").read_text(), "both verify on a GPU"
        manifest = json.loads((out / "medusa.json").read_text())
        assert {"engine/rank0.engine", "engine/heads.engine", "onnx/decoder.onnx"} < manifest["files"].keys()
        assert manifest["versions"]["tensorrt-rtx-cu13-libs"]
        assert run("export", *flags).out.startswith("up to date")
        assert run("export", "verify", out).code == 0
        planned = run("export", "plan", *flags, "--json", inputs.root / "plan.json")
        assert planned.code == 0
        disk = {item["what"]: item["bytes"] for item in json.loads((inputs.root / "plan.json").read_text())["disk"]}
        written = sum(path.stat().st_size for path in (out / "onnx").iterdir() if path.suffix == ".data")
        assert disk["onnx/"] == pytest.approx(written, rel=0.3)  # a tiny model's tensors lie in the graph's file

    def test_the_package_is_missing(self, run: Run, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
            monkeypatch.setitem(sys.modules, name, None)
        line = one_line(run("export", *inputs.flags(engine="tensorrt", gpu="sm89")))
        assert line.endswith("TensorRT-RTX: got not installed; expected an importable package; run: pip install "
                             "'medusa-export[tensorrt-rtx]'")  # fmt: skip
        assert not (inputs.root / "out").exists()


FORMS = {
    "trtllm": {"scales.safetensors", "tree.json", "tokenizer", "trtllm/config.json", "trtllm/rank0.safetensors"},
    "hf": {
        "scales.safetensors", "hf/config.json", "hf/hf_quant_config.json", "hf/model.safetensors", "hf/tokenizer.json",
        "hf/tokenizer_config.json", "hf/chat_template.jinja",
    },
    "vllm-heads": {"heads/config.json", "heads/model.safetensors"},
    "medusa-v1": {"heads/config.json", "heads/medusa_lm_head.safetensors"},
    "medusa-v2": {"heads/config.json", "heads/medusa_lm_head.safetensors"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, run: Run, inputs: Inputs, tiny_heads: Callable[..., Path]) -> None:
    out, options = inputs.root / "out", {"format": form, "quant": "fp8", "calib_prompts": 1}
    if form == "medusa-v2":
        options["heads"] = tiny_heads(inputs.root / "heads-v2", "v2", dtype=torch.float16)
    assert run("export", *inputs.flags(**options)) == (0, f"wrote {out}\n", "")
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    listed = {
        name if (out / name).is_file() else f"{name}/{each.name}"
        for name in FORMS[form]
        for each in members(out / name)
    }
    assert written == {"medusa.json", *listed}
    assert run("export", *inputs.flags(**options)).out == f"up to date: {out}\n"
    result = run("export", "verify", out)
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith(f"{out}: complete and consistent\n")
    assert ("quantization error" in result.out) == (form == "trtllm")


def members(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else [path]


@pytest.mark.parametrize("wrong", [["--quantt", "fp8"], ["--tp", "two"], ["verify"], ["publish", "out"]])
def test_usage_errors(wrong: list[str], run: Run, inputs: Inputs) -> None:
    result = run("export", *wrong)
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+: got [^\n]+; expected [^\n]+\n", result.err)


def test_verbose_errors_show_where_they_come_from(run: Run, inputs: Inputs) -> None:
    result = run("export", *inputs.flags(ckpt="absent"), "-v")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("error: absent/config.json: got no such file")


@pytest.mark.parametrize("verbose", [False, True])
def test_a_crash_leaves_a_log(verbose: bool, run: Run, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("medusa_export.exporter.pipeline.export.export", broken)
    monkeypatch.setenv("MEDUSA_EXPORT_CACHE", str(inputs.root / "cache"))
    result = run("export", *inputs.flags(), *(["-v"] if verbose else []))
    (log,) = (inputs.root / "cache/crashes").iterdir()
    assert (result.code, result.out) == (3, "")
    line = result.err.splitlines()[-1]
    assert line == f"error: crashed, a fault of this program: ZeroDivisionError: division by zero; see {log}"
    assert ("Traceback" in result.err) == verbose
    text = log.read_text()
    for part in (
        f"--ckpt {inputs.model}",
        "Traceback (most recent call last)",
        "in broken",
        f"torch {torch.__version__}",
    ):
        assert part in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("disguise", [None, ImportError, OutputError])
def test_a_signal_whatever_a_library_makes_of_it(
    number: signal.Signals, disguise: Any, run: Run, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that is interrupted while it is imported raises ImportError, which becomes "not installed"."""

    def interrupted(*_: object) -> None:
        try:
            os.kill(os.getpid(), number)
        except SystemExit as error:
            if disguise is None:
                raise
            raise disguise(*"abcd") from error

    monkeypatch.setattr("medusa_export.exporter.pipeline.export.export", interrupted)
    line = one_line(run("export", *inputs.flags()), 128 + number)
    assert line == f"error: stopped by {number.name}; nothing half-written is left"


def test_the_caller_gets_its_signals_back(run: Run, inputs: Inputs) -> None:
    """Or a second command in one process takes the first one's handler for one that it must not touch."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run("export", *inputs.flags(ckpt="nowhere"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_ignored_signal_stays_ignored(run: Run, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and a shell's & do

    def interrupted(*_: object) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return True

    monkeypatch.setattr("medusa_export.exporter.pipeline.export.export", interrupted)
    try:
        assert run("export", *inputs.flags()).code == 0
    finally:
        signal.signal(signal.SIGINT, before)


class TestVerify:
    def test_error_table(self, run: Run, inputs: Inputs) -> None:
        """A row a layer; 16-bit weights have no error, and so no table."""
        out = inputs.root / "out"
        run("export", *inputs.flags(quant="fp8", calib_prompts=1, exclude="*layers.1.mlp.proj*"))
        result = run("export", "verify", out)
        assert (result.code, result.err) == (0, "")
        assert "quantization error, measured now: signal-to-noise ratio in dB" in " ".join(result.out.split())
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.out.splitlines() if "│" in line]
        assert [(row[0], row[4]) for row in rows] == [("0", rows[0][4]), ("1", "16 bit")]
        for value in (*rows[0][1:5], *rows[1][1:4]):
            assert 25 < float(value) < 40  # e4m3 rounds to 1 part in 16 at worst: 31.5 dB for normal weights
        assert 0 < float(rows[0][5]) < 0.1

    def test_good_and_flipped(self, run: Run, inputs: Inputs) -> None:
        out = inputs.root / "out"
        run("export", *inputs.flags())
        compared = f"compared with {inputs.model}\n"
        assert run("export", "verify", out) == (0, f"{compared}{out}: complete and consistent\n", "")
        path = out / "trtllm/rank0.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        result = run("export", "verify", out)
        assert (result.code, result.err) == (1, "")
        first, second = result.out.splitlines()
        assert first == f"files: {path}: its content is not what was written (SHA-256 differs)"
        assert second.startswith("weights: medusa_heads."), "and what it is, in the model's words"
        (inputs.model / "config.json").unlink()
        result = run("export", "verify", out)
        assert f"source not compared: {inputs.model}/config.json is not there any more; pass --ckpt" in result.out
        line = one_line(run("export", "verify", out, "--require-source"))
        assert line.endswith("expected the source, to compare with; pass --ckpt")
        path.unlink()
        result = run("export", "verify", out)
        assert (result.code, result.err) == (1, "")
        assert f"{path}: missing" in result.out

    def test_nothing_there(self, run: Run, tmp_path: Path) -> None:
        result = run("export", "verify", tmp_path)
        assert (result.code, result.out) == (2, "")
        assert f"{tmp_path}: got a directory without either; expected an export, with medusa.json" in one_line(result)


class TestHelp:
    def text(self, command: str, *arguments: str) -> str:
        result = console(command, *arguments, "--help", COLUMNS="200", NO_COLOR="1")
        assert (result.code, result.err) == (0, "")
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.out).split())

    def test_export(self) -> None:
        text = self.text("medusa-export")
        for item in fields(ExportArguments):
            assert f"--{item.name.replace('_', '-')} " in text, item.name
        for row in (*FORMATS.values(), *KV_CACHE.values()):
            assert f"{row.name} {row.description}" in text, row.name
        assert ", ".join(PRESETS) in text
        assert "verify Check an export again" in text
        assert "--verbose -v" in text

    def test_verify(self) -> None:
        assert "Exit code 1 when something is wrong" in self.text("medusa-export", "verify")

    def test_run(self) -> None:
        text = self.text("medusa-run")
        for item in fields(RunArguments):
            assert f"--{item.name.replace('_', '-')} " in text, item.name

    def test_defaults_are_those_of_the_functions(self, run: Run, inputs: Inputs, monkeypatch: Any) -> None:
        seen = spy(monkeypatch, "medusa_export.engines.bench.run.run", {"failures": [], "stopped": None})
        monkeypatch.setattr("medusa_export.engines.bench.report.print_report", lambda *_: None)
        assert run("run", "--engine", "e", "--prompts", "p").code == 0
        assert seen == [RunArguments(Path("e"), Path("p"))]


@pytest.mark.slow
class TestTerminal:
    def test_log_and_no_bar_in_a_pipe(self, inputs: Inputs) -> None:
        (inputs.heads / "config.json").write_text('{"medusa_num_heads": 7}')
        result = console("medusa-export", *inputs.flags(tree="cpu-8"), "-v")
        assert (result.code, result.out) == (0, f"wrote {inputs.root / 'out'}\n")
        lines = result.err.splitlines()
        warning, *rest = lines
        assert re.fullmatch("WARNING: .*medusa_num_heads is 7, but 3 heads are stored; using 3", warning)
        assert all(line.startswith("INFO: ") for line in rest)
        assert "INFO: 3 Medusa heads (medusa-v1)" in rest
        assert "INFO: writing the TensorRT-LLM checkpoint, 8 draft tokens" in rest

    def test_bars_on_a_terminal(self, inputs: Inputs) -> None:
        """What the test above would see if the bars were not left out there."""
        terminal, side = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        process = subprocess.Popen(
            [BIN / "medusa-export", *inputs.flags()], stdout=subprocess.PIPE, stderr=side, env=environment
        )
        os.close(side)
        shown = b""
        try:
            while part := os.read(terminal, 4096):
                shown += part
        except OSError:  # Linux's end of a terminal
            pass
        finally:
            os.close(terminal)
        out, _ = process.communicate()
        assert (process.returncode, out) == (0, f"wrote {inputs.root / 'out'}\n".encode())
        for stage in (b"TensorRT-LLM checkpoint", b"verify"):
            assert stage in shown


class TestRun:
    def test_ctrl_c(
        self,
        run: Run,
        tiny_engine: Callable[..., Any],
        tmp_path: Path,
        tiny_tokenizer: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The prompt that runs is finished, and what is done is reported; before and after that it stops at once."""
        from medusa_export.engines.bench import runner

        made = tiny_engine()
        tiny_tokenizer(made.path)
        (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{i} w2"}}\n' for i in range(4)))
        flags = ["--engine", made.path, "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 8, "--repeats", 1]
        calls = []

        def interrupted(*arguments: Any, **options: Any) -> Any:
            calls.append(arguments)
            if len(calls) in when:
                os.kill(os.getpid(), signal.SIGINT)
            return generate(*arguments, **options)

        generate, when = runner.generate, {5}  # the second prompt's first run, after two that warm up
        monkeypatch.setattr(runner, "generate", interrupted)
        result = run("run", *flags, "--report", tmp_path / "report.json")
        assert result.code == 130
        assert result.err == "stopping after this prompt, to report what is finished; Ctrl-C again stops at once\n"
        assert "2 of 4, then stopped" in result.out
        assert json.loads((tmp_path / "report.json").read_text())["stopped"] == {"prompts": 2, "of": 4}
        assert len(calls) == 6
        for at, lines in (({1}, 1), ({5, 6}, 2)):
            calls.clear()
            when.clear()
            when.update(at)
            result = run("run", *flags)
            assert (result.code, result.out) == (130, "")
            assert len(result.err.splitlines()) == lines
            assert result.err.splitlines()[-1].startswith("error: stopped by SIGINT")

    def test_diff(self, run: Run, tiny_engine: Callable[..., Any], tmp_path: Path, tiny_tokenizer: Any) -> None:
        made = tiny_engine()
        tiny_tokenizer(made.path)
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1 w2 w3"}\n')
        flags = ["--engine", made.path, "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 8, "--repeats", 1]
        for name in ("a", "b"):
            assert run("run", *flags, "--report", tmp_path / f"{name}.json").code == 0
        result = run("run", "diff", tmp_path / "a.json", tmp_path / "b.json")
        assert (result.code, result.err) == (0, "")
        assert "as fast as A in whole answers, on 1 prompt of both" in " ".join(result.out.split())
        assert "differs:" not in result.out
        assert "got no parity" in one_line(run("run", "diff", tmp_path / "a.json", made.path / "engine.json"))

    def test_report(self, run: Run, tiny_engine: Callable[..., Any], tmp_path: Path, tiny_tokenizer: Any) -> None:
        made = tiny_engine()
        tiny_tokenizer(made.path)
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1 w2 w3"}\n{"prompt": "w4 w5"}\n')
        flags = ["--engine", made.path, "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 8, "--repeats", 1]
        result = run("run", *flags, "--report", tmp_path / "report.json", "--limit", 1)
        assert (result.code, result.err) == (0, "")
        report = json.loads((tmp_path / "report.json").read_text())
        assert (report["failures"], report["parity"]["prompts"]) == ([], 1)
        result = run("run", *flags, "--min-speedup", 1000)
        assert (result.code, result.err) == (1, "")
        assert "is below --min-speedup 1000" in " ".join(result.out.split())

    def test_an_export_is_as_good_as_its_engine(
        self, run: Run, tiny_engine: Callable[..., Any], tmp_path: Path, tiny_tokenizer: Any
    ) -> None:
        made = tiny_engine()
        tiny_tokenizer(made.path)
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1 w2 w3"}\n')
        export = made.path.parent  # what has engine/ in it
        flags = ["--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 4, "--repeats", 1]
        result = run("run", "--engine", export, "--compare", export, *flags)
        assert (result.code, result.err) == (0, "")

    def test_errors(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1"}\n')
        flags = ["--engine", tmp_path, "--prompts", tmp_path / "prompts.jsonl"]
        assert "got no engine directory" in one_line(run("run", *flags))
        assert "no such directory" in one_line(run("run", *flags, "--report", tmp_path / "no/report.json"))
