"""The reference decoders: greedy is transformers', Medusa is greedy, and its steps are as long as its heads are good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from medusa_export.core.errors import ConfigError, TreeError
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference
from medusa_export.heads.decoding.reference import greedy, head_logits, medusa_decode, verify_tree
from medusa_export.heads.trees.tree import Tree, load_tree

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
PROMPT = [1, 40, 7, 7, 61, 12, 90, 3]
NO_EOS: tuple[int, ...] = ()


@pytest.fixture
def pair(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Callable[..., Path]
) -> Callable[..., tuple[Any, MedusaCheckpoint]]:
    """``pair(family, layout="v1", *, vocab, **config) -> (transformers model, checkpoint)``."""

    def make(family: str, layout: str = "v1", *, vocab: int = 97, **config: Any) -> tuple[Any, MedusaCheckpoint]:
        model = tiny_checkpoint(tmp_path / "model", family, vocab_size=vocab, **config)
        heads = tiny_heads(tmp_path / "heads", layout, 4, vocab=vocab)
        return load_reference(model, torch.float32), MedusaCheckpoint.open(model, heads)

    return make


def decode(model: Any, checkpoint: MedusaCheckpoint, tree: Tree, new: int = 24) -> tuple[list[int], list[int]]:
    prompt = [token % checkpoint.config.vocab_size for token in PROMPT]
    return medusa_decode(model, checkpoint, prompt, tree, max_new_tokens=new, eos_token_ids=NO_EOS)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers(family: str, pair: Callable[..., Any]) -> None:
    model, _ = pair(family)
    expected = model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0
    )
    tokens = greedy(model, PROMPT, max_new_tokens=40, eos_token_ids=NO_EOS)
    assert tokens == expected[0, len(PROMPT) :].tolist()
    assert len(set(tokens)) > 5, "a constant output would prove little"


def test_greedy_ends_with_the_first_end_of_sequence(pair: Callable[..., Any]) -> None:
    model, checkpoint = pair("llama")
    free = greedy(model, PROMPT, max_new_tokens=30, eos_token_ids=NO_EOS)
    eos = [free[11], 96]
    expected = free[: free.index(free[11]) + 1]
    assert greedy(model, PROMPT, max_new_tokens=30, eos_token_ids=eos) == expected
    tokens, _ = medusa_decode(model, checkpoint, PROMPT, load_tree("cpu-8"), max_new_tokens=30, eos_token_ids=eos)
    assert tokens == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["none", "cpu-8", "medusa-63"])
def test_medusa_is_greedy(family: str, preset: str, pair: Callable[..., Any]) -> None:
    # of 24 words, random heads rank the right one among ten often enough to accept paths all over the tree
    model, checkpoint = pair(family, vocab=24)
    prompt = [token % 24 for token in PROMPT]
    tokens, accepted = decode(model, checkpoint, load_tree(preset))
    assert tokens == greedy(model, prompt, max_new_tokens=24, eos_token_ids=NO_EOS)
    assert 24 <= 1 + sum(accepted) < 24 + max(accepted)  # the first token is the prompt's, and the last step overshoots
    assert set(accepted) == {1} if preset == "none" else len(set(accepted)) > 1


@pytest.mark.parametrize("layout", ["v2", "vllm"])
def test_other_layouts(layout: str, pair: Callable[..., Any]) -> None:
    model, checkpoint = pair("llama", layout, tie_word_embeddings=layout == "v2")
    tokens, _ = decode(model, checkpoint, load_tree("cpu-8"))
    assert tokens == greedy(model, PROMPT, max_new_tokens=24, eos_token_ids=NO_EOS)


def test_a_tree_as_wide_as_the_vocabulary_accepts_in_every_step(pair: Callable[..., Any]) -> None:
    model, checkpoint = pair("llama", vocab=12)
    _, accepted = decode(model, checkpoint, Tree.from_choices([[rank] for rank in range(12)]))
    assert set(accepted[:-1]) == {2}, "the answer ends within the last step"


def test_good_heads_give_long_steps_and_swapped_ones_do_not(
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    tiny_heads: Callable[..., Path],
    predictable: Callable[..., None],
) -> None:
    model_dir, heads_dir = tiny_checkpoint(tmp_path / "model"), tiny_heads(tmp_path / "heads")
    predictable(model_dir, heads_dir)
    model, checkpoint = load_reference(model_dir, torch.float32), MedusaCheckpoint.open(model_dir, heads_dir)
    tree = Tree.from_choices([[0], [0, 0], [0, 0, 0]])
    good, accepted = decode(model, checkpoint, tree, 40)
    assert np.mean(accepted) > 3.5

    path = heads_dir / "medusa_lm_head.safetensors"
    heads = {name: tensor.clone() for name, tensor in load_file(path).items()}
    heads["0.1.weight"], heads["1.1.weight"] = heads["1.1.weight"], heads["0.1.weight"]
    save_file(heads, path)
    tokens, accepted = decode(model, MedusaCheckpoint.open(model_dir, heads_dir), tree, 40)
    assert tokens == good
    assert np.mean(accepted) < 1.2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_sees_its_own_path_alone(family: str, pair: Callable[..., Any]) -> None:
    model, _ = pair(family)
    tree = Tree.from_choices([[0], [1], [0, 0], [1, 0], [1, 0, 0]])
    node_ids = [5, 10, 20, 30, 30, 40]
    hidden, next_ids = verify_tree(model, PROMPT, tree, node_ids)  # [N, D], [N]
    for path in tree.retrieve_indices:
        nodes = path[path >= 0]
        with torch.inference_mode():
            ids = torch.tensor([[*PROMPT, *(node_ids[node] for node in nodes)]])
            alone = model.model(input_ids=ids).last_hidden_state[0, len(PROMPT) :]  # [path, D]
            best = model.lm_head(alone).argmax(-1)
        torch.testing.assert_close(hidden[nodes], alone, atol=1e-4, rtol=0)
        assert next_ids[nodes].tolist() == best.tolist()


def test_heads_are_residual_blocks(pair: Callable[..., Any]) -> None:
    _, checkpoint = pair("llama")
    hidden = torch.randn(64, generator=torch.Generator().manual_seed(3))
    read = checkpoint.read
    block = hidden @ read("medusa_heads.1.0.linear.weight").T + read("medusa_heads.1.0.linear.bias")
    expected = (hidden + block * block.sigmoid()) @ read("medusa_heads.1.1.weight").T
    torch.testing.assert_close(head_logits(checkpoint, hidden)[1], expected)
    assert not torch.allclose(expected, functional.linear(hidden, read("medusa_heads.1.1.weight")), atol=0.1)


def test_one_token_prompt(pair: Callable[..., Any]) -> None:
    model, checkpoint = pair("qwen2")
    tokens, _ = medusa_decode(model, checkpoint, [9], load_tree("cpu-3"), max_new_tokens=8, eos_token_ids=NO_EOS)
    assert tokens == greedy(model, [9], max_new_tokens=8, eos_token_ids=NO_EOS)


def test_refusals(pair: Callable[..., Any]) -> None:
    model, checkpoint = pair("mistral", sliding_window=32)
    with pytest.raises(TreeError, match="depth 5"):
        decode(model, checkpoint, Tree.from_choices([[0] * depth for depth in (1, 2, 3, 4, 5)]))
    with pytest.raises(ConfigError, match="sliding_window"):
        decode(model, checkpoint, load_tree("cpu-8"), new=24)
