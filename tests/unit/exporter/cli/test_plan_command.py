"""medusa-export plan and --dry-run: what they print, what they refuse, and that they neither write nor read weights."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console

from medusa_export.exporter.cli import export as cli
from medusa_export.exporter.job.arguments import ExportArguments
from medusa_export.exporter.sizing import estimate as sizing
from medusa_export.exporter.sizing import report as sizing_report
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.tensor_source import TensorSource

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
}  # fmt: skip
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
MACHINE = sizing.ExportMachine(disk_free=500 * 10**9, ram_available=64 * 10**9, has_gpu=False)
SHARD_VALUES = 2**30 + 2**27
MEDUSA_EXPORT = Path(sys.executable).with_name("medusa-export")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """``run(*flags)``: what the console script calls, on a machine that does not change."""
    monkeypatch.setattr(sizing, "this_machine", lambda out: MACHINE)

    def call(*flags: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["medusa-export", *map(str, flags)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.export_main()
        code = stopped.value.code
        assert isinstance(code, int)
        return Result(code, *capfd.readouterr())

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


@dataclass
class Inputs:
    """A model with a tokenizer, heads for it, and the directory that both lie in."""

    root: Path
    model: Path
    heads: Path

    def flags(self, **changes: object) -> list[str]:
        """The smallest export; ``None`` drops a flag, and "" makes it a switch."""
        given = {"ckpt": self.model, "heads": self.heads, "engine": "none", "output": self.root / "out", **changes}
        pairs = ((f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None)
        return [str(part) for pair in pairs for part in pair if part != ""]


@pytest.fixture
def inputs(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Callable[..., Path], tiny_tokenizer: Any
) -> Inputs:
    model = tiny_tokenizer(tiny_checkpoint(tmp_path / "model", dtype=torch.float16))
    return Inputs(tmp_path, model, tiny_heads(tmp_path / "heads", dtype=torch.float16))


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A bfloat16 safetensors file of any size that takes no disk: its header, and a hole where the weights would be."""
    header, start = {}, 0
    for name, shape in shapes.items():
        stop = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)


