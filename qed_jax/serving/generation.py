"""From a checked request to its answer: attempts into the engine, their text out to the client."""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi.responses import Response

from qed_jax.data.tokenizer import Tokenizer
from qed_jax.rollout.requests import RequestError
from qed_jax.serving.answers import Answers, total
from qed_jax.serving.attempts import attempts
from qed_jax.serving.choice import Choice, Delta
from qed_jax.serving.driver import Driver, Ended, EngineFailed, Job, QueueFull
from qed_jax.serving.errors import ApiError
from qed_jax.serving.meters import GONE, Meters
from qed_jax.serving.protocol import Body, ChatBody
from qed_jax.serving.vocabulary import Vocabulary

PING_S = 15.0  # a stream without news says that it lives, or a proxy may cut it
LAST_WORDS_S = 10.0  # beyond the deadline, to tell a client of it
Result = TypeVar("Result")


class ClientGone(Exception):
  """The client hung up."""


@dataclasses.dataclass(frozen=True)
class Service:
  """What requests are answered with.

  name: of the model. limits, sampling: blocks of the config. created: seconds of Unix time. words:
  the one thread that tokenizes, since a prompt of megabytes would hold up the event loop.
  """

  name: str
  driver: Driver
  tokenizer: Tokenizer
  limits: Any
  sampling: Any
  vocabulary: Vocabulary
  meters: Meters
  created: int
  words: ThreadPoolExecutor


def service(name: str, engine, tokenizer: Tokenizer, config) -> Service:
  """Everything that create_app needs, the engine's thread not yet started."""
  driver = Driver(engine, waiting=config.limits.waiting)
  return Service(
    name=name,
    driver=driver,
    tokenizer=tokenizer,
    limits=config.limits,
    sampling=config.sampling,
    vocabulary=Vocabulary(tokenizer),
    meters=Meters(lambda: driver.figures),
    created=int(time.time()),
    words=ThreadPoolExecutor(1, "tokenizer"),
  )


def check_limits(limits, slots: int) -> None:
  """Raises ValueError, one line, where a request that is allowed would never have room."""
  places = slots + limits.waiting
  if not limits.n <= limits.choices <= places:
    raise ValueError(
      f"config.limits.choices is {limits.choices}: it must be at least limits.n ({limits.n}) and "
      f"at most rollout.slots + limits.waiting ({places})"
    )


async def answer(
  service: Service, request, body: Body, kind: type[Answers], encode: Callable[[], list[list[int]]]
) -> Response:
  """The response to a chat or a completion. encode: () -> token ids of the prompts."""
  check_model(service, body.model)
  count = body.choices * (1 if isinstance(body, ChatBody) else len(body.prompts))
  try:
    job = service.driver.open(count)
  except (QueueFull, EngineFailed) as error:
    raise told(service, error) from None
  handed_on = False
  try:
    prompts = await unless_gone(request.receive, tokenized(service, body, encode))
    engine = service.driver.engine
    requests = attempts(body, prompts, engine, service.limits, service.sampling)
    deadline = asyncio.get_running_loop().time() + service.limits.deadline_s
    await unless_gone(request.receive, started(service, job, requests))
    service.meters.prompt_tokens.inc(sum(map(len, prompts)))
    choices = [
      Choice(
        service.vocabulary,
        stop_ids={*engine.stop_ids, *r.stop_ids},
        stops=body.stops,
        thinking=isinstance(body, ChatBody) and body.thinking(service.sampling.thinking),
        alternatives=body.alternatives,
      )
      for r in requests
    ]
    answers = kind(service.name, service.vocabulary, body.usage_at_end)
    flow = Flow(service, job, choices, answers, sum(map(len, prompts)), deadline)
    if body.stream:
      handed_on = True
      return EventStream(flow, body.usage_at_end)
    whole = await unless_gone(request.receive, flow.whole())
    return Response(dumped(whole), media_type="application/json")
  except ClientGone:
    return Response(status_code=GONE)
  finally:
    if not handed_on:
      job.close()


