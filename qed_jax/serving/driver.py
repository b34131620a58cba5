"""The thread that steps the engine, and the queues between it and the event loop.

Only that thread touches the engine. The event loop sends it commands through one queue; what
becomes of the attempts comes back after every step in one call into the loop.
"""

import asyncio
import dataclasses
import queue
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

from qed_jax.rollout.requests import Piece, Request, RequestError

ENDED = "the server is shutting down"


class EngineFailed(RuntimeError):
  """The engine is of no more use, or is being put away: nobody's fault who asked."""


class QueueFull(RuntimeError):
  """As many attempts wait as may."""


@dataclasses.dataclass(frozen=True)
class Ended:
  """An attempt came to its end. reason: "stop" or "length"."""

  reason: str


class Job:
  """The attempts of one HTTP request. Belongs to the event loop; close it whatever happens."""

  def __init__(self, driver: "Driver", size: int):
    self._driver = driver
    self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
    self._here = size  # attempts that take a place in the queue or in the engine
    self._accepted: asyncio.Future | None = None
    self._closed = False
    # The driver's thread alone uses these: the tickets of attempts that are in the engine.
    self.tickets: dict[int, int] = {}

  async def start(self, requests: Sequence[Request]) -> None:
    """Hands the attempts to the engine. Raises RequestError or EngineFailed when it refuses."""
    self._driver.check()
    self._accepted = asyncio.get_running_loop().create_future()
    self._driver.send(("start", self, tuple(requests)))
    await self._accepted

  async def next(self) -> tuple[int, Piece | Ended]:
    """(index of the attempt, what came). Raises RequestError or EngineFailed when no more comes."""
    index, event = await self._events.get()
    if isinstance(event, Exception):
      raise event
    return index, event

  def abort(self, index: int) -> None:
    """Ends one attempt early; nothing more comes of it."""
    self._driver.send(("abort", self, (index,)))

  def close(self) -> None:
    """Ends all attempts that are not at their end, and gives their places back."""
    if self._closed:
      return
    self._closed = True
    if self._accepted is None:
      self.left(self._here)
    elif self._here:
      self._driver.send(("abort", self, None))

  def accept(self, error: Exception | None) -> None:
    """The driver's answer to start."""
    if self._accepted.done():
      return
    if error is None:
      self._accepted.set_result(None)
    else:
      self._accepted.set_exception(error)

  def left(self, count: int = 1) -> None:
    """Attempts that take no place any more."""
    self._here -= count
    self._driver.attempts -= count

  def put(self, index: int, event: Any) -> None:
    """Something for next()."""
    self._events.put_nowait((index, event))


