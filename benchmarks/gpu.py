"""What only a GPU can tell, in one table: step costs over the memory floor, Medusa's speed, FP8 products, calibration, TensorRT-RTX.

    python benchmarks/gpu.py --ckpt quickstart/model --heads examples/smollm2-135m-medusa-v2 --output gpu

writes gpu/gpu.json and gpu/gpu.md after every part. It needs torch, transformers, onnx, onnxruntime and safetensors; this project
need not be installed. A part that cannot run says why in the table; one that fails says how, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("medusa_export") is None:  # as pyproject.toml maps it
    package = ModuleType("medusa_export")
    package.__path__ = [str(ROOT)]
    sys.modules["medusa_export"] = package
sys.path.insert(0, str(Path(__file__).parent))

from gpu_model import SHAPES  # noqa: E402
from gpu_parts import engine, ptq, shape, tensorrt_rtx  # noqa: E402
from gpu_setup import Setup, SkippedError, bandwidth  # noqa: E402

from medusa_export.core.errors import MedusaExportError  # noqa: E402
from medusa_export.engines.measure.machine import gpus, hardware, versions  # noqa: E402

FORMS = ("none", "fp8")


def run(setup: Setup, forms: tuple[str, ...], shapes: tuple[str, ...], out: Path) -> dict[str, Any]:
    """All parts, each written down as soon as it is known."""
    out.mkdir(parents=True, exist_ok=True)
    body: dict[str, Any] = {
        "date": date.today().isoformat(), "place": setup.place, "hardware": hardware() | gpu_facts(setup.place),
        "versions": versions(), "model": setup.ckpt.name, "dtype": setup.dtype, "arguments": setup.arguments(),
        "bandwidth_gb_s": round(bandwidth(setup.place), 1), "parts": {},
    }  # fmt: skip
    setup.bytes_per_second = body["bandwidth_gb_s"] * 1e9
    parts: dict[str, Callable[[], dict[str, Any]]] = {"tensorrt_rtx": partial(tensorrt_rtx, setup)}
    parts |= {f"engine {quant}": partial(engine, setup, quant) for quant in forms}
    parts |= {"ptq": partial(ptq, setup)}
    parts |= {f"shape {name} {quant}": partial(shape, setup, name, quant) for name in shapes for quant in forms}
    for name, part in parts.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        body["parts"][name] = attempt(part)
        (out / "gpu.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        (out / "gpu.md").write_text(markdown(body), encoding="utf-8")
    return body


def attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part's figures, or the reason why there are none."""
    try:
        return part()
    except SkippedError as error:
        return {"skipped": str(error)}
    except MedusaExportError as error:
        return {"failed": str(error)}
    except Exception as error:  # the other parts are worth having; the exit code tells
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def gpu_facts(place: str) -> dict[str, Any]:
    """Name, compute capability and memory."""
    if place != "cuda":
        return {"gpus": gpus()}
    properties = torch.cuda.get_device_properties(0)
    sm, memory = f"sm{properties.major}{properties.minor}", round(properties.total_memory / 2**30, 1)
    return {"gpus": gpus(), "sm": sm, "gpu_memory_gib": memory, "cuda": torch.version.cuda}


def markdown(body: dict[str, Any]) -> str:
    """The table, for docs/performance.md."""
    machine = body["hardware"]
    where = (
        ", ".join(machine["gpus"])
        if body["place"] == "cuda"
        else f"{machine['cores']} cores of {machine['cpu']}, no GPU"
    )
    packages = ", ".join(f"{name} {version}" for name, version in body["versions"].items())
    lines = [
        f"{body['date']}, {where}, {body['model']} in {body['dtype']}; {packages}; copying moves {body['bandwidth_gb_s']:.0f} GB/s.",
        "", "| part | | |", "|---|---|---|",
    ]  # fmt: skip
    for name, found in body["parts"].items():
        for status in ("skipped", "failed"):
            if status in found:
                lines.append(f"| {name} | {status} | {found[status].replace('|', '/')} |")
        lines += [f"| {name} | {what} | {said} |" for what, said in found.get("table", {}).items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """0: every part ran or was skipped; 1: one failed; 2: bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="the base model")
    parser.add_argument("--heads", type=Path, help="its heads, when they are not inside")
    parser.add_argument("--prompts", type=Path, default=ROOT / "examples" / "spec_bench_39.jsonl")
    parser.add_argument("--calib", type=Path, default=ROOT / "quantize" / "default_prompts.jsonl")
    parser.add_argument("--output", type=Path, default=Path("gpu"))
    parser.add_argument("--place", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="default: the checkpoint's")
    parser.add_argument("--quant", action="append", choices=FORMS, help="default: all")
    parser.add_argument(
        "--shape", action="append", default=[], choices=SHAPES, help="step costs of a random model, too"
    )
    numbers = {"limit": 39, "max-new-tokens": 128, "repeats": 3, "rounds": 9, "max-length": 1024, "calib-prompts": 16}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = vars(parser.parse_args(arguments))
    out, forms, shapes = given.pop("output"), tuple(given.pop("quant") or FORMS), tuple(given.pop("shape"))
    try:
        with tempfile.TemporaryDirectory(prefix="medusa-gpu-") as work:
            body = run(Setup.open(Path(work), **given), forms, shapes, out)
    except MedusaExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((out / "gpu.md").read_text(encoding="utf-8"), end="")
    return int(any("failed" in found for found in body["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
