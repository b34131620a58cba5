"""An async client for any OpenAI-compatible endpoint, with its own retries, budget and reply cache.

`HttpChat` is called as the in-process engine is: `await chat(messages, max_tokens=, temperature=)`
returns a list of Completion, so that scaffolds and the judge cannot tell the two apart.

A request is identified by what goes over the wire and by its sample number (`seed`, and the index
in 0..n-1). With a cache, the same request returns the same reply for ever and is paid for once:
who wants a fresh sample of the same prompt asks with another seed or a larger n.
"""

import asyncio
import collections
import dataclasses
import datetime
import email.utils
import hashlib
import json
import math
import os
import re
import time
import urllib.parse
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import openai

from qed_jax import replies
from qed_jax.records import Completion, Usage

_RETRIED = frozenset({408, 409, 425, 429})  # other 4xx say that the same request fails again
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds, between attempts
_SECRET_LENGTH = 8  # shorter keys are dummies like "EMPTY", too common a word to blot out


class ChatError(RuntimeError):
  """A call that brought no completion. One line: model, host, cause. Never holds a key."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Where to ask, and what the server there understands.

  base_url: with the version, as in "http://localhost:8000/v1".
  api: "chat" (POST /chat/completions) or "responses" (POST /responses).
  key_env: name of the environment variable that holds the key; "" sends none.
  max_tokens_field: its name in the chat API; newer OpenAI models want "max_completion_tokens".
  omit: sampling fields the server rejects ("temperature", "top_p", "seed", ...): not sent.
  understands_thinking: `thinking` is sent as chat_template_kwargs.enable_thinking.
  hides_thinking: the content never holds reasoning, so that a reply without any is all answer;
    otherwise a reply without "</think>" is a thought that did not end.
  extra_body: more fields for every request, such as {"reasoning_effort": "medium"}.
  """

  base_url: str
  model: str
  api: str = "chat"
  key_env: str = ""
  max_tokens_field: str = "max_tokens"
  omit: tuple[str, ...] = ()
  understands_thinking: bool = False
  hides_thinking: bool = False
  extra_body: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class HttpChat:
  """Calls one endpoint. Counts what happened in `stats`; close it with `await chat.close()`.

  concurrency: requests in flight at once.
  timeout: seconds for one request. deadline: seconds for a call with its retries and waits,
    counted from its first turn in the queue. attempts: requests per call at most.
  token_budget: tokens read and written by this object before it refuses to send; 0 is no limit.
    What is in flight when the budget is reached still arrives.
  cache: path of a local JSONL file that replies are appended to; "" keeps none.
  sleep, clock: for tests, in seconds; sleep must move the clock on.

  Raises ValueError in one line for a configuration that cannot work, such as a missing key.
  """

  def __init__(
    self,
    endpoint: Endpoint,
    *,
    concurrency: int,
    timeout: float,
    deadline: float,
    attempts: int,
    token_budget: int = 0,
    cache: str = "",
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
  ):
    for name, value in [("concurrency", concurrency), ("attempts", attempts)]:
      if value < 1:
        raise ValueError(f"{name}={value}: at least 1 is needed")
    for name, value in [("timeout", timeout), ("deadline", deadline)]:
      if not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: give a positive number of seconds")
    if endpoint.api not in ("chat", "responses"):
      raise ValueError(f"api={endpoint.api!r}: use 'chat' or 'responses'")
    self.stats: collections.Counter[str] = collections.Counter()
    self._where = f"{endpoint.model} at {_host(endpoint.base_url)}"
    self._endpoint = endpoint
    self._key = _read_key(endpoint.key_env)
    self._concurrency = concurrency
    self._timeout = timeout
    self._deadline = deadline
    self._attempts = attempts
    self._budget = token_budget
    self._cache = replies.ReplyCache(cache) if cache else None
    self._sleep = sleep
    self._clock = clock
    self._not_before = -math.inf  # the endpoint's last Retry-After
    self._loop: asyncio.AbstractEventLoop | None = None

  async def __call__(
    self,
    messages: Sequence[Mapping[str, str]],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    n: int = 1,
    seed: int | None = None,
    thinking: bool = True,
  ) -> list[Completion]:
    """n completions of one conversation, each paid, cached and retried on its own.

    With thinking=True the text is "reasoning</think>answer", whether the server sends the reasoning
    in a field of its own or in the content; with thinking=False it is the content alone. `usage`
    says how many requests were made (calls; 0: cached) and how long the one that came through took.
    Raises ChatError when one of the n cannot be had; the others are waited for even then, so that
    the cache keeps what was paid.
    """
    self._enter_loop()
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    if top_k:
      sampling["top_k"] = top_k
    calls = []
    for sample in range(n):
      seeded = sampling if seed is None else sampling | {"seed": _wire_seed(seed, sample)}
      body = self._body(messages, max_tokens, seeded, thinking)
      calls.append(self._complete(body, thinking, [seed, sample, thinking]))
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
      if isinstance(result, BaseException):
        raise result
    return results

  async def close(self) -> None:
    """Closes the connections and the cache file."""
    if self._loop is asyncio.get_running_loop():
      await self._client.close()
    self._loop = None
    if self._cache:
      self._cache.close()

  def _enter_loop(self) -> None:
    # Connections and semaphores belong to an event loop, and a run may start more than one.
    loop = asyncio.get_running_loop()
    if loop is self._loop:
      return
    self._loop = loop
    self._slots = asyncio.Semaphore(self._concurrency)
    self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
    self._client = openai.AsyncOpenAI(
      api_key=self._key or "none",  # without one the package would send OPENAI_API_KEY
      base_url=self._endpoint.base_url,
      max_retries=0,
      timeout=self._timeout,
    )
    for name in ("organization", "project", "admin_api_key"):
      setattr(self._client, name, None)  # it reads them from the environment, for any server

  def _body(
    self,
    messages: Sequence[Mapping[str, str]],
    max_tokens: int,
    sampling: Mapping[str, Any],
    thinking: bool,
  ) -> dict[str, Any]:
    endpoint = self._endpoint
    turns = [dict(message) for message in messages]
    omit = endpoint.omit
    if endpoint.api == "chat":
      body = {"messages": turns, endpoint.max_tokens_field: max_tokens}
    else:
      body = {"input": turns, "max_output_tokens": max_tokens}
      omit = (*omit, "seed")  # the Responses API has none
    body |= {name: value for name, value in sampling.items() if name not in omit}
    if endpoint.understands_thinking:
      body["chat_template_kwargs"] = {"enable_thinking": thinking}
    return {"model": endpoint.model} | body | dict(endpoint.extra_body)

  async def _complete(self, body: dict[str, Any], thinking: bool, sample: list) -> Completion:
    if self._cache is None:
      reply, usage = await self._ask(body)
    else:
      key = _digest([self._endpoint.api, body, sample])
      lock = self._locks.setdefault(key, asyncio.Lock())
      async with lock:  # two who ask the same pay once
        reply = await asyncio.to_thread(self._cache.get, key)
        if reply is not None:
          self.stats["cache_hits"] += 1
          usage = Usage(reply.input_tokens, reply.output_tokens)
        else:
          reply, usage = await self._ask(body, key)
    text = replies.fold(reply, self._endpoint.hides_thinking) if thinking else reply.content
    return Completion(text=text, finish_reason=reply.finish_reason, usage=usage)

  async def _ask(self, body: dict[str, Any], key: str | None = None) -> tuple[replies.Reply, Usage]:
    """The retry policy. A Retry-After binds every call of this object, a back-off only its own.

    key: what the reply is kept under, before its slot goes to another request: a kill then loses
    no more replies than there are slots.
    """
    start = None
    fault = _Fault("no answer")
    for attempt in range(1, self._attempts + 1):
      async with self._slots:  # not held during a back-off, so that the healthy go on
        start = self._clock() if start is None else start
        end = start + self._deadline
        while (held := self._not_before - self._clock()) > 0:
          if self._not_before >= end:
            raise self._error(f"it asks to wait {held:.0f} s more, past the deadline", fault)
          await self._sleep(held)
        if 0 < self._budget <= self.stats["tokens"]:
          raise self._error(f"the token budget of {self._budget} is spent: raise token_budget")
        sent = self._clock()
        if sent >= end:
          raise self._error(f"gave up at the deadline of {self._deadline:g} s", fault)
        limit = min(self._timeout, end - sent)
        try:
          async with asyncio.timeout(limit):
            reply = await self._post(body)
        except (openai.APIError, TimeoutError, UnicodeEncodeError, replies.Malformed) as error:
          fault = _diagnose(error, self._endpoint, limit)
        else:
          self.stats["tokens"] += reply.input_tokens + reply.output_tokens
          seconds = self._clock() - sent
          if key is not None:
            await asyncio.to_thread(self._cache.add, key, reply)
          return reply, Usage(reply.input_tokens, reply.output_tokens, seconds, attempt)
      if fault.final:
        raise self._error("the request cannot succeed", fault)
      wait = fault.retry_after or _backoff(attempt, jitter=_digest([body, attempt]))
      if fault.retry_after:
        self._not_before = max(self._not_before, self._clock() + wait)
      if attempt == self._attempts:
        raise self._error(f"gave up after {attempt} requests", fault)
      if self._clock() + wait >= end:
        raise self._error(f"gave up at the deadline of {self._deadline:g} s", fault)
      self.stats["retries"] += 1
      await self._sleep(wait)
    raise AssertionError("the loop returns or raises")

  async def _post(self, body: dict[str, Any]) -> replies.Reply:
    self.stats["requests"] += 1
    rest = {name: value for name, value in body.items() if name not in ("messages", "input")}
    if self._endpoint.api == "chat":
      create = self._client.chat.completions.with_raw_response.create
      raw = await create(model=body["model"], messages=body["messages"], extra_body=rest)
    else:
      create = self._client.responses.with_raw_response.create
      raw = await create(model=body["model"], input=body["input"], extra_body=rest)
    asked = sum(len(turn["content"]) for turn in body.get("messages", body.get("input")))
    # The package's own models accept any JSON, so the body is read here.
    reply = replies.read(raw.http_response.content, self._endpoint.api, asked)
    return dataclasses.replace(
      reply, reasoning=self._blot(reply.reasoning), content=self._blot(reply.content)
    )

  def _blot(self, text: str) -> str:
    return text.replace(self._key, "[key]") if len(self._key) >= _SECRET_LENGTH else text

  def _error(self, what: str, fault: "_Fault | None" = None) -> ChatError:
    self.stats["failed"] += 1
    cause = " ".join(self._blot(fault.cause).split())[:300] if fault else ""
    return ChatError(f"{self._where}: {what}{f': {cause}' if cause else ''}")