@dataclasses.dataclass(frozen=True)
class Flow:
  """An answer on its way. deadline: in the event loop's time."""

  service: Service
  job: Job
  choices: Sequence[Choice]
  answers: Answers
  prompt_tokens: int
  deadline: float

  async def deltas(self) -> AsyncIterator[tuple[int, Delta] | None]:
    """(index, what is new) until every choice has ended; None now and then while nothing is new.

    Raises ApiError.
    """
    now = asyncio.get_running_loop().time
    open_ = set(range(len(self.choices)))
    while open_:
      try:
        async with asyncio.timeout_at(min(self.deadline, now() + PING_S)):
          index, event = await self.job.next()
      except TimeoutError:
        if now() >= self.deadline:
          message = f"no end within {self.service.limits.deadline_s:g} s"
          raise ApiError(504, message, code="deadline_exceeded") from None
        yield None
        continue
      except (RequestError, EngineFailed) as error:
        raise told(self.service, error) from None
      if index not in open_:
        continue
      choice = self.choices[index]
      ended = isinstance(event, Ended)
      delta = choice.end(event.reason) if ended else choice.take(event)
      if choice.finish_reason:
        open_.discard(index)
        self.service.meters.completion_tokens.inc(choice.tokens)
        if not ended:  # at a stop string the engine does not know of the end
          self.job.abort(index)
      yield index, delta

  async def whole(self) -> dict[str, Any]:
    """The answer at once."""
    parts: list[list[Delta]] = [[] for _ in self.choices]
    async for news in self.deltas():
      if news is not None:
        parts[news[0]].append(news[1])
    usage = self.answers.usage(self.prompt_tokens, self.choices)
    return self.answers.whole(self.choices, [total(p) for p in parts], usage)

  async def events(self, with_usage: bool) -> AsyncIterator[bytes]:
    """The answer as server-sent events."""
    start = time.monotonic()
    waits_for_text = True
    for index in range(len(self.choices)):
      for chunk in self.answers.first(index):
        yield event(chunk)
    try:
      async for news in self.deltas():
        if news is None:
          yield b": still here\n\n"
          continue
        index, delta = news
        if delta and waits_for_text:
          waits_for_text = False
          self.service.meters.first_text.observe(time.monotonic() - start)
        for chunk in self.answers.parts(index, delta):
          yield event(chunk)
        if self.choices[index].finish_reason:
          yield event(self.answers.last(index, self.choices[index]))
    except ApiError as error:
      yield event(error.body)
    else:
      if with_usage:
        usage = self.answers.usage(self.prompt_tokens, self.choices)
        yield event(self.answers.usage_chunk(usage))
    yield b"data: [DONE]\n\n"


class EventStream(Response):
  """Sends a Flow's events, and closes its job however that ends."""

  media_type = "text/event-stream"

  def __init__(self, flow: Flow, with_usage: bool):
    super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
    del self.headers["content-length"]
    self._flow, self._with_usage = flow, with_usage

  async def __call__(self, scope, receive, send) -> None:
    try:
      async with asyncio.timeout_at(self._flow.deadline + LAST_WORDS_S):
        await unless_gone(receive, self._send(send))
    except (ClientGone, TimeoutError, OSError):  # nobody reads any more
      pass
    finally:
      self._flow.job.close()

  async def _send(self, send) -> None:
    await send(
      {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
    )
    async with contextlib.aclosing(self._flow.events(self._with_usage)) as events:
      async for data in events:
        await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def check_model(service: Service, name: str | None) -> None:
  """Raises ApiError for a model that is not served here; none named is the one that is."""
  if name not in (None, service.name):
    message = f"the model {name[:100]!r} does not exist; this server has {service.name!r}"
    raise ApiError(404, message, "model", "model_not_found")


async def tokenized(service: Service, body: Body, encode: Callable[[], list[list[int]]]):
  """The prompts' token ids, made in the tokenizer's thread."""
  try:
    return await asyncio.get_running_loop().run_in_executor(service.words, encode)
  except ValueError as error:
    param = "messages" if isinstance(body, ChatBody) else "prompt"
    raise ApiError(400, f"{param}: {error}", param) from None


async def started(service: Service, job: Job, requests: Sequence[Any]) -> None:
  """Waits until the engine has taken the attempts. Raises ApiError when it does not."""
  try:
    await job.start(requests)
  except (RequestError, EngineFailed) as error:
    raise told(service, error) from None


def told(service: Service, error: Exception) -> ApiError:
  """What a client is told of a refusal or failure."""
  if isinstance(error, QueueFull):
    after = {"retry-after": str(service.limits.retry_after_s)}
    return ApiError(429, f"{error}: try again later", code="queue_full", headers=after)
  if isinstance(error, EngineFailed):
    return ApiError(503, str(error), code="engine_failed")
  return ApiError(400, str(error))


async def unless_gone(receive, work: Awaitable[Result]) -> Result:
  """What `work` gives. Raises ClientGone, with `work` cancelled, when the client goes first."""

  async def hung_up() -> None:
    while (await receive())["type"] != "http.disconnect":
      pass

  tasks = [asyncio.ensure_future(work), asyncio.ensure_future(hung_up())]
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if tasks[0].done():
      return tasks[0].result()
    raise ClientGone
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def dumped(value: dict[str, Any]) -> bytes:
  """JSON in UTF-8, without spaces."""
  return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def event(value: dict[str, Any]) -> bytes:
  """One server-sent event."""
  return b"data: " + dumped(value) + b"\n\n"