class Driver:
  """Steps an engine while it has work.

  waiting: attempts that may wait beside those in the engine's slots. attempts: those in here now.
  failure: one line once the engine has failed; it stays failed, whatever is asked of it.
  """

  def __init__(self, engine, *, waiting: int):
    self.engine, self.capacity = engine, engine.slots + waiting
    self.attempts, self.failure, self._ended = 0, "", False
    self.figures: dict[str, float] = {}
    self._commands: queue.SimpleQueue = queue.SimpleQueue()
    self._jobs: dict[int, tuple[Job, int]] = {}  # by ticket
    self._news: list[tuple[str, Job, int, Any]] = []
    self._busy_since: float | None = None
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._loop: asyncio.AbstractEventLoop | None = None

  # --- For the event loop ----------------------------------------------------------------------

  def start(self) -> None:
    """Starts the thread; what becomes of attempts is told to the running event loop."""
    self._loop = asyncio.get_running_loop()
    self._measure()
    self._thread.start()

  async def stop(self, seconds: float) -> None:
    """Ends every attempt and the thread, which may have a step to finish: at most `seconds`."""
    self._ended = True
    self.send(("stop", None, ()))
    await asyncio.to_thread(self._thread.join, seconds)

  def open(self, size: int) -> Job:
    """Places for so many attempts. Raises QueueFull or EngineFailed."""
    self.check()
    if self.attempts + size > self.capacity:
      raise QueueFull(f"{self.attempts} attempts are in the queue, which takes {self.capacity}")
    self.attempts += size
    return Job(self, size)

  def check(self) -> None:
    """Raises EngineFailed when nothing can be asked any more."""
    if self.failure or self._ended:
      raise EngineFailed(self.failure or ENDED)

  def send(self, command: tuple) -> None:
    """A command for the thread: (verb, job, arguments)."""
    self._commands.put(command)

  @property
  def step_seconds(self) -> float:
    """How long the present step has taken so far."""
    since = self._busy_since
    return 0.0 if since is None else time.monotonic() - since

  # --- The thread ------------------------------------------------------------------------------

  def _run(self) -> None:
    try:
      while self._obey():
        self._busy_since = time.monotonic()
        self.engine.step()
        for ticket, result in self.engine.poll():
          job, index = self._jobs.pop(ticket)
          del job.tickets[index]
          failed = isinstance(result, Exception)
          self._tell("left", job, index, result if failed else Ended(result.finish_reason))
        self._busy_since = None
        self._report()
    except BaseException as error:  # the thread ends with it, and nobody may be left waiting
      self._fail(error)
      while self._obey():
        self._report()

  def _obey(self) -> bool:
    """Carries out what was asked, waiting for it while there is nothing else to do -> go on?"""
    while True:
      idle = bool(self.failure) or not self.engine.unfinished
      if idle:
        self._report()
      try:
        verb, job, rest = self._commands.get(block=idle)
      except queue.Empty:
        if self._news:  # who was accepted hears of it before the step
          self._report()
        return True
      if verb == "stop":
        self._drop_all(EngineFailed(ENDED))
        self._report()
        return False
      if verb == "abort":
        self._abort(job, rest)
      else:
        self._start(job, rest)

  def _start(self, job: Job, requests: tuple[Request, ...]) -> None:
    error: Exception | None = EngineFailed(self.failure) if self.failure else None
    try:
      for index, request in enumerate(requests if error is None else ()):
        take = lambda piece, index=index: self._tell("piece", job, index, piece)  # noqa: E731
        ticket = self.engine.submit(request, on_piece=take)
        job.tickets[index] = ticket
        self._jobs[ticket] = (job, index)
    except RequestError as refusal:
      error = refusal
    except Exception as broken:
      error = EngineFailed(one_line(broken))
    self._tell("accept", job, 0, error)
    if error is not None:
      for index in range(len(job.tickets), len(requests)):
        self._tell("left", job, index, None)
      self._abort(job, None)
    if isinstance(error, EngineFailed) and not self.failure:
      raise error

  def _abort(self, job: Job, indices: Sequence[int] | None) -> None:
    for index in list(job.tickets) if indices is None else indices:
      ticket = job.tickets.pop(index, None)
      if ticket is not None:
        del self._jobs[ticket]
        self._tell("left", job, index, None)
        if not self.failure:
          self.engine.abort(ticket)

  def _fail(self, error: BaseException) -> None:
    traceback.print_exception(error, file=sys.stderr)
    self.failure = one_line(error)
    self._busy_since = None
    self._drop_all(EngineFailed(self.failure))
    self._report()

  def _drop_all(self, error: EngineFailed) -> None:
    for job, index in list(self._jobs.values()):
      self._tell("piece", job, index, error)
      self._abort(job, (index,))

  def _tell(self, verb: str, job: Job, index: int, event: Any) -> None:
    self._news.append((verb, job, index, event))

  def _report(self) -> None:
    """Takes the news to the event loop, all of a step at once."""
    if not self.failure:
      self._measure()
    if self._news:
      news, self._news = self._news, []
      try:
        self._loop.call_soon_threadsafe(deliver, news)
      except RuntimeError:  # the loop is closed: nobody waits there any more
        pass

  def _measure(self) -> None:
    engine = self.engine
    counts = dataclasses.asdict(engine.counters)
    self.figures = {f"{name}_total": count for name, count in counts.items()} | {
      "waiting": engine.waiting,
      "running": engine.running,
      "slots": engine.slots,
      "pages": engine.pages_total,
      "pages_free": engine.pages_free,
    }


def one_line(error: BaseException) -> str:
  """What clients are told of a failure; the traceback goes to stderr."""
  if isinstance(error, EngineFailed):
    return str(error)
  what = " ".join(str(error).split())[:200]
  return f"the engine failed ({type(error).__name__}: {what})"


def deliver(news: list[tuple[str, Job, int, Any]]) -> None:
  """News of a step, in the event loop."""
  for verb, job, index, event in news:
    if verb == "accept":
      job.accept(event)
      continue
    if verb == "left":
      job.left()
    if event is not None:
      job.put(index, event)
