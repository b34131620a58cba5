"""Every model call of a scaffold goes through here: written down, seeded, and allowed to fail.

A scaffold asks one thing after the other, or several `together`. From that structure alone, which
is kept beside each task, a call knows its depth and its place in the order of a run without
concurrency; neither depends on which answer came first.

Failure. A call that raises ChatError or TimeoutError (the chat has retried by then) is recorded
with its error, and the scaffold goes on without it. A run that ends without a proof and in which a
call failed raises that error: it was not solved, and nobody may score it.
"""

import asyncio
import contextvars
import dataclasses
import zlib
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any

from qed_jax.chat import ChatError
from qed_jax.records import Call, Completion, Problem, Solution, Turn, Usage
from qed_jax.scaffolds.proof import split_proof

FAILURES = (ChatError, TimeoutError)


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where in a run a task is. path: places in the branches it is in; the last one counts on."""

  path: tuple[int, ...] = (0,)
  depth: int = 0

  def after(self, depth: int) -> "_Place":
    return _Place((*self.path[:-1], self.path[-1] + 1), depth)


_START = _Place()
_place: contextvars.ContextVar[_Place] = contextvars.ContextVar("place")


def turn_seed(seed: int, *parts) -> int:
  """A 31-bit seed for one call of a run, the same on every machine and in every order."""
  return zlib.crc32(repr((seed, *parts)).encode()) >> 1


def user(content: str) -> dict[str, str]:
  return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
  return {"role": "assistant", "content": content}


async def together(branches: Iterable[Awaitable[Any]]) -> list[Any]:
  """Their results, in their order. What comes next waits for the longest of them.

  When one raises the others are cancelled, and waited for.
  """
  here = _place.get(_START)

  async def branch(index: int, work: Awaitable[Any]) -> tuple[Any, int]:
    _place.set(_Place((*here.path, index, 0), here.depth))  # of this branch's own task
    return await work, _place.get().depth

  tasks = [asyncio.ensure_future(branch(i, work)) for i, work in enumerate(branches)]
  try:
    done = await asyncio.gather(*tasks)
  except BaseException:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    raise
  _place.set(here.after(max((depth for _, depth in done), default=here.depth)))
  return [result for result, _ in done]


class Calls:
  """The calls of one run of a scaffold on one problem. Make it with `Calls.of(chat)`."""

  def __init__(self, chat: Any, summariser: Any, parent: "Calls | None"):
    self._chat, self._summariser, self._parent = chat, summariser, parent
    self._made: list[tuple[tuple[int, ...], Call]] = []
    self._error: Exception | None = None

  @classmethod
  def of(cls, chat: Any, summariser: Any = None) -> "Calls":
    """chat: the Chat protocol, or the Calls of the scaffold that this one is a step of, which then
    has the calls of both. summariser: another chat, for summaries."""
    if isinstance(chat, Calls):
      return cls(chat._chat, summariser or chat._summariser, chat)
    _place.set(_START)
    return cls(chat, summariser, None)

  async def ask(
    self,
    stage: str,
    messages: Sequence[Mapping[str, str]],
    seed: int,
    *indices: Any,
    sampling: Mapping[str, Any],
    thinking: bool = True,
    summarises: bool = False,
  ) -> Completion | None:
    """One completion, drawn under (seed, stage, indices); None if the call failed.

    sampling: max_tokens, temperature, top_p, top_k. summarises: asks the summariser.
    """
    chat = self._summariser if summarises and self._summariser else self._chat
    own, place = turn_seed(seed, stage, *indices), _place.get(_START)
    completion, error = None, None
    try:
      [completion] = await chat(messages, n=1, seed=own, thinking=thinking, **sampling)
    except FAILURES as failure:
      error = failure
    _place.set(place.after(place.depth + 1))
    line = "" if error is None else " ".join(str(error).split()) or type(error).__name__
    given = completion or Completion(text="")
    call = Call(stage, tuple(map(dict, messages)), given, place.depth + 1, line)
    self._note(place.path, call, error)
    return completion

  async def answer(self, stage: str, content: str, seed: int, *indices: Any, **how: Any) -> str:
    """What the answer to one message says after its thinking; "" if it failed or did not get there.

    An answer that is cut after its thinking counts as it stands.
    """
    completion = await self.ask(stage, [user(content)], seed, *indices, **how)
    return answer_of(completion)

  async def proof(self, generate: Any, problem: Problem, seed: int, **how: Any) -> str:
    """The proof that another scaffold finds, as a step of this one; "" if it finds none."""
    try:
      return (await generate(problem, self, seed=seed, **how)).proof
    except FAILURES:  # its calls are on record
      return ""

  def solution(self, problem: Problem, proof: str, turns: tuple[Turn, ...] = ()) -> Solution:
    """The end of a run. Raises the last failure if there is no proof because of it."""
    if not proof and self._error is not None:
      raise self._error
    made = sorted(self._made, key=lambda pair: pair[0])
    return Solution(problem, proof, turns, tuple(call for _, call in made))

  def _note(self, path: tuple[int, ...], call: Call, error: Exception | None) -> None:
    self._made.append((path, call))
    self._error = error or self._error
    if self._parent is not None:
      self._parent._note(path, call, error)


def answer_of(completion: Completion | None) -> str:
  """The text after the thinking, or "" if there is none."""
  return "" if completion is None else split_proof(completion.text)[1]


def spent(calls: Iterable[Call]) -> Usage:
  """Tokens, seconds and requests of calls, summed. Seconds of calls at the same time add up too."""
  usages = [call.completion.usage for call in calls]
  return Usage(
    sum(u.input_tokens for u in usages),
    sum(u.output_tokens for u in usages),
    sum(u.seconds for u in usages),
    sum(u.calls for u in usages),
  )


def depth(calls: Iterable[Call]) -> int:
  """The length of the longest chain of calls: what no concurrency makes shorter."""
  return max((call.depth for call in calls), default=0)
