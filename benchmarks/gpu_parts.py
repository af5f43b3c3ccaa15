"""The parts of benchmarks/gpu.py: each gives figures for JSON, and a "table" of what people read."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np
import torch
from gpu_model import made_up_scales, random_model
from gpu_setup import Setup, SkippedError, fitting_prompts, torch_device, write_graphs

from medusa_export.engines.bench.report import build_report, rate_texts, speedup_texts
from medusa_export.engines.bench.runner import run_prompts
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.engines.decoding.single_slot import OneSequence
from medusa_export.engines.tensorrt.build import DECODER_ENGINE, TensorRtBuilder
from medusa_export.engines.tensorrt.device import CudaDevice
from medusa_export.engines.tensorrt.emulation.onnx_device import OnnxDevice
from medusa_export.engines.tensorrt.emulation.torch_device import NoTensorRt, TorchDevice
from medusa_export.engines.tensorrt.engine import TensorRtEngine
from medusa_export.engines.tensorrt.library import RTX, import_tensorrt, local_gpu
from medusa_export.engines.tuning.acceptance import measure_acceptance
from medusa_export.engines.tuning.cost import SIZES, SingleSteps, measure_cost
from medusa_export.engines.tuning.search import search
from medusa_export.exporter.job.gpu_costs import Target
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.roofline.gpus import GPUS, Gpu
from medusa_export.heads.roofline.step import step_ms
from medusa_export.heads.trees.acceptance import Acceptance, calibration
from medusa_export.heads.trees.step_costs import cost_curve
from medusa_export.quantize.formats import get_format

TREE_PROMPTS, TREE_TOKENS = 13, 96  # the last prompts choose the tree; the others are run
PTQ_TEXTS, PTQ_TOKENS = 4, 64


def tensorrt_rtx(setup: Setup) -> dict[str, Any]:
    """Does TensorRT-RTX run an engine here at all? Hopper is not among its targets, so the error is a result too."""
    rtx, here = import_tensorrt(RTX), local_gpu()
    if rtx is None:
        raise SkippedError("tensorrt_rtx is not installed")
    if here is None:
        raise SkippedError("no GPU: TensorRT-RTX finishes its engines on one")
    targets = (here,) if here in rtx.targets() else (89, 120)
    directory = setup.work / "rtx"
    write_graphs(directory, setup.checkpoint, setup, "none", None, TensorRtBuilder(), targets)
    found = TensorRtEngine(directory / "engine", CudaDevice(directory / "engine", any_gpu=True))
    ours = TensorRtEngine(directory / "engine", torch_device(directory / "onnx", setup.place))
    prompt = fitting_prompts(found.info, setup)[0][2]
    tokens, milliseconds = {}, {}
    for name, each in (("tensorrt_rtx", found), ("torch", ours)):
        generate(each, prompt, AUTOREGRESSIVE, max_new_tokens=16, eos_token_ids=())
        run = generate(each, prompt, AUTOREGRESSIVE, max_new_tokens=64, eos_token_ids=())
        tokens[name], milliseconds[name] = run.tokens, run.decode_ms / len(run.accepted)
    same = sum(a == b for a, b in zip(*tokens.values(), strict=True))
    table = {
        f"sm{here}, built for {targets}": "runs", "tokens equal to PyTorch's": f"{same} of 64",
        "step, TensorRT-RTX / PyTorch": " / ".join(f"{ms:.2f} ms" for ms in milliseconds.values()),
    }  # fmt: skip
    return {"built_for": targets, "version": rtx.version, "equal_tokens": same, "step_ms": milliseconds, "table": table}


def engine(setup: Setup, quant: str) -> dict[str, Any]:
    """Costs, acceptance, and speed and parity without and with Medusa, of the graphs that TensorRT gets, run by PyTorch."""
    calibrates = get_format(quant).needs_calibration
    scales = setup.calibrated(setup.place, setup.torch_dtype) if calibrates else None
    directory = setup.work / quant
    write_graphs(directory, setup.checkpoint, setup, quant, scales, NoTensorRt())
    device = torch_device(directory / "onnx", setup.place)
    found = TensorRtEngine(directory / "engine", device)
    costs = _costs(found, device, setup, Target(setup.checkpoint.config, 0, 0, get_format(quant)))
    encoded = fitting_prompts(found.info, setup)
    cut = max(1, len(encoded) - TREE_PROMPTS)
    answers = measure_acceptance(
        OneSequence(found), encoded[cut:] or encoded, max_new_tokens=min(TREE_TOKENS, setup.max_new_tokens)
    )
    acceptance = calibration(answers)
    chosen = search(Acceptance.from_answers(answers), cost_curve(costs["curve"]))
    tree = chosen.chosen.tree if chosen.chosen.tree.max_draft_len else chosen.runner_up.tree
    result = run_prompts(found, tree, encoded[:cut], max_new_tokens=setup.max_new_tokens, repeats=setup.repeats, seed=0)
    report = build_report(result, tree, found.info, setup.arguments())
    report.pop("prompts")
    graph, parity = device.graphs[DECODER_ENGINE], report["parity"]
    products = f"{graph.fp8_products} FP8 products a step by the device, {graph.dequantized} as {setup.dtype}"
    step = report["step_ms"]
    table = {
        **{f"tokens/s, {name}": text for name, text in rate_texts(report).items()},
        **{f"speed-up, {name} (95% CI)": text for name, text in speedup_texts(report).items()},
        "tokens per step": f"{report['tokens_per_step']:.2f} with a tree of {tree.max_draft_len}",
        "heads right at first": ", ".join(f"{head['top1']:.0%}" for head in acceptance["heads"]),
        "step, without / with": f"{step['baseline']:.2f} / {step['medusa']:.2f} ms",
        "parity": f"{parity['exact']} exact, {parity['ties']} ties, {parity['mismatches']} mismatches of {parity['prompts']}",
        **costs.pop("table"),
        **({"linears": products} if calibrates else {}),
    }  # fmt: skip
    acceptance = {"heads": acceptance["heads"], "positions": acceptance["positions"]}
    return {"costs": costs, "acceptance": acceptance, "report": report, "linears": products, "table": table}


def shape(setup: Setup, name: str, quant: str) -> dict[str, Any]:
    """Step costs of a random model of a real one's sizes: what a step costs does not depend on the weights."""
    directory = setup.work / f"{name}-{quant}"
    checkpoint = random_model(directory, name)
    scales = made_up_scales(checkpoint) if get_format(quant).needs_calibration else None
    write_graphs(directory, checkpoint, setup, quant, scales, NoTensorRt())
    device = torch_device(directory / "onnx", setup.place)
    target = Target(checkpoint.config, 0, 0, get_format(quant))
    costs = _costs(TensorRtEngine(directory / "engine", device), device, setup, target)
    return {"table": costs.pop("table"), "costs": costs}


