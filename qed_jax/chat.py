"""An async client for any OpenAI-compatible endpoint, with its own retries, budget and reply cache.

`HttpChat` is called as the in-process engine is: `await chat(messages, max_tokens=, temperature=)`
returns a list of Completion, so that scaffolds and the judge cannot tell the two apart.

A request is identified by what goes over the wire and by its sample number (`seed`, and the index
in 0..n-1). With a cache, the same request returns the same reply for ever and is paid for once:
who wants a fresh sample of the same prompt asks with another seed or a larger n.
"""

import asyncio
import collections
import contextlib
import dataclasses
import datetime
import email.utils
import hashlib
import json
import math
import os
import re
import ssl
import time
import urllib.parse
import urllib.request
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import aiohttp
import certifi

from qed_jax import replies
from qed_jax.breaker import Breaker
from qed_jax.records import Completion, Usage

_RETRIED = frozenset({408, 409, 425, 429})  # other 4xx say that the same request fails again
# These say that every request fails: address, key, model, redirects to somewhere else.
_REFUSED = frozenset({301, 302, 303, 307, 308, 401, 403, 404, 405})
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds, between attempts
_PROBE_S, _PROBE_TOKENS = 60.0, 16  # of the request that asks whether an endpoint is alive
_SECRET_LENGTH = 8  # shorter keys are dummies like "EMPTY", too common a word to blot out


class ChatError(RuntimeError):
  """A call that brought no completion. One line: model, host, cause. Never holds a key."""


