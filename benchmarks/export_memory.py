"""Peak memory and speed of every writer on a large synthetic checkpoint, against ``cp`` of what they read and write.

    python benchmarks/export_memory.py                  # 1B: every writer, and ModelOpt's
    python benchmarks/export_memory.py --shape 7b       # whole exports on four ranks
    python benchmarks/export_memory.py --shape 70b      # the same, four layers of Llama-3-70B's size

Makes a Llama-shaped checkpoint of random bfloat16 weights in several shards, with Medusa heads without lm_heads, and the same one
with half of the layers, in a temporary folder, removed at the end (5 GB for 1b, the source and twice the output for the others).
Every case runs in a process of its own. Two peaks are measured, both above what was resident after the imports:

- anonymous: RssAnon, which only the process itself can free; sampled every half millisecond from outside.
- resident: VmHWM, the kernel's own mark. Pages of the mapped source files count here as long as the kernel cares to keep them.

The last case reads every tensor and keeps it: what an export that did not stream would take, and a check of the measurement.
"export" includes hashing the inputs and the outputs and comparing every weight with the source; "verify" is medusa-export verify on
what such an export left, without an engine. After every run ``cp -r`` copies what
it has read, and what it has written. Times end when the files are on the disk (fsync), and nothing that is read is in the page cache
beforehand.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.measure.machine import hardware, versions
from medusa_export.engines.tensorrt.build import TensorRtBuilder
from medusa_export.exporter.engine_dirs.onnxruntime import write_engine, write_onnx
from medusa_export.exporter.job.arguments import ExportArguments
from medusa_export.exporter.job.draft_vocab import DEFAULT_SIZE
from medusa_export.exporter.pipeline.export import export
from medusa_export.exporter.verify.parts.export import verify
from medusa_export.exporter.write.trtllm import write_trtllm
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.families import EMBED_TOKENS
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference
from medusa_export.heads.contract.engine_tools import EngineTools
from medusa_export.heads.trees.tree import load_tree
from medusa_export.quantize.formats import get_format
from medusa_export.quantize.scales import Scales

MB = 1e6
TREE, SPREAD, AMAX = "cpu-3", 0.02, 1.0  # AMAX covers every weight that a normal distribution of SPREAD yields
LAYERS_A_SHARD = 2
PRELOAD = [
    "medusa_export.exporter.pipeline.export",
    "medusa_export.exporter.engine_dirs.onnxruntime",
    "transformers.models.llama",
]
COPIES = ("source", "written")
Case = Callable[[Path, Path], object]


def _export(quant: str, tp: int = 1) -> Case:
    def run(source: Path, out: Path) -> object:
        scales = source / "scales.safetensors" if get_format(quant).needs_calibration else None
        arguments = ExportArguments(
            source / "model", out, quant, source / "heads", engine="none", tree=TREE, tp=tp, scales=scales
        )
        return export(arguments, EngineTools(lambda *_: [], lambda *_: "", TensorRtBuilder()))  # no engine is written

    return run


def _verify(source: Path, out: Path) -> object:
    """All of an export that is there, against its source."""
    result = verify(out, ckpt=source / "model", heads=source / "heads")
    if result.findings:
        raise ValueError(f"the export has findings: {result.findings[0]}")
    return result


def _modelopt(source: Path, out: Path) -> object:
    """The peer: transformers' model in memory, base alone, through ModelOpt's exporter."""
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    model = load_reference(source / "model", torch.bfloat16)
    return export_tensorrt_llm_checkpoint(model, "llama", torch.bfloat16, str(out), inference_tensor_parallel=1)


def _trtllm(quant: str, tp: int) -> Case:
    def run(source: Path, out: Path) -> None:
        checkpoint = _open(source)
        write_trtllm(out, checkpoint, get_format(quant), _scales(checkpoint), tree=load_tree(TREE), tp=tp)

    return run


def _onnx(quant: str) -> Case:
    def run(source: Path, out: Path) -> None:
        checkpoint = _open(source)
        write_onnx(out, checkpoint, get_format(quant), _scales(checkpoint), max_length=128)

    return run


def _engine(quant: str) -> Case:
    def run(source: Path, out: Path) -> None:
        checkpoint, tree = _open(source), load_tree(TREE)
        size = min(DEFAULT_SIZE, checkpoint.config.vocab_size)
        write_engine(
            out, checkpoint, get_format(quant), _scales(checkpoint), tree=tree, max_length=128,
            draft_vocab=torch.arange(size), save_tokenizer=lambda _: None, source={},
        )  # fmt: skip

    return run


def _keep_all(source: Path, out: Path) -> object:
    checkpoint = _open(source)
    out.mkdir()
    return [checkpoint.read(name).clone() for name in checkpoint.names]


CASES: dict[str, Case] = {
    "export none": _export("none"),
    "export int8_wo": _export("int8_wo"),
    "TensorRT-LLM fp8": _trtllm("fp8", 1),
    "TensorRT-LLM fp8, tp 2": _trtllm("fp8", 2),
    "onnx none": _onnx("none"),
    "engine none": _engine("none"),
    "engine int8_wo": _engine("int8_wo"),
    "all in memory": _keep_all,
    "ModelOpt none, base": _modelopt,
    "export none, tp 4": _export("none", 4),
    "export int8_wo, tp 4": _export("int8_wo", 4),
    "export fp8, tp 4": _export("fp8", 4),
    "verify none": _verify,
    "verify fp8, tp 4": _verify,
}
# What lies in the output before a case begins; not measured.
PREPARED: dict[str, str] = {case: case.replace("verify", "export") for case in CASES if case.startswith("verify")}
LARGE = tuple(case for case in CASES if case.endswith("tp 4"))


@dataclass(frozen=True)
class Shape:
    """A synthetic checkpoint, and what is measured on it.

    Attributes:
        depths: layers of the checkpoints, the deepest last.
    """

    hidden: int
    intermediate: int
    depths: tuple[int, ...]
    vocab: int
    num_heads: int
    cases: tuple[str, ...]


SHAPES = {
    "tiny": Shape(512, 1408, (4, 8), 4000, 2, tuple(CASES)),  # to try the benchmark itself
    "1b": Shape(2048, 5632, (8, 16), 32000, 3, tuple(case for case in CASES if case not in LARGE)),
    "7b": Shape(4096, 11008, (32,), 32000, 3, LARGE),  # Llama-2-7B's sizes
    "70b": Shape(8192, 28672, (4,), 128256, 3, LARGE),  # Llama-3-70B's sizes, but for the number of layers
}


def _open(source: Path) -> MedusaCheckpoint:
    return MedusaCheckpoint.open(source / "model", source / "heads")


def _scales(checkpoint: MedusaCheckpoint) -> Scales:
    modules = [name.removesuffix(".weight") for name in checkpoint.names if name.endswith("_proj.weight")]
    return Scales(dict.fromkeys(modules, AMAX), dict.fromkeys(modules, AMAX), {})


def make_checkpoint(root: Path, shape: Shape) -> None:
    """``root/model`` in shards of a few layers, with a tokenizer, ``root/heads``, and made-up scales for FP8."""
    model, heads = root / "model", root / "heads"
    model.mkdir(parents=True)
    heads.mkdir()
    _write_config(model, shape)
    weight_map: dict[str, str] = {}
    for shard, shapes in _shards(DecoderConfig.from_dir(model)):
        save_file({name: _random(size) for name, size in shapes.items()}, model / shard)
        weight_map |= dict.fromkeys(shapes, shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    blocks = {f"{head}.0.linear.weight": _random((shape.hidden, shape.hidden)) for head in range(shape.num_heads)}
    blocks |= {f"{head}.0.linear.bias": _random((shape.hidden,)) for head in range(shape.num_heads)}
    save_file(blocks, heads / "medusa_lm_head.safetensors")
    _write_tokenizer(model)
    _scales(_open(root)).save(root / "scales.safetensors")


def make_shallower(root: Path, deep: Path, *, layers: int) -> None:
    """The same checkpoint with its first layers only; the shards are shared with the deep one."""
    model = root / "model"
    model.mkdir(parents=True)
    config = json.loads((deep / "model/config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    weight_map: dict[str, str] = {}
    for shard, shapes in _shards(DecoderConfig.from_dir(model)):
        os.link(deep / "model" / shard, model / shard)
        weight_map |= dict.fromkeys(shapes, shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(deep / "model" / name, model)
    shutil.copytree(deep / "heads", root / "heads")
    shutil.copy(deep / "scales.safetensors", root)


def _shards(config: DecoderConfig) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """File name and shapes of every shard: the embedding, lm_head and last norm in the first one, then the layers."""
    shapes = config.tensor_shapes()
    layers = {name: shape for name, shape in shapes.items() if name.startswith("model.layers.")}
    yield "shard-ends.safetensors", {name: shape for name, shape in shapes.items() if name not in layers}
    for first in range(0, config.num_hidden_layers, LAYERS_A_SHARD):
        mine = {name for name in layers if first <= int(name.split(".")[2]) < first + LAYERS_A_SHARD}
        yield f"shard-{first:03}.safetensors", {name: shape for name, shape in layers.items() if name in mine}


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    """Normal values; one block of them, repeated, because making gigabytes takes longer than exporting them."""
    size = torch.Size(shape).numel()
    block = torch.randn(min(size, 1 << 22), dtype=torch.bfloat16) * SPREAD
    return block.repeat(-(-size // len(block)))[:size].reshape(shape)


def _write_config(model: Path, shape: Shape) -> None:
    hidden = shape.hidden
    head_dim = min(128 if hidden >= 4096 else 64, hidden // 4)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.depths[-1],
        "vocab_size": shape.vocab, "num_attention_heads": hidden // head_dim,
        "num_key_value_heads": hidden // head_dim // 4, "head_dim": head_dim, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False, "eos_token_id": 0,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))


def _write_tokenizer(model: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(model)


def measure(case: str, source: Path, out: Path) -> dict[str, float]:
    """Run one case in a fresh process.

    Returns:
        anonymous_mb, resident_mb: peaks above the start; seconds; written_mb.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)  # imported once, for all cases
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(case, source, out, there))
    process.start()
    assert process.pid is not None
    there.close()
    start = here.recv()
    peak, stop = [start["RssAnon"]], threading.Event()
    sampler = threading.Thread(target=_sample, args=(process.pid, peak, stop))
    sampler.start()
    try:
        here.send("go")
        end = here.recv()  # EOFError when the child failed; its traceback is on stderr
    finally:
        stop.set()
        sampler.join()
        process.join()
    return {
        "anonymous_mb": (peak[0] - start["RssAnon"]) / MB,
        "resident_mb": (end["VmHWM"] - start["VmRSS"]) / MB,
        "seconds": end["seconds"],
        "written_mb": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / MB,
    }


