"""The portable decoder and heads in ONNX Runtime on the CPU, the very files that TensorRT gets, against transformers and torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from medusa_export.exporter.onnx.portable.decoder import write_portable_decoder
from medusa_export.exporter.onnx.portable.heads import write_portable_heads
from medusa_export.exporter.onnx.portable.linear import PortableLinear
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.decoding.reference import head_logits, verify_tree
from medusa_export.heads.trees.tree import Tree

# The largest error of a logit (standard deviation 1.7) or a hidden value (1.0) that was seen is 6e-6 in float32 and 0.047 in float16,
# over the families; other processors sum in another order, hence some room.
FLOAT32_ERROR, FLOAT16_ERROR = 3e-5, 0.15
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
MAX_LENGTH = 64
PROMPT = [1, 40, 7, 7, 61, 12, 90, 3, 55, 28]
TREE = Tree.from_choices([[0], [1], [0, 0], [0, 1], [1, 0], [1, 0, 0]])
NODE_IDS = [5, 10, 20, 30, 31, 30, 40]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "head_dim": ("llama", {"head_dim": 32}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "all biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "yarn rope": ("qwen2", {"rope_parameters": YARN}),
    "no groups": ("mistral", {"num_key_value_heads": 4}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "norm eps": ("llama", {"rms_norm_eps": 0.3}),
}


class Decoder:
    """decoder.onnx behind the simplest loop there is: the caches go in and come out as arrays."""

    def __init__(self, session: Any) -> None:
        self.session = session
        inputs = {item.name: item for item in session.get_inputs()}
        dtype = np.float16 if "float16" in inputs["past_key_values.0.key"].type else np.float32
        self.past = {
            name: np.full(
                item.shape, 7, dtype=dtype
            )  # rows that nothing may see: a zero could hide that something does
            for name, item in inputs.items()
            if name.startswith("past_key_values")
        }
        self.outputs = [
            "next_ids", "hidden_states", "logits", *(name.replace("past_key_values", "present") for name in self.past)
        ]  # fmt: skip
        self.length = 0

    def run(self, ids: Sequence[int], tree: Tree | None = None, keep: int | None = None) -> tuple[Any, Any, Any]:
        """next_ids [S], hidden [S, D] and logits [S, V] of new tokens: causal ones, or the nodes of a tree."""
        size = len(ids)
        depths = np.arange(size) if tree is None else tree.depths
        mask = np.tril(np.ones((size, size), dtype=bool)) if tree is None else tree.mask
        feeds = {
            "input_ids": np.array([ids]), "position_offsets": depths[None], "past_length": np.array([self.length]),
            "total_length": np.array([self.length + size]), "tree_mask": mask[None, None], "output_rows": np.arange(size),
            **self.past,
        }  # fmt: skip
        next_ids, hidden, logits, *present = self.session.run(self.outputs, feeds)
        self.past = dict(zip(self.past, present, strict=True))
        self.length += size if keep is None else keep
        return next_ids, hidden, logits


@pytest.fixture
def decoder(make_case: Callable[..., Any], open_session: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """``decoder(family, form="float", *, dtype, **config) -> (case, its portable decoder)``."""

    def make(family: str, form: str = "float", *, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
        case = make_case(family, dtype=torch.float32, **config)
        linear = PortableLinear(
            case.checkpoint, form, dtype, case.scales, group_size=16 if form == "int4_awq" else None
        )
        write_portable_decoder(tmp_path, case.checkpoint, linear, max_length=MAX_LENGTH)
        return case, Decoder(open_session(tmp_path / "decoder.onnx"))

    return make


def logits_of(model: Any, ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].numpy()  # [S, V]


def check(model: Any, decoder: Decoder, tolerance: float) -> None:
    """Prefill, a single step, a tree of which nothing is kept, and the same tree again, against the oracle."""
    next_ids, hidden, logits = decoder.run(PROMPT[:-1])
    np.testing.assert_allclose(logits, logits_of(model, PROMPT[:-1]), atol=tolerance, rtol=0)
    assert next_ids.tolist() == logits.argmax(-1).tolist()
    _, _, logits = decoder.run(PROMPT[-1:])
    np.testing.assert_allclose(logits[0], logits_of(model, PROMPT)[-1], atol=tolerance, rtol=0)
    decoder.run(list(reversed(NODE_IDS)), TREE, keep=0)
    next_ids, hidden, logits = decoder.run(NODE_IDS, TREE)
    expected, greedy = verify_tree(model, PROMPT, TREE, NODE_IDS)
    np.testing.assert_allclose(hidden, expected.numpy(), atol=tolerance, rtol=0)
    with torch.no_grad():
        wanted = model.lm_head(expected).numpy()
    np.testing.assert_allclose(logits, wanted, atol=tolerance, rtol=0)
    best, second = np.sort(wanted, axis=-1)[:, [-1, -2]].T
    clear = best - second > 2 * tolerance
    assert clear.any()
    assert next_ids[clear].tolist() == greedy[clear].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, decoder: Callable[..., Any]) -> None:
    case, made = decoder(family)
    check(load_reference(case.model_dir, torch.float32), made, FLOAT32_ERROR)


class BaseModel(torch.nn.Module):
    """What torch.onnx.export gets: token ids, an additive mask and positions in, logits out, without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        output = self.model.model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
        logits: torch.Tensor = self.model.lm_head(output.last_hidden_state)
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_equals_the_graph_that_torch_exports(
    family: str, decoder: Callable[..., Any], open_session: Callable[..., Any], tmp_path: Path
) -> None:
    """torch.onnx.export(dynamo=True) of transformers' model, in the same runtime: a prompt and a tree behind it, in one pass."""
    pytest.importorskip("onnxscript", reason="torch's exporter needs it; the dev extra has it")
    case, made = decoder(family)
    past, size = len(PROMPT), len(PROMPT) + len(NODE_IDS)
    visible = torch.ones(size, size, dtype=torch.bool).tril()
    visible[past:, past:] = torch.from_numpy(TREE.mask)
    mask = torch.zeros(1, 1, size, size).masked_fill_(~visible, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(past), past + torch.from_numpy(TREE.depths)])[None]
    inputs = (torch.tensor([[*PROMPT, *NODE_IDS]]), mask, positions)
    program = torch.onnx.export(
        BaseModel(load_reference(case.model_dir, torch.float32)), inputs, dynamo=True, opset_version=23, optimize=False,
        verbose=False, input_names=["input_ids", "mask", "position_ids"], output_names=["logits"],
    )  # fmt: skip
    assert program is not None
    program.save(tmp_path / "torch.onnx")
    feeds = dict(zip(("input_ids", "mask", "position_ids"), (item.numpy() for item in inputs), strict=True))
    (wanted,) = open_session(tmp_path / "torch.onnx").run(["logits"], feeds)
    logits = np.concatenate([made.run(PROMPT)[2], made.run(NODE_IDS, TREE)[2]])
    np.testing.assert_allclose(logits, wanted[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, decoder: Callable[..., Any]) -> None:
    family, config = VARIANTS[variant]
    case, made = decoder(family, **config)
    check(load_reference(case.model_dir, torch.float32), made, FLOAT32_ERROR)


@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit(family: str, decoder: Callable[..., Any]) -> None:
    """The file that TensorRT gets, in the arithmetic of ONNX Runtime's CPU kernels: its own 16-bit inputs and outputs a node."""
    case, made = decoder(family, dtype=torch.float16)
    check(load_reference(case.model_dir, torch.float32), made, FLOAT16_ERROR)


def test_standard_operators_only(decoder: Callable[..., Any], tmp_path: Path) -> None:
    decoder("qwen3", tie_word_embeddings=True)
    model = onnx.load(tmp_path / "decoder.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert "Shape" not in {node.op_type for node in model.graph.node}
    assert [list(tensor.dims) for tensor in model.graph.initializer].count([97, 64]) == 1, "a tied table is stored once"


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("restricted", [False, True])
def test_heads(
    layout: str, restricted: bool, make_case: Callable[..., Any], open_session: Callable[..., Any], tmp_path: Path
) -> None:
    case = make_case(layout=layout, num_heads=3, num_layers=2, dtype=torch.float32)
    tokens = torch.tensor([90, 3, 5, 17, 44, 61, 2]) if restricted else None
    write_portable_heads(tmp_path, case.checkpoint, dtype=torch.float32, top_k=4, draft_vocab=tokens)
    hidden = torch.randn(64, generator=torch.Generator().manual_seed(3))
    (drafts,) = open_session(tmp_path / "heads.onnx").run(None, {"hidden_states": hidden[None].numpy()})
    expected = head_logits(case.checkpoint, hidden)  # [H, V]
    wanted = expected.topk(4).indices if tokens is None else tokens[expected[:, tokens].topk(4).indices]
    assert drafts.tolist() == wanted.tolist()
