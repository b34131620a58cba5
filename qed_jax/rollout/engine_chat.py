"""An engine behind the Chat protocol, so that scaffolds run on it unchanged."""

import asyncio
import collections
import dataclasses
from collections.abc import Callable, Sequence

from qed_jax.records import Completion
from qed_jax.rollout import sampling
from qed_jax.rollout.engine import Engine
from qed_jax.rollout.requests import Request, RequestError

TURNS_OF_THE_LOOP = 6  # that a result may take to reach who asks the next question


class EngineChat:
  """Chats on one engine, all in one event loop.

  Calls wait together: one of them drives the engine in a thread while the event loop serves the
  others, and what they ask meanwhile joins at the next step. Without a `seed`, calls with the same
  prompt draw on: the engine's attempts are counted per prompt under the seed given here.

  hold: asked between two steps, when everybody waits for the engine; while it says True the engine
  rests, until `go_on`.
  """

  def __init__(
    self, engine: Engine, tokenizer, seed: int, hold: Callable[[], bool] = lambda: False
  ):
    self.engine, self.tokenizer, self.seed, self.hold = engine, tokenizer, seed, hold
    self._asked: list[tuple[Request, asyncio.Future]] = []
    self._futures: dict[int, asyncio.Future] = {}
    self._attempts: collections.Counter = collections.Counter()
    self._driver: asyncio.Task | None = None
    self._stepping = asyncio.Lock()
    self._go = asyncio.Event()

  async def chat(
    self,
    messages: Sequence[dict],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    n: int = 1,
    seed: int | None = None,
    thinking: bool = True,
  ) -> list[Completion]:
    """n completions of one conversation. With a `seed` they are attempts 0..n-1 under it.

    Raises RequestError when the engine cannot serve the request.
    """
    prompt = tuple(self.tokenizer.chat(messages, thinking=thinking))
    first = 0
    if seed is None:
      seed, name = self.seed, sampling.prompt_id(prompt)
      first = self._attempts[name]
      self._attempts[name] += n
    futures = []
    for attempt in range(first, first + n):
      request = Request(prompt, seed, attempt, max_tokens, temperature, top_p, top_k)
      futures.append(asyncio.get_running_loop().create_future())
      self._asked.append((request, futures[-1]))
    if self._driver is None or self._driver.done():
      self._driver = asyncio.create_task(self._drive())
    return [self._with_text(c) for c in await asyncio.gather(*futures)]

  async def set_params(self, params: dict, version: int) -> None:
    """Engine.set_params between two steps; what runs goes on under the new parameters."""
    async with self._stepping:
      await asyncio.to_thread(self.engine.set_params, params, version)

  async def rest(self) -> None:
    """Returns once no step is under way; `hold` must say True by then."""
    async with self._stepping:
      pass

  def go_on(self) -> None:
    """`hold` may have changed its mind."""
    self._go.set()

  def _with_text(self, completion: Completion) -> Completion:
    return dataclasses.replace(completion, text=self.tokenizer.decode(completion.tokens.tolist()))

  async def _drive(self) -> None:
    """Steps the engine until nothing is asked of it; its failure is that of every waiting call."""
    try:
      while True:
        await self._everyone_waits()
        self._submit()
        if not self.engine.unfinished:
          return
        self._go.clear()
        if self.hold():
          await self._go.wait()
          continue
        async with self._stepping:
          if self.hold():
            continue
          await asyncio.to_thread(self.engine.step)
        self._hand_out()
    except Exception as e:
      waiting = [*self._futures.values(), *(future for _, future in self._asked)]
      self._futures, self._asked = {}, []
      for future in waiting:
        if not future.done():
          future.set_exception(e)

  def _hand_out(self) -> None:
    for ticket, result in self.engine.poll():
      future = self._futures.pop(ticket)
      if not future.done():
        settle = future.set_exception if isinstance(result, Exception) else future.set_result
        settle(result)

  async def _everyone_waits(self) -> None:
    """Lets the coroutines run on until none of them asks for more."""
    asked = -1
    while asked != len(self._asked):
      asked = len(self._asked)
      for _ in range(TURNS_OF_THE_LOOP):
        await asyncio.sleep(0)

  def _submit(self) -> None:
    """What was cancelled meanwhile is not started, or taken out."""
    asked, self._asked = self._asked, []
    for request, future in asked:
      if future.cancelled():
        continue
      try:
        ticket = self.engine.submit(request)
      except RequestError as e:
        future.set_exception(e)
        continue
      self._futures[ticket] = future
    for ticket, future in list(self._futures.items()):
      if future.cancelled():
        self.engine.abort(ticket)
        del self._futures[ticket]
