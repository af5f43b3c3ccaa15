"""What an export is made from: the flags, the inputs opened once, and every refusal that needs no computation."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.artifacts.input_files import InputFiles
from medusa_export.core.errors import ConfigError, require_packages
from medusa_export.core.flags import requirement_error
from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.model_tokens import ModelTokens
from medusa_export.core.text.prompts import Prompt, load_prompts
from medusa_export.core.text.tokenizer import TOKENIZER_FILES, read_tokenizer
from medusa_export.exporter.job.arguments import AUTO, DEFAULT_CALIB, MAX_LENGTH, ExportArguments
from medusa_export.exporter.job.engine_kinds import CPU_TREE, ENGINES, GPU_TREE, EngineKind, engine_kind
from medusa_export.exporter.job.gpu_costs import Target, prediction
from medusa_export.exporter.job.output_forms import OutputForm, output_form
from medusa_export.exporter.plan.spec import ExportSpec, export_spec
from medusa_export.exporter.plan.trtllm_compat import release_warnings
from medusa_export.exporter.plan.trtllm_layout import require_scales
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.contract.engine_info import TREE_FILE
from medusa_export.heads.contract.tree_prompts import prompts_to_run
from medusa_export.heads.contract.trtllm_releases import find_release
from medusa_export.heads.roofline.curves import estimate_costs
from medusa_export.heads.roofline.gpus import find_gpu
from medusa_export.heads.trees.acceptance import ACCEPTANCE_FILE, Acceptance
from medusa_export.heads.trees.followers import FOLLOWERS_FILE, Followers
from medusa_export.heads.trees.search import CostCurve, best, candidates
from medusa_export.heads.trees.step_costs import cost_curve, load_costs, select
from medusa_export.heads.trees.tree import PRESETS, Tree, load_tree
from medusa_export.quantize.calibration_data import token_batches
from medusa_export.quantize.formats import get_format, get_kv_cache, needs_calibration
from medusa_export.quantize.scales import SCALES_FILE, Scales
from medusa_export.quantize.scales_cache import calibration_key
from medusa_export.quantize.tensorrt_targets import parse_gpus

logger = logging.getLogger(__name__)

MAX_GPU_NODES = len(PRESETS[GPU_TREE]) + 1
GPU_PAST = 1024  # tokens that a step's cost on --gpu-model is estimated behind


class Job:
    """One export's inputs, opened once.

    Args:
        headers: a directory for a plan, which needs the headers of weights only: those of a model on the hub are put there. None
            takes the weights, and reads the heads to see that they are finite.
    """

    def __init__(self, arguments: ExportArguments, *, headers: Path | None = None) -> None:
        fetch(arguments, headers)
        self.arguments, self.ckpt = arguments, arguments.base.path
        self.weight_format = get_format(arguments.quant, arguments.group_size)
        self.release = find_release(arguments.trtllm_version)
        kind, heads = engine_kind(arguments.engine), arguments.own_heads
        self.checkpoint = MedusaCheckpoint.open(self.ckpt, heads.path if heads else None, check_values=headers is None)
        self.checkpoint = self.checkpoint.announcing(lambda file: self.inputs.read(file))
        for warning in self.checkpoint.warnings:
            logger.warning("%s", warning)
        config = self.checkpoint.config
        self.tokenizer = read_tokenizer(self.ckpt, arguments.chat_template)
        self.tokens = ModelTokens.of(self.tokenizer, config.eos_token_ids, vocab_size=config.vocab_size)
        spec = None if arguments.tree == AUTO else arguments.tree
        self.gpu_prediction: dict[str, Any] | None = None  # of take_trees
        self.trtllm_tree = _tree(spec, GPU_TREE, self.checkpoint.num_medusa_heads)
        self.engine_tree = _tree(spec, kind.tree if kind else CPU_TREE, self.checkpoint.num_medusa_heads)

    @cached_property
    def spec(self) -> ExportSpec:
        """The layout of the TensorRT-LLM checkpoint; raises what cannot be built."""
        arguments = self.arguments
        return export_spec(
            self.checkpoint, self.weight_format, tree=self.trtllm_tree, tp=arguments.tp, dtype=arguments.dtype,
            kv_cache=arguments.kv_cache, quant_heads=arguments.quant_heads, exclude=tuple(arguments.exclude),
        )  # fmt: skip

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Calibration conversations; all of them, as the draft vocabulary counts them all."""
        return load_prompts(self.arguments.calib or DEFAULT_CALIB)

    @property
    def measures_tree(self) -> bool:
        """Whether the trees come from what the written engine gets right and costs: asked for, or prompts are given and no tree."""
        return self.arguments.tree == AUTO or (self.arguments.tree is None and self.arguments.prompts is not None)

    @cached_property
    def tree_prompts(self) -> list[Prompt]:
        """What the trees are measured on: those of the prompts that leave room for an answer, or as many as are run."""
        given = load_prompts(self.arguments.prompts) if self.arguments.prompts else []
        encoded = [encode_chat(self.tokenizer, prompt.messages) for prompt in given]
        chosen = prompts_to_run([len(ids) for ids in encoded], self.max_length) if given else []
        self._require_known([encoded[index] for index in chosen], "--prompts", "leave the text of that token out")
        return [given[index] for index in chosen]

    def take_trees(self, engine_dir: Path) -> None:
        """Go on with the trees that were measured on the written engine.

        The engine's is in its tree.json. TensorRT-LLM's comes from the same acceptance and from ``--tree-cost`` or ``--gpu-model``,
        or as if all steps up to the default tree's size cost the same, which is said.
        """
        self.engine_tree = load_tree(str(engine_dir / TREE_FILE))
        counted, cost = Acceptance.load(engine_dir / ACCEPTANCE_FILE), self._gpu_cost()
        found = candidates(counted.paths, counted.positions, cost, max_draft_len=MAX_GPU_NODES - 1)
        if len(found) == 1:
            raise ConfigError(
                "--tree auto", "heads that were never right", "drafts that are sometimes accepted", "train the heads"
            )
        chosen = best(found)
        if not chosen.tree.max_draft_len:
            chosen = max(found[1:], key=lambda candidate: candidate.speedup)
            where = f"as estimated for {cost.estimated}" if cost.estimated else f"in {self.arguments.tree_cost}"
            logger.warning("no tree pays at the costs %s; the best one is predicted %.2fx", where, chosen.speedup)
        self.trtllm_tree = chosen.tree
        self.gpu_prediction = prediction(chosen, counted, self.gpu_costs["curves"][0]) if self.gpu_costs else None
        self.__dict__.pop("spec", None)  # it holds the tree's size

    @cached_property
    def gpu_costs(self) -> dict[str, Any] | None:
        """The body of cost.json as estimated for ``--gpu-model``, one sequence behind 1024 tokens; None without that flag."""
        if self.arguments.gpu_model is None:
            return None
        deployment = self.target.on(find_gpu(self.arguments.gpu_model, "--gpu-model"))
        past = max(1, min(GPU_PAST, self.checkpoint.config.max_position_embeddings - MAX_GPU_NODES))
        body = estimate_costs(deployment, batches=(1,), past_lengths=(past,))
        if not body["curves"]:
            needed = f"{deployment.needed_bytes(1, past) / 1e9:.1f} GB"
            raise ConfigError(
                "--gpu-model", f"a model of {needed} a rank", f"{deployment.gpu.name}", "raise --tp or quantize"
            )
        return body

    @property
    def target(self) -> Target:
        """What runs on TensorRT-LLM's GPU."""
        flags, checkpoint = self.arguments, self.checkpoint
        return Target(
            checkpoint.config, checkpoint.num_medusa_heads, checkpoint.num_medusa_layers, self.weight_format, flags.kv_cache,
            flags.quant_heads, flags.tp,
        )  # fmt: skip

    def _gpu_cost(self) -> CostCurve:
        """What steps of TensorRT-LLM cost: given, estimated, or taken to be all the same."""
        if self.arguments.tree_cost is not None:
            return cost_curve(select(load_costs(self.arguments.tree_cost)))
        if self.gpu_costs is not None:
            return cost_curve(self.gpu_costs["curves"][0])
        logger.warning(
            "TensorRT-LLM's tree is chosen as if all trees up to %d nodes cost the same on its GPU; --gpu-model estimates costs, "
            "--tree-cost takes measured ones", MAX_GPU_NODES,
        )  # fmt: skip
        return CostCurve({1: 1.0, MAX_GPU_NODES: 1.0})

    @property
    def form(self) -> OutputForm:
        """What is written."""
        return output_form(self.arguments.format)

    @property
    def has_scales(self) -> bool:
        """Whether the output has a file of scales."""
        return self.form.holds_base and needs_calibration(self.weight_format, self.arguments.kv_cache)

    @property
    def writes_engine(self) -> bool:
        """Whether the output has an ONNX graph and an engine."""
        return self.form.has_engine and engine_kind(self.arguments.engine) is not None

    @property
    def engine(self) -> EngineKind:
        """What is written; for jobs that write one."""
        kind = engine_kind(self.arguments.engine)
        assert kind is not None  # see writes_engine
        return kind

    @cached_property
    def followers(self) -> Path | None:
        """The table beside the heads that goes into an engine whose steps this project drives; None where there is none."""
        if not (self.writes_engine and self.engine.has_graph and self.checkpoint.num_medusa_heads):
            return None
        path = self.checkpoint.heads.source.files[0].parent / FOLLOWERS_FILE
        return path if path.is_file() else None

    @property
    def gpus(self) -> tuple[int, ...]:
        """Compute capabilities that a TensorRT engine is built for; none where there is no such engine."""
        takes_gpus = self.writes_engine and self.engine.takes_gpus
        return parse_gpus(self.arguments.gpu, self.weight_format) if takes_gpus else ()

    @cached_property
    def given_scales(self) -> Scales | None:
        """Scales of a calibration that was made elsewhere."""
        return Scales.load(self._scales_file) if self._scales_file else None

    @property
    def max_length(self) -> int:
        """Context of the engine."""
        given = self.arguments.max_length
        return min(MAX_LENGTH, self.checkpoint.config.max_position_embeddings) if given is None else given

    @cached_property
    def inputs(self) -> InputFiles:
        """The :attr:`input_files`, hashed while the weights are read; its user closes it."""
        return InputFiles(self.input_files)

    @property
    def input_files(self) -> dict[Path, str]:
        """Everything whose change makes another output, and what a manifest calls it: the flag, and the file's name."""
        flags = self.arguments
        given = {name: getattr(flags, name) for name in ("calib", "prompts", "tree_cost", "chat_template")}
        given |= {"scales": self._scales_file}
        given |= {"tree": Path(flags.tree)} if flags.tree and flags.tree not in (*PRESETS, AUTO) else {}
        tokenizer = sorted(path for path in self.ckpt.glob("*") if path.name in TOKENIZER_FILES)
        heads = {path: f"heads/{path.name}" for path in self.checkpoint.files}
        base = [*(path for path in self.checkpoint.files if path.parent == self.ckpt), *tokenizer]
        named = heads | {path: f"ckpt/{path.name}" for path in base}
        named |= {self.followers: f"heads/{FOLLOWERS_FILE}"} if self.followers else {}
        return named | {path: f"{name}/{path.name}" for name, path in given.items() if path}

    def input_hashes(self) -> dict[str, str]:
        """What a manifest calls an input -> SHA-256 of the file."""
        hashes = self.inputs.hashes()
        return {name: hashes[str(path)] for path, name in self.input_files.items()}

    def base_hashes(self) -> dict[str, str]:
        """File name -> SHA-256 of the base model's config and weights."""
        inputs, base = self.inputs.hashes(), self.checkpoint.base
        files = (base.files[0].parent / "config.json", *base.files)
        return {path.name: inputs[str(path)] for path in files}

    @property
    def estimated_bytes(self) -> int:
        """Upper bound of what is written: every target holds the weights once, every rank the whole embedding."""
        weights = sum(path.stat().st_size for path in self.checkpoint.files)
        lm_head = 4 * self.checkpoint.config.vocab_size * self.checkpoint.config.hidden_size
        copies = lm_head * (self.checkpoint.num_medusa_heads + self.arguments.tp - 1)
        return weights + copies + (2 * weights + 3 * lm_head if self.writes_engine else 0)

    @property
    def device(self) -> str:
        """Where calibration runs."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def batches(self) -> list[list[int]]:
        """Token ids for calibration."""
        batches = token_batches(self.tokenizer, self.prompts, max_prompts=self.arguments.calib_prompts)
        self._require_known(batches, f"{self.ckpt}: tokenizer", "use the tokenizer of this model")
        return batches

    def _require_known(self, texts: list[list[int]], where: str, action: str) -> None:
        """Raise ConfigError for a token that has no row in the embedding."""
        largest = max((max(ids, default=0) for ids in texts), default=0)
        vocab_size = self.checkpoint.config.vocab_size
        if largest >= vocab_size:
            raise ConfigError(where, f"the token {largest}", f"ids below the model's vocab_size {vocab_size}", action)

    def calibration_key(self) -> str:
        """What names this job's calibration in the cache."""
        inputs = self.inputs.hashes()
        base, heads = self.checkpoint.base, self.checkpoint.heads.source
        read = {"config": base.files[0].parent / "config.json"}
        read |= {f"base/{path.name}": path for path in base.files}
        read |= {f"heads/{path.name}": path for path in heads.files if self.arguments.quant_heads}
        return calibration_key(
            {name: inputs[str(path)] for name, path in read.items()},
            batches=self.batches, weight_format=self.weight_format, kv_cache=get_kv_cache(self.arguments.kv_cache),
            quant_heads=self.arguments.quant_heads, device=self.device,
        )  # fmt: skip

    def check(self) -> None:
        """Every refusal that needs no computation, before the first of it."""
        arguments, spec = self.arguments, self.spec
        for warning in release_warnings(self.checkpoint.config, self.release, self.weight_format):
            logger.warning("%s", warning)
        if arguments.gpu is not None and not (self.writes_engine and self.engine.takes_gpus):
            takers = " or ".join(name for name, kind in ENGINES.items() if kind.takes_gpus)
            raise requirement_error("--gpu", arguments.gpu, f"--engine {takers}")
        self._check_tree()
        if self.followers:
            Followers.load(self.followers, self.checkpoint.config.vocab_size)
        if arguments.draft_vocab < 0:
            raise ConfigError("--draft-vocab", str(arguments.draft_vocab), "0 (all) or more", "correct it")
        if self.given_scales is not None:
            self._check_given_scales(spec, self.given_scales)
        if self.has_scales and self.given_scales is None:
            require_packages("modelopt", extra="modelopt")
        if (self.has_scales and self.given_scales is None) or self.writes_engine:
            _ = self.batches  # there is a chat template, and the model knows its tokens
        _ = self.prompts

    def _check_tree(self) -> None:
        arguments = self.arguments
        named = {"--prompts": arguments.prompts, "--tree-cost": arguments.tree_cost, "--gpu-model": arguments.gpu_model}
        for name, value in named.items():
            if value is not None and not self.measures_tree:
                raise requirement_error(name, value, "--tree auto, which measures the tree")
        if not self.measures_tree:
            return
        if not (self.writes_engine and self.engine.runs_here):
            got = f"--engine {arguments.engine}, --format {arguments.format}"
            expected = "the engine that it is measured on, --engine onnxruntime"
            raise ConfigError("--tree auto", got, expected, "give a tree of medusa-tree search")
        if not self.tree_prompts:
            raise ConfigError(
                "--tree auto", "no --prompts", "prompts like those that will be served", "give a JSONL file"
            )
        if arguments.tree_cost is not None and arguments.gpu_model is not None:
            raise ConfigError("--gpu-model", "--tree-cost too", "one of them", "leave one out")
        if arguments.tree_cost is not None:
            select(load_costs(arguments.tree_cost))
        _ = self.gpu_costs  # the GPU has the format and the room

    def _check_given_scales(self, spec: ExportSpec, scales: Scales) -> None:
        if not self.has_scales:
            what = f"a calibration for --quant {self.weight_format.name} --kv-cache {self.arguments.kv_cache}"
            raise ConfigError("--scales", what, "a format that has scales", "leave it out or choose another format")
        require_scales(spec, scales)

    @property
    def _scales_file(self) -> Path | None:
        given = self.arguments.scales
        return given / SCALES_FILE if given and given.is_dir() else given


