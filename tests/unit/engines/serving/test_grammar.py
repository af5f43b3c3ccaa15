"""Grammars: answers follow them, the same with a tree as without one, and what cannot be followed is refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.decoding.drafters import TreeDrafter
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.serving.grammar import Grammar, GrammarCompiler, token_bytes
from medusa_export.engines.serving.openai.protocol.tools import CHOICES, ToolParser, closed, read_tools, tool_grammar
from medusa_export.engines.serving.scheduler import Scheduler
from medusa_export.heads.decoding.sampling import Sampling
from medusa_export.heads.decoding.token_choice import TokenRule, token_chooser
from medusa_export.heads.trees.tree import Tree
from tests.integration.openai_fixture import byte_tokenizer
from tests.unit.engines.serving.test_scheduler import TREE, Ears

SCHEMA = {
    "type": "object", "properties": {"a": {"enum": [True, False]}, "b": {"type": "string", "maxLength": 3}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip
TOOLS = read_tools(
    "tools",
    [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"x": {"enum": [1]}},
      "required": ["x"], "additionalProperties": False}}} for name in ("f", "g")],
)  # fmt: skip
END = 256


@pytest.fixture
def engine(tiny_engine: Callable[..., Any]) -> Path:
    """One that reads bytes, of which the first 256 tokens are."""
    path: Path = tiny_engine(drafts_well=True, vocab_size=260, max_length=128).path
    byte_tokenizer(path)
    return path


@pytest.fixture
def compiler(engine: Path) -> GrammarCompiler:
    return GrammarCompiler(read_tokenizer(engine), 260, [END])


@pytest.fixture
def answer(engine: Path) -> Iterator[Callable[..., tuple[list[int], int]]]:
    """``answer(tree, sampling, rule) -> (tokens, steps)``"""
    made: list[Scheduler] = []

    def run(tree: Tree, sampling: Sampling, rule: TokenRule | None = None) -> tuple[list[int], int]:
        decoder = TreeBatchDecoder(engine, slots=2)
        made.append(Scheduler(decoder, drafter=TreeDrafter([tree], decoder.info)))
        made[-1].eos_token_ids = {END}
        ears, prompt = Ears(), [3, 4, 5]
        made[-1].submit(prompt, sampling, ears, chooser=token_chooser(sampling, prompt, [END], rule))
        return ears.tokens, ears.wait().steps

    yield run
    for scheduler in made:
        scheduler.close()


def text_of(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")


LIST = '%llguidance {}\nstart: "[" NUMBER ("," NUMBER){0,4} "]"\nNUMBER: /[1-9][0-9]{0,2}/\n'


@pytest.mark.parametrize(
    ("grammar", "drawn"),
    [(Grammar("x", SCHEMA), {}), (Grammar("x", lark=LIST), {"temperature": 1.5, "seed": 5})],
    ids=["greedy", "drawn"],
)
def test_what_a_grammar_asks_for_with_and_without_drafts(
    compiler: GrammarCompiler, answer: Callable[..., Any], engine: Path, grammar: Grammar, drawn: dict[str, Any]
) -> None:
    sampling = Sampling(max_tokens=120, **drawn)
    plain, plain_steps = answer(Tree(()), sampling, compiler.rule(grammar))
    drafted, steps = answer(TREE, sampling, compiler.rule(grammar))
    assert plain == drafted
    assert steps <= plain_steps
    found = json.loads(read_tokenizer(engine).decode(plain, skip_special_tokens=True))
    if drawn:
        assert 1 <= len(found) <= 5
    else:
        assert isinstance(found["a"], bool)
        assert len(found["b"]) <= 3
    assert answer(TREE, sampling)[0] != plain, "a grammar that shows nothing"


@pytest.mark.parametrize(
    "given",
    [{"repetition_penalty": 0.02}, {"presence_penalty": -80.0, "frequency_penalty": -9.0}, {"logit_bias": {84: -999.0}},
     {"temperature": 0.9, "seed": 3, "top_k": 40, "min_p": 0.001, "repetition_penalty": 0.02}],
)  # fmt: skip
def test_penalties_are_lossless(answer: Callable[..., Any], given: dict[str, Any]) -> None:
    sampling = Sampling(max_tokens=60, **given)
    plain, drafted = answer(Tree(()), sampling), answer(TREE, sampling)
    assert plain[0] == drafted[0]
    assert plain[0] != answer(TREE, Sampling(max_tokens=60))[0], "rules that show nothing"


def test_drafts_stand_under_a_mask(compiler: GrammarCompiler, answer: Callable[..., Any]) -> None:
    """A grammar that allows everything: the tree saves as many steps as without one."""
    anything = Grammar("tools", lark="%llguidance {}\nstart: TEXT\nTEXT: /(.|\\n)*/\n")
    free, steps = answer(TREE, Sampling(max_tokens=60, min_tokens=60))
    masked, masked_steps = answer(TREE, Sampling(max_tokens=60), compiler.rule(anything))
    assert steps < 59
    if masked == free:
        assert masked_steps == steps
    assert masked_steps < len(masked) - 1


def test_an_answer_ends_when_its_grammar_does(compiler: GrammarCompiler, answer: Callable[..., Any]) -> None:
    tokens, _ = answer(TREE, Sampling(max_tokens=50), compiler.rule(Grammar("x", {"const": 5})))
    assert tokens[-1] == END
    assert len(tokens) == 2


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "foo"}, "foo"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "a" * 5000 + "("}, "unclosed group"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "object", "description": "half: \ud800"}, ""),
        ({"properties": {"\ud800": {}}}, ""),
        (functools.reduce(lambda inner, _: {"items": inner}, range(200), {"type": "array"}), "recursion"),
    ],
)
def test_schemas_that_cannot_be_followed(compiler: GrammarCompiler, schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compiler.rule(Grammar("response_format", schema))
    assert refused.value.where == "response_format"
    assert reason in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_tool_s_pattern_that_is_none(compiler: GrammarCompiler) -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "string", "pattern": "("}}}
    tools = read_tools("tools", [{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    with pytest.raises(ConfigError, match="unclosed group") as refused:
        compiler.rule(tool_grammar(tools, CHOICES["auto"], parallel=True))
    assert "%llguidance" not in str(refused.value), "our grammar is no client's business"


def test_a_model_that_cannot_end(engine: Path) -> None:
    with pytest.raises(ConfigError, match="end of sequence"):
        GrammarCompiler(read_tokenizer(engine), 260, []).rule(Grammar("response_format", SCHEMA))


def accepts(compiler: GrammarCompiler, engine: Path, grammar: Grammar, text: str) -> bool:
    matcher = compiler.rule(grammar).matcher
    tokens = read_tokenizer(engine)(text, add_special_tokens=False)["input_ids"]
    return matcher.validate_tokens([*tokens, END]) == len(tokens) + 1


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("choice", "parallel", "text", "is_taken"),
    [
        ("auto", True, "no tool", True),
        ("auto", True, f"let me see {CALL}{CALL}", True),
        ("auto", False, f"let me see {CALL}", True),
        ("auto", False, f"{CALL}{CALL}", False),
        ("auto", True, "<tool_call>\n{}", False),
        ("required", True, "no tool", False),
        ("required", True, f"{CALL}\n{CALL.replace('f', 'g', 0)}", True),
        ("required", False, f"{CALL}\n{CALL}", False),
        ("required", True, CALL.replace("1", "2"), False),
    ],
)
def test_calls(compiler: GrammarCompiler, engine: Path, choice: str, parallel: bool, text: str, is_taken: bool) -> None:
    grammar = tool_grammar(TOOLS, CHOICES[choice], parallel=parallel)
    assert accepts(compiler, engine, grammar, text) == is_taken


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_found_however_they_come(size: int) -> None:
    text = f"a < b. {CALL}{CALL} <tool"
    parser, said, calls = ToolParser(), "", list[Any]()
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    for index, part in enumerate(parts):
        new, more = parser.feed(part, is_last=index + 1 == len(parts))
        said, calls = said + new, calls + more
    assert said == "a < b. "
    assert [call["function"] for call in calls] == [{"name": "f", "arguments": '{"x": 1}'}] * 2
    assert [call["index"] for call in calls] == [0, 1]
    cut = ToolParser().feed('<tool_call>\n{"name', is_last=True)
    assert cut == ("", [])
    assert ToolParser().feed("1 <", is_last=True) == ("1 <", [])


def test_objects_of_tools_are_closed_where_they_do_not_say() -> None:
    inner = {"type": "object", "properties": {"n": {"type": "integer"}}}
    schema = {
        "type": "object", "$defs": {"P": inner}, "properties": {
            "list": {"type": "array", "items": inner}, "either": {"anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}]},
            "any": {"type": "object"}, "open": {**inner, "additionalProperties": True}, "const": {"const": inner},
        },
    }  # fmt: skip
    found, shut = closed(schema), {**inner, "additionalProperties": False}
    assert found["additionalProperties"] is False
    assert (found["$defs"], found["properties"]["list"]["items"]) == ({"P": shut}, shut)
    same = ("any", "open", "const", "either")
    assert [found["properties"][name] for name in same] == [schema["properties"][name] for name in same]
    parts = {"allOf": [inner, {"properties": {"m": {"type": "integer"}}}]}
    assert closed(parts) == parts


def test_a_required_call_has_keys_of_its_schema_alone_and_may_be_the_last(
    compiler: GrammarCompiler, engine: Path
) -> None:
    parameters = {"type": "object", "properties": {"x": {"enum": [1]}}, "required": ["x"]}
    tools = read_tools("tools", [{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    spelled = {one: number for number, one in enumerate(token_bytes(read_tokenizer(engine), 256))}

    def permitted(text: str) -> list[bool]:
        rule = compiler.rule(tool_grammar(tools, CHOICES["required"], parallel=True))
        for byte in text.encode():
            rule.take(spelled[bytes([byte])])
        return [bool(bias) for bias in rule.matcher.compute_logit_bias()]

    start = '<tool_call>\n{"name": "f", "arguments": {"x": 1'
    assert not permitted(start)[spelled[b","]]
    assert permitted(start)[spelled[b"}"]]
    whole = start + "}}\n</tool_call>"
    assert permitted(whole)[END]
    assert permitted(f"{whole}\n{whole}")[END]


def test_bytes_of_tokens(engine: Path) -> None:
    tokenizer = read_tokenizer(engine)
    found = list(token_bytes(tokenizer, 260))
    assert sorted(found[:256]) == [bytes([number]) for number in range(256)]
    assert all(tokenizer.decode([number]).encode() == found[number] for number in range(256) if found[number] < b"\x80")
