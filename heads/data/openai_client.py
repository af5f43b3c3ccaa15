"""Chat answers from servers that speak OpenAI's protocol: vLLM, TensorRT-LLM, llama.cpp, ``transformers serve`` and others."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from medusa_export.core.errors import ConfigError, missing_package
from medusa_export.heads.data.chat_model import AnswerError, ChatAnswer, ModelUnavailableError
from medusa_export.heads.decoding.sampling import Sampling

if TYPE_CHECKING:
    from openai import APIError, AsyncOpenAI

logger = logging.getLogger(__name__)

SET_ASIDE = 3  # failed requests in a row, each after all its retries, and a server gets no more

_PROBE_SECONDS = 10.0
_REFUSED = {
    401: "see OPENAI_API_KEY",
    403: "see OPENAI_API_KEY",
    404: "check the URL and --model",
}  # for all requests alike
_UNKNOWN_MODEL = "model_not_found"  # OpenAI's code for it, whatever the status
_DAMAGED = 502  # what a gateway says of an answer that it cannot read


@dataclass
class _Server:
    """One address, and how it fares.

    Attributes:
        listed: the models that it says it has; None where it lists none.
    """

    url: str
    client: AsyncOpenAI
    listed: list[str] | None = None
    has_answered: bool = False
    running: int = 0
    failures: int = 0  # in a row

    @property
    def is_aside(self) -> bool:
        return self.failures >= SET_ASIDE


def open_servers(
    urls: Sequence[str], *, model: str | None = None, timeout: float = 600.0, retries: int = 5
) -> OpenAIServers:
    """Servers of one model, each of which has just answered. The key is the environment's OPENAI_API_KEY, if it has one.

    Args:
        urls: "http://host:port", with or without "/v1".
        model: the name that they serve it under; None where each serves this one alone.
        timeout: seconds to wait for a byte of an answer.
        retries: of a request that fails for a reason that may pass, with growing pauses.

    Raises:
        ConfigError: an argument that cannot be right, or no name where several models are served.
        ModelUnavailableError: a server is not there or refuses.
        MissingPackageError: no openai.
    """
    try:
        import openai
    except ImportError as error:
        raise missing_package("openai", "data") from error
    if not 0 < timeout < float("inf"):
        raise ConfigError("--timeout", f"{timeout}", "seconds, more than 0", "change it")
    if retries < 0:
        raise ConfigError("--retries", f"{retries}", "0 or more", "change it")
    key = os.environ.get("OPENAI_API_KEY") or "none"  # servers without keys take any
    addresses = list(dict.fromkeys(_address(url) for url in urls))
    served = {url: _served(url, key, min(timeout, _PROBE_SECONDS)) for url in addresses}
    servers = []
    for url in addresses:
        http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [_mark_damaged]})
        client = openai.AsyncOpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries, http_client=http)
        servers.append(_Server(url, client, served[url]))
    return OpenAIServers(servers, model or _only_model(served))


class OpenAIServers:
    """A :class:`~medusa_export.heads.data.chat_model.ChatModel`: each request goes to the server with the fewest of them.

    Args:
        name: of the model, as the servers know it.
    """

    def __init__(self, servers: Sequence[_Server], name: str) -> None:
        self.name = name
        self._servers = servers

    async def answer(self, messages: Sequence[Mapping[str, str]], sampling: Sampling) -> ChatAnswer:
        """The model's next turn; what one server fails at, another one gets.

        Raises:
            ModelUnavailableError: a server refuses all requests, or all servers keep failing.
            AnswerError: the servers refuse or fail at this one.
        """
        tried: list[_Server] = []
        reason = "no server left"
        while servers := [server for server in self._servers if server not in tried and not server.is_aside]:
            server = min(servers, key=lambda item: item.running)
            tried.append(server)
            try:
                return await self._ask(server, messages, sampling)
            except _FailedError as error:
                reason = str(error)
        if all(server.is_aside for server in self._servers):
            urls = ", ".join(server.url for server in self._servers)
            action = "see that it runs, then run the same command again"
            raise ModelUnavailableError(urls, f"{SET_ASIDE} failures in a row ({reason})", "answers", action)
        raise AnswerError(", ".join(server.url for server in tried), reason, "an answer", "look at the server's log")

    async def close(self) -> None:
        """Close the connections."""
        for server in self._servers:
            await server.client.close()

    async def _ask(self, server: _Server, messages: Sequence[Mapping[str, str]], sampling: Sampling) -> ChatAnswer:
        import openai

        request: dict[str, Any] = {"model": self.name, "messages": list(messages), **sampling.recorded()}
        if sampling.seed is None:
            del request["seed"]
        server.running += 1
        try:
            response = await server.client.chat.completions.with_raw_response.create(**request)
        except openai.APIError as error:
            raise self._failure(server, error) from error
        finally:
            server.running -= 1
        server.failures, server.has_answered = 0, True
        return _answer(response.http_response.json())

    def _failure(self, server: _Server, error: APIError) -> Exception:
        """What a request's error means: for all requests, for this one, or for the server."""
        status = getattr(error, "status_code", None)
        if status in _REFUSED:
            return ModelUnavailableError(server.url, _reason(error), "an answer", _REFUSED[status])
        if status is not None and self._is_unknown(server, error):
            listed = f"it lists {', '.join(server.listed)}" if server.listed else "it lists none"
            return ModelUnavailableError(
                server.url, _reason(error), f"a server of {self.name}", f"{listed}: correct --model"
            )
        if status is not None and status < 500 and status not in (408, 409, 429):  # what openai does not retry
            return AnswerError(server.url, _reason(error), "an answer", "change this conversation")
        server.failures += 1
        if server.failures == SET_ASIDE and len(self._servers) > 1:
            logger.warning("%s: set aside after %d failures in a row: %s", server.url, SET_ASIDE, _reason(error))
        return _FailedError(_reason(error))

    def _is_unknown(self, server: _Server, error: APIError) -> bool:
        """Whether it refuses because of the model's name. Some serve more than they list, so a name is never refused unasked."""
        unlisted = server.listed is not None and self.name not in server.listed
        return error.code == _UNKNOWN_MODEL or (unlisted and not server.has_answered)