def ptq(setup: Setup) -> dict[str, Any]:
    """Calibration and FP8 numbers of this device against the CPU's: the same file, in ONNX Runtime there."""
    cpu, own = setup.calibrated("cpu", torch.float32), setup.calibrated(setup.place, setup.torch_dtype)
    apart = [abs(own.input_amax[name] / amax - 1) for name, amax in cpu.input_amax.items()]
    directory = setup.work / "ptq"
    write_graphs(directory, setup.checkpoint, setup, "fp8", cpu, NoTensorRt())
    device = torch_device(directory / "onnx", setup.place)
    here = TensorRtEngine(directory / "engine", device)
    there = TensorRtEngine(directory / "engine", OnnxDevice(directory / "onnx"))
    model: Any = load_reference(setup.ckpt, torch.float32)
    rows: list[tuple[Any, ...]] = []
    for _, _, prompt in fitting_prompts(here.info, setup)[:PTQ_TEXTS]:
        text = [*prompt, *generate(there, prompt, AUTOREGRESSIVE, max_new_tokens=PTQ_TOKENS, eos_token_ids=()).tokens]
        pair = [np.concatenate(list(each.score(text, chunk=64, start=len(prompt)))) for each in (here, there)]
        with torch.no_grad():
            rows.append((*pair, model(torch.tensor([text])).logits[0, len(prompt) :].numpy()))  # [T, V] each
    real, rounded, exact = (torch.from_numpy(np.concatenate(each)) for each in zip(*rows, strict=True))
    graph = device.graphs[DECODER_ENGINE]
    found = {
        "largest_amax_difference": max(apart), "median_amax_difference": median(apart), "positions": len(real),
        "fp8_products": graph.fp8_products, "logit_max_abs_diff": float((real - rounded).abs().max()),
        "greedy_agreement": float((real.argmax(-1) == rounded.argmax(-1)).float().mean()),
        "kl_device_to_cpu": _kl(rounded, real),
        "kl_checkpoint_to_device": _kl(exact, real), "kl_checkpoint_to_cpu": _kl(exact, rounded),
    }  # fmt: skip
    table = {
        "largest inputs, device against CPU": f"{max(apart):.2%} apart at most, {median(apart):.2%} in the median",
        "FP8 products by the device": f"{graph.fp8_products} of {graph.fp8_products + graph.dequantized} a step",
        "logits of the same file, device against CPU": f"{found['logit_max_abs_diff']:.3g} apart at most, "
        f"{found['greedy_agreement']:.1%} equal best tokens, KL {found['kl_device_to_cpu']:.2g} nats over {len(real)} positions",
        "KL from the checkpoint, device / CPU": f"{found['kl_checkpoint_to_device']:.3g} / {found['kl_checkpoint_to_cpu']:.3g} nats",
    }
    return {**found, "table": table}