def _child(case: str, source: Path, out: Path, parent: Connection) -> None:
    read_tokenizer(source / "model")  # which imports the rest of transformers
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts again from what is resident now
    parent.send(_status(os.getpid()))
    parent.recv()
    start = time.perf_counter()
    kept = CASES[case](source, out)
    _sync(out)
    seconds = time.perf_counter() - start
    parent.send({**_status(os.getpid()), "seconds": seconds})
    del kept


def _sample(pid: int, peak: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.0005):
        try:
            peak[0] = max(peak[0], _status(pid)["RssAnon"])
        except (OSError, KeyError):  # it has ended
            return


def _status(pid: int) -> dict[str, int]:
    """Bytes of VmHWM, VmRSS and RssAnon."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("VmHWM:", "VmRSS:", "RssAnon:")}


def _sync(out: Path) -> None:
    for path in [out, *out.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _forget(folder: Path) -> None:
    """Have the page cache hold none of it."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _copy_seconds(folder: Path, copy: Path) -> float:
    """``cp`` of an export's input or output to the same disk."""
    _forget(folder)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
    _sync(copy)
    seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    return seconds


def _once(case: str, source: Path, out: Path) -> dict[str, float]:
    if case in PREPARED:
        measure(PREPARED[case], source, out)
        _forget(out)
    _forget(source)
    found = measure(case, source, out)
    if out.exists():
        copy = out.with_name("copy")
        found["cp_written_seconds"] = _copy_seconds(out, copy)
        shutil.rmtree(out)
        found["cp_source_seconds"] = _copy_seconds(source, copy)
    return found