class _FailedError(Exception):
    """A server could not answer a request that another one may."""


async def _mark_damaged(response: Any) -> None:
    """Give a successful response that holds no whole answer a status that makes the client try again."""
    if response.is_success:
        try:
            _answer(json.loads(await response.aread()))
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            response.status_code = _DAMAGED
            response.extensions["damage"] = f"no whole answer: {error!r}"


def _answer(body: Any) -> ChatAnswer:
    """The answer in the body of a chat completion.

    Raises:
        LookupError, TypeError: something is missing, or of another type.
    """
    choice, tokens = body["choices"][0], body["usage"]["completion_tokens"]
    text, reason = choice["message"]["content"] or "", choice["finish_reason"]  # null: nothing but a call of a tool
    if not isinstance(text, str) or not isinstance(reason, str) or type(tokens) is not int:
        raise TypeError(f"content {text!r:.40}, finish_reason {reason!r:.40}, completion_tokens {tokens!r:.40}")
    return ChatAnswer(text, reason, tokens)


def _reason(error: APIError) -> str:
    """An API error and what caused it, in a few words."""
    response = getattr(error, "response", None)
    if response is not None:
        return str(response.extensions.get("damage", error.message))[:300]
    cause = error.__cause__ or error
    return f"{error.message} ({type(cause).__name__}: {cause})"[:300]


def _address(url: str) -> str:
    """The URL that the protocol's paths are below."""
    try:
        parts = urlsplit(url.rstrip("/"))
        is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_web = False
    if not is_web:
        raise ConfigError("--server", f"{url}", "a URL such as http://localhost:8000", "correct it")
    return parts.geturl() if parts.path else f"{parts.geturl()}/v1"


def _served(url: str, key: str, seconds: float) -> list[str] | None:
    """Names of the models of a server; None where it answers but lists none.

    Raises:
        ModelUnavailableError: no answer, or a key that it does not take.
    """
    import openai

    try:
        with openai.OpenAI(base_url=url, api_key=key, timeout=seconds, max_retries=0) as client:
            body = client.models.with_raw_response.list().http_response.json()
        return [str(model["id"]) for model in body["data"]]
    except openai.APIStatusError as error:
        if error.status_code in (401, 403):
            raise ModelUnavailableError(url, _reason(error), "an answer", _REFUSED[error.status_code]) from error
    except openai.APIConnectionError as error:
        raise ModelUnavailableError(url, _reason(error), "a server", "start it, or correct --server") from error
    except (ValueError, LookupError, TypeError):
        logger.info("%s: no list of models", url)
    return None


def _only_model(served: Mapping[str, list[str] | None]) -> str:
    """The one name that all servers list.

    Raises:
        ConfigError: there are more, or none.
    """
    names = sorted({name for listed in served.values() for name in listed or ()})
    if len(names) != 1 or any(not listed for listed in served.values()):
        got = f"nothing, while {', '.join(served)} list {', '.join(names) or 'no models'}"
        raise ConfigError("--model", got, "the name of one model, served by all of them", "pass --model")
    return names[0]
