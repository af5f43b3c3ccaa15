"""Text in, text out on one scheduler: what every server of an engine stands on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from medusa_export.core.errors import ConfigError
from medusa_export.core.json_lines import is_text
from medusa_export.core.text.encoding import encode_chat, encode_text
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.decoding.batch_trees import BatchTrees
from medusa_export.engines.decoding.draft_kinds import settle_drafts
from medusa_export.engines.serving.decoders import open_served, require_served
from medusa_export.engines.serving.grammar import Grammar, GrammarCompiler, token_bytes
from medusa_export.engines.serving.meter import Meter
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.engines.serving.request import FinishInfo, RequestHandle
from medusa_export.engines.serving.scheduler import Scheduler
from medusa_export.engines.serving.text_stream import TextStream
from medusa_export.heads.contract.engine_info import TREE_FILE, EngineInfo
from medusa_export.heads.decoding.sampling import Sampling
from medusa_export.heads.decoding.token_choice import TokenChooser, TokenLogprob, token_chooser

MAX_STOP_WORDS = 16


@dataclass(frozen=True)
class TextRequest:
    """What a client asks.

    Attributes:
        messages: a conversation, for the model's chat template; or
        prompt: text that the model goes on from. Special tokens are read as such here, as nobody else writes them; or
        prompt_ids: the tokens of such a text.
        stop: words that end the text and are not part of it.
        grammar: what the answer has to look like.
        prompt_only: no answer is wanted, only what the prompt is in tokens.
        opens_answer: the conversation goes on with what begins an answer.
        adds_special: the text gets what the tokenizer adds, such as the token that begins one.
    """

    messages: Sequence[Mapping[str, str]] = ()
    prompt: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    timeout_s: float | None = None
    prompt_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None
    prompt_only: bool = False
    opens_answer: bool = True
    adds_special: bool = True


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: what is new, whole characters only.
        token_ids: what is new; their text may come with a later piece.
        end: how the answer ended, with its last piece.
        logprobs: of the new tokens, where they were asked for.
        offsets: of the new tokens: characters of the answer before each one's text. Tokens of one character have the same.
        is_cut: a stop word ended the text, and tokens may go on behind it.
    """

    text: str
    token_ids: list[int]
    end: FinishInfo | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    offsets: tuple[int, ...] = ()
    is_cut: bool = False