def _summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Largest memory, median times, and the medians of what each run gives for the speed against its ``cp``."""
    found = {key: max(run[key] for run in runs) for key in ("anonymous_mb", "resident_mb", "written_mb")}
    copies = [what for what in COPIES if f"cp_{what}_seconds" in runs[0]]
    found |= {key: median(run[key] for run in runs) for key in ("seconds", *(f"cp_{what}_seconds" for what in copies))}
    for what in copies:
        found[f"of_cp_{what}"] = median(run[f"cp_{what}_seconds"] / run["seconds"] for run in runs)
    return found


def run_all(work: Path, shape: Shape, repeats: int) -> dict[str, Any]:
    """Every case of the shape on every depth, again and again, each followed by ``cp`` of its input and of its output."""
    deep = work / "deep"
    make_checkpoint(deep, shape)
    sources = [(work / f"{depth}", depth) for depth in shape.depths[:-1]]
    for source, depth in sources:
        make_shallower(source, deep, layers=depth)
    sources.append((deep, shape.depths[-1]))
    checkpoint = _open(deep)
    largest = max(2 * torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names) / MB
    source_bytes = sum(path.stat().st_size for path in checkpoint.files)
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for case in shape.cases:
            for source, depth in sources:
                runs.setdefault((case, depth), []).append(_once(case, source, work / "out"))
    rows = [
        {"case": case, "layers": depth, "ratio": found["anonymous_mb"] / largest, **found, "runs": each}
        for (case, depth), each in runs.items()
        for found in [_summary(each)]
    ]
    return {
        "largest_tensor_mb": largest,
        "embedding": list(checkpoint.shape(EMBED_TOKENS)),
        "source_mb": source_bytes / MB,
        "shards": len(checkpoint.base.files) - 1,
        "rows": rows,
        "hardware": hardware(),
        "versions": versions(),
    }


def _print(result: dict[str, Any]) -> None:
    title = f"source {result['source_mb']:.0f} MB in {result['shards']} shards, largest tensor {result['largest_tensor_mb']:.0f} MB"
    copies = [f"{what} {name}" for name in COPIES for what in ("cp", "of cp")]
    table = Table("case", "layers", "anon MB", "/ largest", "rss MB", "written MB", "s", *copies, title=title)
    for row in result["rows"]:
        table.add_row(
            row["case"], str(row["layers"]), f"{row['anonymous_mb']:.0f}", f"{row['ratio']:.1f}", f"{row['resident_mb']:.0f}",
            f"{row['written_mb']:.0f}", f"{row['seconds']:.1f}",
            *(
                f"{row[key]:{form}}" if key in row else ""
                for what in COPIES
                for key, form in ((f"cp_{what}_seconds", ".1f"), (f"of_cp_{what}", ".2f"))
            ),
        )  # fmt: skip
    Console().print(table)


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "1b",
    layers: Annotated[int | None, typer.Option(help="Layers of the deepest checkpoint, where disk is short.")] = None,
    cases: Annotated[list[str] | None, typer.Option("--case", help="Only these cases.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where the temporary folder goes. Default: the system's.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of every case; times are medians.", min=1)] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Print peak memory, time and the time of cp for every writer."""
    chosen = SHAPES[shape]
    if layers is not None:
        chosen = replace(chosen, depths=(*chosen.depths[:-1], layers))
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="export-memory-", dir=work) as folder:
        result = run_all(Path(folder), replace(chosen, cases=tuple(cases or chosen.cases)), repeats)
    _print(result)
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
