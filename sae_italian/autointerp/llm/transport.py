"""One attempt at one call: through huggingface_hub to an OpenAI-compatible server, and what its failure means."""

from __future__ import annotations

import asyncio
import email.utils
import time
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError

from sae_italian.autointerp.llm.ledger import Reply, Request, TokenLogprobs

NO_KEY = "none"  # sent where there is no key: without any, huggingface_hub would send the Hub's token to the server
TOP_LOGPROBS = 20
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}


@dataclass(frozen=True)
class Answer:
    """A reply with what the server says it used."""

    reply: Reply
    tokens_in: int | None
    tokens_cached: int | None
    tokens_out: int | None


@dataclass
class Failure(Exception):  # noqa: N818
    """Why an attempt brought no answer.

    `again`: worth another attempt, after `wait` seconds where the server says so. `feature`: the server does not take
    it. `too long`: the prompt does not fit. `refused`: this one request will never be answered. `stop`: none will.
    """

    kind: Literal["again", "feature", "too long", "refused", "stop"]
    why: str
    wait: float | None = None
    feature: str = ""
    may_be_billed: bool = False
    unreachable: bool = False


class _AsGiven(dict):
    """A response format that reaches the server as it is.

    For a URL, AsyncInferenceClient (1.x and 2.x) rewrites `json_schema` into the older dialect of
    text-generation-inference, which OpenAI-compatible servers ignore or refuse.
    """

    def get(self, key: Any, default: Any = None) -> Any:
        return default if key == "type" else super().get(key, default)


class _Client(AsyncInferenceClient):
    """Without the Hub's hooks: HF_HUB_OFFLINE would keep it from a server on this very machine."""

    async def _get_async_client(self) -> Any:
        session = await super()._get_async_client()
        session.event_hooks = {}
        return session


def open_client(url: str, key: str | None, timeout: float) -> AsyncInferenceClient:
    return _Client(base_url=url, api_key=key or NO_KEY, timeout=timeout)


async def attempt(
    client: AsyncInferenceClient,
    model: str,
    request: Request,
    settings: dict[str, Any],
    features: set[str],
    timeout: float,
) -> Answer:
    """Send a request once. `features` are those of `schema` and `logprobs` that the server is believed to take.

    Raises: Failure.
    """
    wanted: dict[str, Any] = {"max_tokens": request.max_tokens, **settings}
    if request.schema is not None and "schema" in features:
        json_schema = {"name": "answer", "schema": request.schema, "strict": True}
        wanted["response_format"] = _AsGiven(type="json_schema", json_schema=json_schema)
    if request.logprobs and "logprobs" in features:
        wanted |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    try:
        sent = client.chat_completion(list(request.messages), model=model, **wanted)
        return _answer(await asyncio.wait_for(sent, timeout))
    except HfHubHTTPError as error:
        raise _status_failure(error, {name for name in features if name in _asked(wanted)}) from error
    except (TimeoutError, InferenceTimeoutError) as error:
        raise Failure("again", f"no answer within {timeout:g} s", may_be_billed=True) from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise Failure(
            "again", f"the answer is no chat completion ({type(error).__name__})", may_be_billed=True
        ) from error
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # httpx in huggingface_hub 1, httpx2 in 2
            raise
        unreachable = type(error).__name__ in ("ConnectError", "ConnectTimeout", "UnsupportedProtocol", "InvalidURL")
        why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise Failure("again", why, may_be_billed=not unreachable, unreachable=unreachable) from error


def _asked(wanted: dict[str, Any]) -> set[str]:
    return {"schema" if name == "response_format" else name for name in wanted}


def _answer(output: Any) -> Answer:
    choice = output.choices[0]
    message = choice.message
    refusal = getattr(message, "refusal", None) or (
        "content filter" if choice.finish_reason == "content_filter" else ""
    )
    if message.content is None and not refusal:
        raise ValueError("no content")
    tokens = None
    if choice.logprobs is not None and choice.logprobs.content:
        tokens = tuple(
            TokenLogprobs(one.token, one.logprob, {top.token: top.logprob for top in one.top_logprobs or ()})
            for one in choice.logprobs.content
        )
    reply = Reply("ok", message.content or "", choice.finish_reason or "", refusal, tokens)
    usage = output.usage
    details = getattr(usage, "prompt_tokens_details", None) or {}
    cached = details.get("cached_tokens") if isinstance(details, dict) else getattr(details, "cached_tokens", None)
    return Answer(reply, getattr(usage, "prompt_tokens", None), cached, getattr(usage, "completion_tokens", None))


def _status_failure(error: HfHubHTTPError, asked: set[str]) -> Failure:
    response = error.response
    status = response.status_code
    try:
        said = " ".join(response.text.split())[:300]
    except Exception:  # a body that broke off, or was never read
        said = ""
    why = f"HTTP {status}{': ' + said if said else ''}"
    if status in TRY_AGAIN or status >= 500 and status != 501:
        return Failure("again", why, wait=_retry_after(response.headers.get("Retry-After")))
    if status in (401, 403):
        return Failure("stop", f"the endpoint refuses the key ({why})")
    if status == 402:
        return Failure("stop", f"the endpoint wants to be paid ({why})")
    if status == 404:
        return Failure("stop", f"the endpoint has no such model or path ({why})")
    lower = said.lower()
    if status == 413 or "context" in lower and ("length" in lower or "window" in lower or "token" in lower):
        return Failure("too long", why)
    named = [f for f, words in _FEATURE_WORDS.items() if f in asked and any(word in lower for word in words)]
    for feature in [*named, *sorted(asked, reverse=True)]:
        return Failure("feature", why, feature=feature)
    return Failure("refused", why)


_FEATURE_WORDS = {"schema": ("response_format", "json_schema", "grammar", "guided"), "logprobs": ("logprob",)}


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which may be a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
