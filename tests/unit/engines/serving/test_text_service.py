"""Texts in and out on one scheduler, asked from several threads."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError, TreeError
from medusa_export.core.text.encoding import encode_chat
from medusa_export.engines.serving.openai.protocol.errors import refusal_of
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.engines.serving.text_service import Piece, TextRequest, TextService
from medusa_export.heads.decoding.sampling import Sampling
from medusa_export.heads.trees.tree import Tree

SECONDS = 60
PLAIN, SPELLING = "w3 w4 w5", "w3 </s> <user> w5"  # the second one spells special tokens


@pytest.fixture
def serve(tiny_engine: Callable[..., Any]) -> Iterator[Callable[..., TextService]]:
    """``serve(tree=None, **options) -> TextService``, closed in the end."""
    made: list[TextService] = []

    def start(*, tree: Path | None = None, **options: Any) -> TextService:
        made.append(TextService(tiny_engine(drafts_well=True).path, ServingOptions(**options), tree=tree))
        made[-1].scheduler.eos_token_ids = set()  # so that answers have the length that is asked for
        return made[-1]

    yield start
    for service in made:
        service.close()


def ask(service: TextService, text: str, count: int = 1) -> list[Piece]:
    """All pieces of an answer."""
    pieces: queue.Queue[Piece] = queue.Queue()
    service.submit(TextRequest([{"role": "user", "content": text}], sampling=Sampling(max_tokens=count)), pieces.put)
    found = [pieces.get(timeout=SECONDS)]
    while found[-1].end is None:
        found.append(pieces.get(timeout=SECONDS))
    return found


def test_special_tokens_stay_text_when_threads_ask_at_once(serve: Callable[..., TextService]) -> None:
    """The tokenizer remembers whether it splits special tokens: one thread's answer must not depend on another's question."""
    service = serve(max_queue=1000)
    texts = [PLAIN, SPELLING] * 40
    expected = {
        text: len(encode_chat(service.tokenizer, [{"role": "user", "content": text}])) for text in (PLAIN, SPELLING)
    }
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: ask(service, text), texts))
    ends = [pieces[-1].end for pieces in answers]
    assert [end.prompt_tokens for end in ends if end] == [expected[text] for text in texts]


def test_another_tree(serve: Callable[..., TextService], tmp_path: Path) -> None:
    tree = tmp_path / "tree.json"
    tree.write_text(Tree.from_choices([[0]]).to_json())
    steps = {}
    for name, path in (("engine's", None), ("chain of one", tree)):
        end = ask(serve(tree=path), PLAIN, 30)[-1].end
        assert end is not None
        steps[name] = end.steps
    assert steps["engine's"] < steps["chain of one"] < 29, steps
    with pytest.raises(TreeError):
        serve(tree=tmp_path / "none.json")
    with pytest.raises(ConfigError, match="--tree requires --drafts heads"):
        serve(tree=tree, drafts="both")


def test_tokens_and_back(serve: Callable[..., TextService]) -> None:
    service, messages = serve(), [{"role": "user", "content": PLAIN}]
    tokens, short = (service.encode(TextRequest(messages, opens_answer=opens)) for opens in (True, False))
    assert len(short) < len(tokens)
    assert tokens[: len(short)] == short
    assert "<user>" in service.decode(tokens)  # special tokens too
    assert service.encode(TextRequest(prompt="", adds_special=False)) == []


def test_stop_words_are_no_prompt(serve: Callable[..., TextService]) -> None:
    with pytest.raises(ConfigError, match="got nothing") as refused:
        serve().submit(TextRequest(prompt="", stop=("x",)), print)
    assert refusal_of(refused.value).code == "invalid_value"


def test_a_template_that_refuses_is_not_located(serve: Callable[..., TextService]) -> None:
    """Clients see this error, and where the engine lies is none of their business."""
    service = serve()
    service.tokenizer.chat_template = "{{ raise_exception('only one message') }}"
    with pytest.raises(ConfigError, match="only one message") as refused:
        ask(service, PLAIN)
    assert str(service.tokenizer.name_or_path) not in str(refused.value)


def test_a_token_that_the_model_does_not_have_is_refused_as_the_clients_fault(tiny_engine: Callable[..., Any]) -> None:
    """The tokenizer has 97 tokens and the model 90: w85 is the token 90."""
    service = TextService(tiny_engine(vocab_size=90).path, ServingOptions())
    try:
        for asked in (TextRequest(prompt="w3 w85"), TextRequest([{"role": "user", "content": "w3 w85"}])):
            with pytest.raises(ConfigError, match=r"prompt: got the token 90; expected ids below .* 90") as caught:
                service.submit(asked, print)
            assert refusal_of(caught.value).status == 400
    finally:
        service.close()


def test_a_message_may_be_empty_and_a_prompt_may_not(serve: Callable[..., TextService]) -> None:
    """A chat template writes the rest of a conversation; a prompt without text has no token."""
    service = serve()
    assert service.encode(TextRequest([{"role": "user", "content": ""}]))
    for prompt in ("", " \n"):
        with pytest.raises(ConfigError, match="got nothing"):
            service.submit(TextRequest(prompt=prompt, stop=("a",)), lambda piece: None)