class TextService:
    """An engine that answers texts, many at once.

    Args:
        engine_dir: with its tokenizer and tree.
        meter: see :class:`~medusa_export.engines.serving.scheduler.Scheduler`.
        tree: tree.json to use instead of the engine's.
        chat_template: a file with the template to use instead of the tokenizer's own.
    """

    def __init__(
        self,
        engine_dir: Path,
        options: ServingOptions,
        meter: Meter | None = None,
        *,
        tree: Path | None = None,
        chat_template: Path | None = None,
    ) -> None:
        info = EngineInfo.load(engine_dir)
        trees = BatchTrees.load(tree or engine_dir / TREE_FILE, unmeasured=options.tree_max_batch)
        trees.require(info)
        self.options, self.tokenizer = options, read_tokenizer(engine_dir, chat_template)
        self._encoding = threading.Lock()  # a tokenizer remembers how special tokens are read
        require_served(engine_dir, info, options)
        options = replace(options, drafts=settle_drafts(options.drafts, info, own_tree=tree is not None))
        self._grammars = GrammarCompiler(self.tokenizer, info.vocab_size, info.eos_token_ids)
        self._vocab_size, self.end_ids = info.vocab_size, info.eos_token_ids
        decoder, drafter = open_served(engine_dir, info, options, trees)
        self.max_length = decoder.max_length
        self.name = Path(str(info.source.get("checkpoint", engine_dir))).name
        self.scheduler = Scheduler(
            decoder, drafter=drafter, max_queue=options.max_queue, prefill_tokens=options.prefill_tokens, meter=meter
        )

    def submit(self, request: TextRequest, say: Callable[[Piece], None]) -> RequestHandle | None:
        """Queue a request; ``say`` gets its answer in pieces, in the scheduler's thread, the last one with its end. From any thread.

        Returns:
            what cancels it; None where no answer was wanted, and ``say`` has been told everything.

        Raises:
            ConfigError: a request that cannot be answered.
            BusyError: too many wait.
            ClosedError: the server is stopping.
        """
        input_ids = self.encode(request)
        if not request.prompt_ids and not request.messages and not request.prompt.strip():
            raise ConfigError("text", "nothing", "a question or a text to go on from", "add one")
        if request.prompt_only:
            say(Piece("", [], FinishInfo("length", len(input_ids), 0, 0, 0.0)))
            return None
        timeout_s = min(request.timeout_s or self.options.timeout_s, self.options.timeout_s)
        rule = self._grammars.rule(request.grammar) if request.grammar else None
        chooser = token_chooser(request.sampling, input_ids, self.end_ids, rule)
        stream = TextStream(self.tokenizer, request.stop, request.sampling.min_tokens)
        callbacks = _TextCallbacks(stream, say, chooser)
        return self.scheduler.submit(input_ids, request.sampling, callbacks, timeout_s=timeout_s, chooser=chooser)

    def encode(self, request: TextRequest) -> list[int]:
        """The tokens of a request's prompt. From any thread.

        Raises:
            ConfigError: a request that cannot be answered.
        """
        self._check(request)
        with self._encoding:
            return self._encode(request)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones by their names.

        Raises:
            ConfigError: a number that is no token.
        """
        self._require_tokens("tokens", token_ids)
        return str(self.tokenizer.decode(list(token_ids)))

    def token_text(self, token: int) -> str:
        """How one token is told of: its own text, special tokens by their names, parts of characters as OpenAI does."""
        spelled = self._token_bytes[token]
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text; those of all tokens of a text make up the text."""
        return self._token_bytes[token]

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        return list(token_bytes(self.tokenizer, self._vocab_size))

    def close(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        """See :meth:`~medusa_export.engines.serving.scheduler.Scheduler.close`."""
        self.scheduler.close(drain=drain, timeout_s=timeout_s)

    def _encode(self, request: TextRequest) -> list[int]:
        if request.prompt_ids:
            return list(request.prompt_ids)
        if request.messages:
            try:
                return encode_chat(self.tokenizer, request.messages, opens_answer=request.opens_answer)
            except ConfigError as error:  # it names the engine's directory, which is no client's business
                raise ConfigError("messages", error.got, error.expected, error.action) from error
        return encode_text(self.tokenizer, request.prompt, adds_special=request.adds_special)

    def _check(self, request: TextRequest) -> None:
        texts = [*(str(message.get("content", "")) for message in request.messages), request.prompt, *request.stop]
        if not all(is_text(text) for text in texts):
            raise ConfigError("text", "half of a surrogate pair", "whole characters", "encode it as UTF-8")
        size, limit = sum(len(text.encode()) for text in texts), self.options.max_text_bytes
        if size > limit:
            raise ConfigError("text", f"{size} bytes", f"at most {limit}", "shorten it")
        self._require_tokens("prompt", request.prompt_ids)
        self._require_tokens("logit_bias", tuple(request.sampling.logit_bias))
        if len(request.stop) > MAX_STOP_WORDS:
            raise ConfigError("stop", f"{len(request.stop)} words", f"at most {MAX_STOP_WORDS}", "leave some out")
        if request.timeout_s is not None and not 0 < request.timeout_s < float("inf"):
            raise ConfigError("timeout_s", f"{request.timeout_s:g}", "seconds, more than 0", "change it")

    def _require_tokens(self, where: str, tokens: Sequence[int]) -> None:
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._vocab_size:
            got = f"token {min(tokens) if min(tokens) < 0 else max(tokens)}"
            raise ConfigError(where, got, f"0 .. {self._vocab_size - 1}", "correct the request")


class _TextCallbacks:
    """Tokens of the scheduler into pieces of text."""

    def __init__(self, stream: TextStream, say: Callable[[Piece], None], chooser: TokenChooser | None) -> None:
        self._stream, self._say = stream, say
        self._logprobs = chooser.logprobs if chooser else []
        self._text, self._token_ids, self._told = "", list[int](), 0
        self._offsets: list[int] = []

    def take(self, token: int) -> bool:
        self._offsets.append(self._stream.offset)
        self._token_ids.append(token)
        self._text += self._stream.feed(token)
        return not self._stream.is_stopped

    def flush(self) -> None:
        if self._text:
            self._say(self._piece(None))

    def end(self, end: FinishInfo) -> None:
        self._text += self._stream.finish()
        self._say(self._piece(end))

    def _piece(self, end: FinishInfo | None) -> Piece:
        told = self._told + len(self._token_ids)
        logprobs, offsets = tuple(self._logprobs[self._told : told]), tuple(self._offsets[self._told : told])
        piece = Piece(self._text, self._token_ids, end, logprobs, offsets, self._stream.is_stopped)
        self._told = told
        self._text, self._token_ids = "", []
        return piece