def fetch(arguments: ExportArguments, headers: Path | None = None) -> None:
    """Download what the hub has to give, after the flags that need no file were found usable.

    Args:
        headers: a directory for the headers of weights, which are not downloaded then.

    Raises:
        MedusaExportError: a flag that cannot be meant, or a model that is not there.
    """
    get_format(arguments.quant, arguments.group_size)
    find_release(arguments.trtllm_version)
    if arguments.pp != 1:
        raise ConfigError(
            "--pp",
            str(arguments.pp),
            "1 (TensorRT-LLM cannot build the Medusa graph on a stage that is not the last)",
            f"use --tp {max(arguments.tp, 1) * max(arguments.pp, 1)}",
        )
    output_form(arguments.format)
    engine_kind(arguments.engine)
    if headers is not None:
        arguments.read_headers(headers)
    _ = arguments.base, arguments.own_heads


def _tree(spec: str | None, default: str, num_medusa_heads: int) -> Tree:
    """The tree asked for; the default one is cut to the heads there are, a given one has to fit as it is."""
    if spec is not None:
        tree = load_tree(spec, num_medusa_heads=num_medusa_heads)
        if not tree.max_draft_len:
            raise ConfigError("--tree", "an empty tree", "at least one choice", "leave it out for the default")
        return tree
    return Tree.from_choices(choice for choice in PRESETS[default] if len(choice) <= num_medusa_heads)