@dataclasses.dataclass(frozen=True)
class _Fault:
  cause: str
  final: bool = False
  retry_after: float | None = None


def _host(base_url: str) -> str:
  url = urllib.parse.urlsplit(base_url)
  if url.scheme not in ("http", "https") or not url.hostname:
    raise ValueError("base_url is no http(s) address: write it as http://host:port/v1")
  if url.username or url.password or url.query:
    raise ValueError(f"base_url of {url.hostname} holds credentials or a query: use key_env")
  return url.netloc


def _read_key(name: str) -> str:
  if not name:
    return ""
  if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,99}", name):  # it may be the key itself: do not show it
    raise ValueError("key_env must be the NAME of an environment variable, such as OPENAI_API_KEY")
  key = os.environ.get(name, "").strip()
  if not key:
    raise ValueError(f"the environment variable {name} is not set: export it with the API key")
  if not (key.isascii() and key.isprintable()):
    raise ValueError(f"the environment variable {name} holds no key: it is not one line of ASCII")
  return key


def _wire_seed(seed: int, sample: int) -> int:
  return seed if sample == 0 else int(_digest([seed, sample])[:8], 16) >> 1


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _backoff(attempt: int, jitter: str) -> float:
  spread = int(jitter[:8], 16) / 2**32  # taken from the request, so that a test can repeat it
  return min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT) * (0.5 + 0.5 * spread)