class Unavailable(ChatError, ValueError):
  """No call can succeed before somebody mends the endpoint, or the budget. One line that says what
  to do. It should stop a run, as other ValueErrors do, and the run can be resumed."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Where to ask, and what the server there understands.

  base_url: with the version, as in "http://localhost:8000/v1".
  api: "chat" (POST /chat/completions) or "responses" (POST /responses).
  key_env: name of the environment variable that holds the key; "" sends none.
  key_required: whether that variable must be set; a server of one's own may need no key.
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
  key_required: bool = True
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
  token_budget: tokens read and written before it refuses to send; 0 is no limit. Replies that the
    cache held when it was opened count: a resumed run has one budget. What is in flight when the
    budget is reached still arrives.
  prices: dollars for a million tokens read and written. money_budget: dollars; 0 is no limit.
  patience: seconds of an outage of the endpoint during which calls wait, as if time stood still
    (breaker.py); 0 lets them fail. outage_after: failures in a row that make it ask whether there
    is one; a call that would give up asks too.
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
    prices: tuple[float, float] = (0.0, 0.0),
    money_budget: float = 0.0,
    patience: float = 0.0,
    outage_after: int = 1,
    cache: str = "",
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
  ):
    counts = {"concurrency": concurrency, "attempts": attempts, "outage_after": outage_after}
    for name, value in counts.items():
      if value < 1:
        raise ValueError(f"{name}={value}: at least 1 is needed")
    for name, value in [("timeout", timeout), ("deadline", deadline)]:
      if not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: give a positive number of seconds")
    if endpoint.api not in ("chat", "responses"):
      raise ValueError(f"api={endpoint.api!r}: use 'chat' or 'responses'")
    if money_budget and not any(prices):
      raise ValueError(f"money_budget={money_budget:g}: give the prices of a million tokens too")
    self.stats: collections.Counter[str] = collections.Counter()
    self._where = f"{endpoint.model} at {_host(endpoint.base_url)}"
    self._endpoint = endpoint
    route = "/chat/completions" if endpoint.api == "chat" else "/responses"
    self._url = endpoint.base_url.rstrip("/") + route
    self._key = _read_key(endpoint.key_env, endpoint.key_required)
    self._concurrency = concurrency
    self._timeout = timeout
    self._deadline = deadline
    self._attempts = attempts
    self._token_budget, self._money_budget = token_budget, money_budget
    self._prices = prices
    self._cache = replies.ReplyCache(cache) if cache else None
    self._sleep = sleep
    self._clock = clock
    self._not_before = -math.inf  # the endpoint's last Retry-After
    self._loop: asyncio.AbstractEventLoop | None = None
    self._session: aiohttp.ClientSession | None = None
    self.breaker = Breaker(
      self._probe,
      self._outlasted,
      after=outage_after,
      patience=patience,
      longest_wait=_LONGEST_WAIT,
      held=lambda: self._not_before - clock(),
      sleep=sleep,
      clock=clock,
    )

  @property
  def cost(self) -> float:
    """Dollars that this object has spent."""
    return self._dollars(self.stats["input_tokens"], self.stats["output_tokens"])

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
    await self._enter_loop()
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

  async def check(self) -> None:
    """One small request. Raises Unavailable, in one line, where none can succeed as things are."""
    await self._enter_loop()
    fault, _ = await self._small_request()
    for attempt in range(1, self._attempts):
      if fault is None or fault.final:
        break
      await self._sleep(fault.retry_after or _backoff(attempt, jitter=_digest(attempt)))
      fault, _ = await self._small_request()
    if fault is not None:
      hint = "" if fault.refused else " (check base_url, and whether the server is up)"
      raise self._unavailable(f"it does not answer{hint}", fault)

  async def close(self) -> None:
    """Closes the connections and the cache file."""
    if self._loop is asyncio.get_running_loop():
      await self.breaker.close()
      await self._session.close()
    self._loop = None
    if self._cache:
      self._cache.close()

  async def _enter_loop(self) -> None:
    # Connections and semaphores belong to an event loop, and a run may start more than one.
    loop = asyncio.get_running_loop()
    if loop is self._loop:
      return
    self._loop, left = loop, self._session
    self._slots = asyncio.Semaphore(self._concurrency)
    self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
    url = urllib.parse.urlsplit(self._url)
    bypass = urllib.request.proxy_bypass(url.hostname)
    headers = {"Content-Type": "application/json", "User-Agent": "qed_jax"}
    if self._key:
      headers["Authorization"] = f"Bearer {self._key}"
    # trust_env would send the passwords of ~/.netrc in place of the key.
    self._session = aiohttp.ClientSession(
      connector=aiohttp.TCPConnector(limit=0, ssl=_tls() if url.scheme == "https" else True),
      timeout=aiohttp.ClientTimeout(total=None),
      headers=headers,
      proxy=None if bypass else urllib.request.getproxies().get(url.scheme),
      trust_env=False,
    )
    weakref.finalize(self, _let_go, self._session)
    if left is not None:  # of a loop that has ended, and its connections with it
      await left.close()

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
        reply = await self._cache.find(key)
        if reply is not None:
          self.stats["cache_hits"] += 1
          usage = Usage(reply.input_tokens, reply.output_tokens)
        else:
          reply, usage = await self._ask(body, key)
    text = replies.fold(reply, self._endpoint.hides_thinking) if thinking else reply.content
    return Completion(text=text, finish_reason=reply.finish_reason, usage=usage)

  async def _ask(self, body: dict[str, Any], key: str | None = None) -> tuple[replies.Reply, Usage]:
    """The retry policy. A Retry-After binds every call of this object, a back-off only its own; and
    what a call went through in an outage does not count.

    key: what the reply is kept under, before its slot goes to another request: a kill then loses
    no more replies than there are slots.
    """
    requests, attempt, start = 0, 0, None
    fault = _Fault("no answer")
    while True:
      if await self.breaker.passes():
        attempt, start = 0, None
      wait, gave_up = 0.0, ""
      async with self._slots:  # not held during a back-off, so that the healthy go on
        start = self._clock() if start is None else start
        end = start + self._deadline
        while (held := self._not_before - self._clock()) > 0 and self._not_before < end:
          await self._sleep(held)
        self._check_budget()
        sent = self._clock()
        if held > 0:
          gave_up = f"it asks to wait {held:.0f} s more, past the deadline"
        elif sent >= end:
          gave_up = f"gave up at the deadline of {self._deadline:g} s"
        else:
          attempt, requests = attempt + 1, requests + 1
          fault, reply = await self._post(body, min(self._timeout, end - sent))
          if fault is None:
            self.breaker.succeeded()
            seconds = self._clock() - sent
            if key is not None:
              await self._cache.keep(key, reply)
            return reply, Usage(reply.input_tokens, reply.output_tokens, seconds, requests)
      if fault.final and not fault.refused:
        self.breaker.succeeded()  # it answers, if not to this request
        raise self._error("the request cannot succeed", fault)
      if not gave_up:
        wait = fault.retry_after or _backoff(attempt, jitter=_digest([body, attempt]))
        if fault.retry_after:
          self._not_before = max(self._not_before, self._clock() + wait)
        if fault.refused:
          gave_up = "the request cannot succeed"
        elif attempt == self._attempts:
          gave_up = f"gave up after {attempt} requests"
        elif self._clock() + wait >= end:
          gave_up = f"gave up at the deadline of {self._deadline:g} s"
      if await self.breaker.failed(last=bool(gave_up)):
        attempt, start = 0, None
        continue
      if gave_up:
        raise self._error(gave_up, fault)
      self.stats["retries"] += 1
      await self._sleep(wait)

  async def _post(
    self, body: dict[str, Any], limit: float
  ) -> "tuple[_Fault, None] | tuple[None, replies.Reply]":
    """One request of at most `limit` seconds."""
    self.stats["requests"] += 1
    asked = sum(len(turn["content"]) for turn in body.get("messages") or body["input"])
    try:
      async with asyncio.timeout(limit):
        status, headers, content = await self._exchange(body)
      if status != 200:
        return _of_status(status, headers, content, self._endpoint), None
      reply = replies.read(content, self._endpoint.api, asked)
    except TimeoutError:
      return _Fault(f"no answer in {limit:.3g} s"), None
    except aiohttp.ClientError as error:
      return _Fault(f"no connection: {str(error) or type(error).__name__}"), None
    except replies.Malformed as error:
      return _Fault(f"malformed reply: {error}"), None
    except UnicodeEncodeError:
      return _Fault("the messages hold a lone surrogate, which UTF-8 cannot carry", True), None
    self.stats["input_tokens"] += reply.input_tokens
    self.stats["output_tokens"] += reply.output_tokens
    self.stats["tokens"] += reply.input_tokens + reply.output_tokens
    blotted = {"reasoning": self._blot(reply.reasoning), "content": self._blot(reply.content)}
    return None, dataclasses.replace(reply, **blotted)

  async def _exchange(self, body: dict[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and content of the answer to one request."""
    data = json.dumps(body, ensure_ascii=False).encode()
    async with self._session.post(self._url, data=data, allow_redirects=False) as response:
      return response.status, response.headers, await response.read()

  async def _small_request(self):
    turn = {"role": "user", "content": "Are you there? Answer with one word."}
    body = self._body([turn], _PROBE_TOKENS, {"temperature": 1.0}, False)
    return await self._post(body, min(self._timeout, _PROBE_S))

  async def _probe(self) -> str | None:
    """What the breaker asks: whether the endpoint answers at all."""
    fault, _ = await self._small_request()
    if fault is None or (fault.final and not fault.refused):
      return None
    if fault.refused:
      raise self._unavailable("it refuses every request", fault)
    if fault.retry_after:
      self._not_before = max(self._not_before, self._clock() + fault.retry_after)
    return fault.cause

  def _outlasted(self, seconds: float, cause: str) -> Exception:
    what = f"no answer for {seconds:.0f} s, and patience_s ends"
    return self._unavailable(what, _Fault(cause))

  def _check_budget(self) -> None:
    """Raises Unavailable when a budget is spent."""
    before = self._cache.spent_before if self._cache else (0, 0)
    read, written = before[0] + self.stats["input_tokens"], before[1] + self.stats["output_tokens"]
    if 0 < self._token_budget <= read + written:
      raise self._unavailable(
        f"the token budget of {self._token_budget} is spent: raise token_budget"
      )
    if 0 < self._money_budget <= (dollars := self._dollars(read, written)):
      raise self._unavailable(
        f"{dollars:.2f} dollars of the budget of {self._money_budget:g} are spent: raise "
        "money_budget"
      )

  def _dollars(self, read: int, written: int) -> float:
    return (read * self._prices[0] + written * self._prices[1]) / 1e6

  def _blot(self, text: str) -> str:
    return text.replace(self._key, "[key]") if len(self._key) >= _SECRET_LENGTH else text

  def _error(self, what: str, fault: "_Fault | None" = None) -> ChatError:
    self.stats["failed"] += 1
    return ChatError(self._line(what, fault))

  def _unavailable(self, what: str, fault: "_Fault | None" = None) -> Unavailable:
    return Unavailable(f"{self._line(what, fault)}; mend it and run the same command to go on")

  def _line(self, what: str, fault: "_Fault | None") -> str:
    cause = " ".join(self._blot(fault.cause).split())[:300] if fault else ""
    return f"{self._where}: {what}{f': {cause}' if cause else ''}"