def estimate_rows(curve: dict[str, Any], target: Target, gpu: Gpu) -> list[dict[str, Any]]:
    """A measured curve beside its estimate: the decoder's step, heads aside, as TensorRT-LLM would run it on that GPU."""
    deployment, past = target.on(gpu), curve["past_length"]
    measured = {row["nodes"]: row["ms"] for row in curve["verify"]}
    estimated = {nodes: float(step_ms(deployment, curve["batch"], nodes, past)) for nodes in measured}
    return [
        {
            "nodes": nodes,
            "measured_ms": ms,
            "estimate_ms": round(estimated[nodes], 4),
            "measured_ratio": round(ms / measured[1], 4),
            "estimate_ratio": round(estimated[nodes] / estimated[1], 4),
        }
        for nodes, ms in measured.items()
    ]


def known_gpu(name: str) -> Gpu | None:
    """The row of the table for a name such as "NVIDIA A100-SXM4-80GB"; None where it has none."""
    plain = name.lower().replace(" ", "").replace("-", "")
    return next((gpu for gpu in GPUS if all(part in plain for part in gpu.key.split("-"))), None)


def _costs(found: TensorRtEngine, device: TorchDevice, setup: Setup, target: Target) -> dict[str, Any]:
    """The cost curve, the time that reading weights and cache once would take, and the curve's estimate where the GPU is known."""
    gpu = known_gpu(torch.cuda.get_device_name()) if setup.place == "cuda" else None
    info = found.info
    past = min(256, info.max_length // 2)
    room = min(max(SIZES), info.max_length - past)
    curve = measure_cost(SingleSteps(found), max_nodes=room, past_length=past, rounds=setup.rounds)
    weights = device.graphs[DECODER_ENGINE].weight_bytes
    cache = found.kv[:, :, :past].nbytes
    floor = (weights + cache) / setup.bytes_per_second * 1e3
    verify = {row["nodes"]: row["ms"] for row in curve["verify"]}
    one, shown = verify[1], [nodes for nodes in (2, 4, 8, 16, 32, 64) if nodes in verify]
    table = {
        f"step of one token behind {past}": f"{one:.2f} ms, {one / floor:.1f} times the {floor:.3f} ms that "
        f"{(weights + cache) / 1e6:.1f} MB take",
        f"its ratio with {', '.join(map(str, shown))} nodes": ", ".join(f"{verify[nodes] / one:.2f}" for nodes in shown),
        "all heads": f"{curve['draft'][-1]['ms']:.2f} ms",
    }  # fmt: skip
    rows = estimate_rows(curve, target, gpu) if gpu else []
    if gpu:
        both = (
            f"{row['nodes']}: {row['measured_ms']:.2f} / {row['estimate_ms']:.2f} ms"
            for row in rows
            if row["nodes"] in (1, *shown)
        )
        table[f"nodes: measured / estimated for {gpu.name}"] = ", ".join(both)
    return {
        "curve": curve,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "floor_ms": floor,
        "over_floor": one / floor,
        "estimate": rows,
        "table": table,
    }


def _kl(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """Mean over positions, in nats.  # [T, V] each"""
    log_theirs, log_ours = theirs.log_softmax(-1), ours.log_softmax(-1)
    return float((log_theirs.exp() * (log_theirs - log_ours)).sum(-1).mean())