def _diagnose(error: Exception, endpoint: Endpoint, limit: float) -> _Fault:
  """What went wrong, whether the same request can succeed later, and when the server says so."""
  match error:
    case openai.APITimeoutError() | TimeoutError():
      return _Fault(f"no answer in {limit:.3g} s")
    case openai.APIStatusError(status_code=status):
      hint = ""
      if status in (401, 403):
        hint = f" (check the key in {endpoint.key_env})" if endpoint.key_env else " (set key_env)"
      elif status == 404:
        hint = " (check base_url and the name of the model)"
      spent = error.code in ("insufficient_quota", "billing_hard_limit_reached")
      final = spent or (status < 500 and status not in _RETRIED)
      said = error.body.get("message") if isinstance(error.body, dict) else error.message
      return _Fault(f"HTTP {status}{hint}: {said}", final, _retry_after(error.response.headers))
    case openai.APIConnectionError():
      return _Fault(f"no connection: {error.__cause__ or error}")
    case UnicodeEncodeError():
      return _Fault("the messages hold a lone surrogate, which UTF-8 cannot carry", final=True)
  return _Fault(f"malformed reply: {error}")


def _retry_after(headers: Mapping[str, str]) -> float | None:
  """Seconds from a Retry-After header (seconds or a date), or None."""
  for name, scale in [("retry-after-ms", 0.001), ("retry-after", 1.0)]:
    value = headers.get(name, "")
    try:
      seconds = float(value) * scale
    except ValueError:
      try:
        when = email.utils.parsedate_to_datetime(value)
        seconds = (when - datetime.datetime.now(datetime.UTC)).total_seconds()
      except (ValueError, TypeError):  # TypeError: a date without a zone
        continue
    if 0 <= seconds < math.inf:
      return seconds
  return None