@dataclasses.dataclass(frozen=True)
class _Fault:
  """final: the same request fails again. refused: and so does any other request."""

  cause: str
  final: bool = False
  refused: bool = False
  retry_after: float | None = None


def _host(base_url: str) -> str:
  url = urllib.parse.urlsplit(base_url)
  if url.scheme not in ("http", "https") or not url.hostname:
    raise ValueError("base_url is no http(s) address: write it as http://host:port/v1")
  if url.username or url.password or url.query:
    raise ValueError(f"base_url of {url.hostname} holds credentials or a query: use key_env")
  return url.netloc


def _read_key(name: str, required: bool) -> str:
  if not name or not (required or name in os.environ):
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


def _of_status(
  status: int, headers: Mapping[str, str], content: bytes, endpoint: Endpoint
) -> _Fault:
  """What went wrong, whether the same request can succeed later, and when the server says so."""
  said, code = replies.error(content)
  hint = ""
  if status in (401, 403):
    hint = " (set key_env)"
    if endpoint.key_env:
      known = endpoint.key_env in os.environ
      hint = f" ({'check' if known else 'export'} the key in {endpoint.key_env})"
  elif status in _REFUSED:
    hint = " (check base_url and the name of the model"
    hint += ", or use api='chat')" if endpoint.api == "responses" else ")"
  spent = code in ("insufficient_quota", "billing_hard_limit_reached")
  final = spent or (status < 500 and status not in _RETRIED)
  refused = spent or status in _REFUSED
  return _Fault(f"HTTP {status}{hint}: {said}", final, refused, _retry_after(headers))


def _let_go(session: aiohttp.ClientSession) -> None:
  """Closes a session that nobody has closed; aiohttp would complain on stderr."""
  closing = session.close()
  with contextlib.suppress(StopIteration, RuntimeError):
    closing.send(None)  # where its loop has ended there is nothing to wait for
  closing.close()


def _tls() -> ssl.SSLContext:
  """The certificates that SSL_CERT_FILE names, or certifi's: some Pythons come without any."""
  return ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())


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