def write_sparse_shards(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """As ``save_pretrained`` does: files of some GB, which a machine can map that has less memory than the model."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(map(math.prod, shards[-1].values())) + math.prod(shape) > SHARD_VALUES:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for index, shard in enumerate(shards):
        weight_map |= dict.fromkeys(shard, f"model-{index}.safetensors")
        write_sparse(directory / f"model-{index}.safetensors", shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def real_size(tmp_path: Path, tiny_tokenizer: Any) -> Callable[[str], Inputs]:
    """``real_size("8B")``: a checkpoint of a real model's shape with four heads, all holes."""

    def write(name: str) -> Inputs:
        found = Inputs(tmp_path, tmp_path / name, tmp_path / f"{name}-heads")
        tiny_tokenizer(found.model)
        found.heads.mkdir()
        (found.model / "config.json").write_text(json.dumps(LLAMA | SHAPES[name]))
        config = DecoderConfig.from_dir(found.model)
        write_sparse_shards(found.model, config.tensor_shapes())
        hidden, heads = config.hidden_size, range(4)
        shapes: dict[str, tuple[int, ...]] = {f"{head}.0.linear.weight": (hidden, hidden) for head in heads}
        shapes |= {f"{head}.0.linear.bias": (hidden,) for head in heads}
        shapes |= {f"{head}.1.weight": (config.vocab_size, hidden) for head in heads}
        write_sparse(found.heads / "medusa_lm_head.safetensors", shapes)
        return found

    return write


def listing(root: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in root.rglob("*")}


def one_line(result: Result) -> str:
    """The error's line, after checking that it is all there is."""
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    return line


class TestOutput:
    def test_8b(self, real_size: Callable[[str], Inputs], run: Run) -> None:
        flags = real_size("8B").flags(quant="fp8", kv_cache="fp8", batch=4, context=8192)
        result = run("plan", *flags)
        assert (result.code, result.err) == (0, "")
        text = " ".join(result.out.split())
        for expected in (
            "llama, 32 layers, hidden 4096", "32 query and 8 key/value heads of 128", "8,030,261,248 and 2,168,471,552",
            "4 heads of 1 layer, max_draft_len 63", "fp8 (FP8), kv cache fp8, dtype bfloat16",
            "attention.qkv 32 fp8 805.3 MB", "lm_head 1 bfloat16 1.05 GB excluded", "cache of a token 65.54 kB kv cache fp8",
            "cache of the batch 2.16 GB 4 sequences", "free 500.0 GB enough", "available here 64.00 GB enough",
            "A100-80GB - no - fp8 needs SM 89 or newer", "H100-80GB",
        ):  # fmt: skip
            assert expected in text

    def test_where_it_is_too_large(self, real_size: Callable[[str], Inputs], run: Run) -> None:
        text = " ".join(run("plan", *real_size("70B").flags(quant="fp8")).out.split())
        assert "available here 64.00 GB NOT ENOUGH" in text
        assert "in all 287.1 GB the largest, and 400.0 MB of libraries" in text  # of calibration, in float32
        assert re.search(r"L40S-48GB \S+ (GB|B) does not fit 0", text)

    @pytest.mark.parametrize("width", [80, 120])
    @pytest.mark.parametrize("quant", ["none", "fp8", "int8_wo", "w4a8_awq", "fp8_rowwise"])
    def test_width(self, quant: str, width: int, real_size: Callable[[str], Inputs]) -> None:
        """Nothing is cut off, no table is broken, and no word of a first column wraps."""
        found, out = real_size("70B"), io.StringIO()
        arguments = ExportArguments(found.model, found.root / "out", quant, found.heads, engine="none", tp=8)
        got = sizing.plan_export(arguments, batch=16, context=131072)
        sizing_report.print_sizing(got, Console(file=out, width=width))
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert "…" not in out.getvalue()
        first = {line[2:].split("  ")[0].strip() for line in lines}
        assert {*(group.name for group in got.tensors), *(gpu.gpu for gpu in got.gpus)} <= first
        assert {item.what for item in (*got.disk, *got.ram)} <= first

    def test_json(self, inputs: Inputs, run: Run) -> None:
        file = inputs.root / "plan.json"
        result = run("plan", *inputs.flags(quant="fp8", tp=2, json=file))
        body = json.loads(file.read_text())
        assert body["layout"]["tp"] == 2
        assert len(body["rank_bytes"]) == 2
        arguments = ExportArguments(inputs.model, inputs.root / "out", "fp8", inputs.heads, engine="none", tp=2)
        assert body == json.loads(json.dumps(asdict(sizing.plan_export(arguments))))
        assert result.out == run("plan", *inputs.flags(quant="fp8", tp=2)).out
        assert "no such directory" in one_line(run("plan", *inputs.flags(json=inputs.root / "absent/plan.json")))

    def test_dry_run_is_the_same(self, inputs: Inputs, run: Run) -> None:
        flags = inputs.flags(quant="fp8", engine="onnxruntime")
        assert run(*flags, "--dry-run") == run("plan", *flags)

    def test_warnings(self, inputs: Inputs, run: Run, caplog: pytest.LogCaptureFixture) -> None:
        (inputs.heads / "config.json").write_text('{"medusa_num_heads": 7}')
        assert run("plan", *inputs.flags()).code == 0
        assert "medusa_num_heads is 7, but 3 heads are stored" in caplog.text


class TestFlags:
    def test_those_of_the_export(self, inputs: Inputs, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every flag of an export means the same to its plan; two calls that differ in all of them tell."""
        seen: list[Any] = []
        monkeypatch.setattr(
            "medusa_export.exporter.pipeline.export.export", lambda arguments, *_: seen.append(arguments)
        )
        monkeypatch.setattr(sizing, "plan_export", lambda arguments, **_: seen.append(arguments))
        monkeypatch.setattr(sizing_report, "print_sizing", lambda *_: None)
        values: dict[str, object] = {
            "quant": "fp8", "kv_cache": "fp8", "quant_heads": "", "dtype": "bfloat16", "tp": 4, "tree": "cpu-4",
            "calib": "calib", "calib_prompts": 5, "max_length": 99, "draft_vocab": 100, "scales": "scales",
            "group_size": 64, "exclude": "*mlp.proj*", "trtllm_version": "1.0", "pp": 2, "format": "hf",
        }  # fmt: skip
        for flags in (["--ckpt", inputs.model], inputs.flags(**values)):
            assert run(*flags).code == 0
            assert run("plan", *flags).code == 0
            exported, planned = seen
            assert planned == exported
            seen.clear()

    def test_help(self) -> None:
        wide = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
        text = subprocess.run(
            [MEDUSA_EXPORT, "plan", "--help"], capture_output=True, text=True, env=wide, check=True
        ).stdout
        for name in ("batch", "context", "json", *(item.name.replace("_", "-") for item in fields(ExportArguments))):
            assert f"--{name} " in text, name
        assert "--dry-run" not in text

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"batch": 0}, "--batch: got 0; expected 1 or more"),
            ({"batch": 2049}, "--batch: got 2049"),
            ({"context": 0}, "--context: got 0; expected 1 or more"),
            ({"context": 129}, "--context: got 129"),
        ],
    )
    def test_its_own(self, flags: dict[str, int], message: str, inputs: Inputs, run: Run) -> None:
        assert message in one_line(run("plan", *inputs.flags(**flags)))

    def test_default_context_is_the_models_at_most(self, inputs: Inputs, run: Run) -> None:
        assert "128 tokens a sequence" in run("plan", *inputs.flags()).out


def occupy(inputs: Inputs) -> dict[str, object]:
    (inputs.root / "mine").mkdir()
    (inputs.root / "mine/thesis.tex").write_text("x")
    return {"output": inputs.root / "mine"}


def remove(name: str) -> Callable[[Inputs], dict[str, object]]:
    def change(inputs: Inputs) -> dict[str, object]:
        (inputs.model / name).unlink()
        return {"engine": "onnxruntime"}

    return change


def bad_prompts(inputs: Inputs) -> dict[str, object]:
    (inputs.root / "calib.jsonl").write_text('{"question": "w2"}\n')
    return {"calib": inputs.root / "calib.jsonl"}


def two_lm_heads(inputs: Inputs) -> dict[str, object]:
    config = json.loads((inputs.model / "config.json").read_text())
    (inputs.model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True, "vocab_size": 96}))
    return {}


def flags(**changes: object) -> Callable[[Inputs], dict[str, object]]:
    return lambda _: changes


REFUSALS: dict[str, Callable[[Inputs], dict[str, object]]] = {
    "no checkpoint": flags(ckpt=None),
    "missing checkpoint": flags(ckpt="absent"),
    "no weights": remove("model.safetensors"),
    "no tokenizer": remove("tokenizer.json"),
    "no chat template": remove("chat_template.jinja"),
    "no heads": flags(heads=None),
    "weights of another shape": two_lm_heads,
    "unknown format": flags(quant="fp9"),
    "unknown cache": flags(kv_cache="fp4"),
    "unknown engine": flags(engine="vllm"),
    "unknown dtype": flags(dtype="int4"),
    "16-bit heads only": flags(quant_heads=""),
    "features that do not fit": flags(quant="int8_wo"),
    "tp": flags(tp=3),
    "group size": flags(quant="int4_awq", group_size=32),
    "pipeline": flags(pp=2),
    "release": flags(trtllm_version="1.3.0"),
    "exclude": flags(quant="fp8", exclude="nope"),
    "format": flags(format="nope"),
    "tree too deep": flags(tree="medusa-63"),
    "missing tree": flags(tree="oak"),
    "empty tree": flags(tree="none"),
    "long context": flags(engine="onnxruntime", max_length=129),
    "draft vocabulary": flags(draft_vocab=-1),
    "bad prompts": bad_prompts,
    "occupied output": occupy,
    "output is a file": lambda inputs: {"output": inputs.heads / "config.json"},
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_what_the_export_refuses(case: str, inputs: Inputs, run: Run) -> None:
    changed = inputs.flags(**REFUSALS[case](inputs))
    before = listing(inputs.root)
    expected = one_line(run(*changed))
    assert one_line(run("plan", *changed)).replace("medusa-export plan --help", "medusa-export --help") == expected
    assert one_line(run(*changed, "--dry-run")) == expected
    assert listing(inputs.root) == before


@pytest.mark.parametrize("form", ["hf", "medusa-v1"])
def test_other_forms_have_no_plan(form: str, inputs: Inputs, run: Run) -> None:
    line = one_line(run("plan", *inputs.flags(format=form)))
    assert line == f"error: --format: got {form}; expected trtllm, the only form with a plan; leave --format out"
    assert one_line(run(*inputs.flags(format=form), "--dry-run")) == line


def test_output_under_a_file(inputs: Inputs, run: Run) -> None:
    line = one_line(run("plan", *inputs.flags(output=inputs.heads / "config.json/out")))
    assert "config.json: got no write access" in line


class TestAnEarlierExport:
    def test_with_the_same_flags(self, inputs: Inputs, run: Run) -> None:
        assert run(*inputs.flags()).code == 0
        before = listing(inputs.root)
        assert run("plan", *inputs.flags()).code == 0
        assert listing(inputs.root) == before

    def test_with_others(self, inputs: Inputs, run: Run) -> None:
        run(*inputs.flags())
        expected = one_line(run(*inputs.flags(tp=2)))
        assert "other arguments (tp)" in expected
        assert one_line(run("plan", *inputs.flags(tp=2))) == expected

    @pytest.mark.slow
    def test_sizes_come_true(self, inputs: Inputs, run: Run) -> None:
        file = inputs.root / "plan.json"
        run("plan", *inputs.flags(quant="fp8", kv_cache="fp8", calib_prompts=2, tp=2, json=file))
        assert run(*inputs.flags(quant="fp8", kv_cache="fp8", calib_prompts=2, tp=2)).code == 0
        sizes = [path.stat().st_size for path in sorted((inputs.root / "out/trtllm").glob("*.safetensors"))]
        assert json.loads(file.read_text())["rank_bytes"] == sizes


class Usage(NamedTuple):
    free: int


def test_a_full_disk(inputs: Inputs, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan shows it; a rehearsal of the export fails like the export, after its tables."""
    monkeypatch.setattr(sizing, "this_machine", lambda out: sizing.ExportMachine(1000, 10**11, has_gpu=False))
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(1000))
    planned, rehearsed = run("plan", *inputs.flags()), run(*inputs.flags(), "--dry-run")
    assert (planned.code, planned.err) == (0, "")
    assert "NOT ENOUGH: an export starts with" in planned.out
    assert (rehearsed.code, rehearsed.out) == (2, planned.out)
    assert "got 0.00 GB free; expected" in rehearsed.err
    assert len(rehearsed.err.splitlines()) == 1


class TestWeights:
    """None is read, and nothing is written."""

    @pytest.mark.parametrize("command", [("plan",), ("--dry-run",)])
    def test_no_tensor_is_read(
        self, command: tuple[str], real_size: Callable[[str], Inputs], run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read(self: TensorSource, name: str, *_: object) -> None:
            raise AssertionError(f"{name} was read")

        for reader in ("read", "read_rows", "read_columns"):
            monkeypatch.setattr(TensorSource, reader, read)
        monkeypatch.setattr("medusa_export.core.artifacts.manifest.check_free_space", lambda *_: None)
        found = real_size("70B")
        before = listing(found.root)
        flags = found.flags(quant="fp8", engine="onnxruntime", tp=8)
        assert run(*command, *flags).code == 0
        assert listing(found.root) == before
        trapped = run(*flags)
        assert trapped.code == 3
        assert "was read" in trapped.err  # so the trap works

    @pytest.mark.slow
    def test_memory(self, real_size: Callable[[str], Inputs]) -> None:
        """Of a process of its own: the libraries and less than the largest tensor, 2.1 of 150 GB."""
        found = real_size("70B")
        assert sum(path.stat().st_size for path in found.model.iterdir()) > 140 * 10**9
        with subprocess.Popen([MEDUSA_EXPORT, "plan", *found.flags(quant="fp8")], stdout=subprocess.DEVNULL) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        assert usage.ru_maxrss * 1024 < 1_600_000_000
