"""A circuit breaker: while an endpoint is down its callers wait, and nobody pays with a result.

Closed, calls go through. Failures in a row, or a call about to give up, raise the question whether
the endpoint or the request is at fault; a probe, a request of its own, answers it. If the probe
fails too there is an outage: the breaker opens, everybody waits, and a probe goes out ever less
often until one succeeds (or some call that was under way does). An outage longer than the patience
ends every call with the error that `over` makes.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable


class Breaker:
  """Of one endpoint, in one event loop at a time.

  probe: () -> None when the endpoint answers, else what is wrong with it in one line. It raises
    when waiting is of no use.
  over: (seconds, what is wrong) -> the exception once an outage has outlasted `patience`.
  after: failures in a row that raise the question. patience: seconds; 0 makes a breaker that never
    opens. longest_wait: seconds between two probes at most; the first is repeated after one.
  held: () -> seconds that the endpoint has asked to be left alone.
  changed: called when the breaker opens and when it closes.
  """

  def __init__(
    self,
    probe: Callable[[], Awaitable[str | None]],
    over: Callable[[float, str], Exception],
    *,
    after: int,
    patience: float,
    longest_wait: float,
    held: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]],
    clock: Callable[[], float],
  ):
    self.open = False
    self.outages = 0
    self.changed: Callable[[], None] = lambda: None
    self._probe, self._over, self._held = probe, over, held
    self._after, self._patience, self._longest_wait = after, patience, longest_wait
    self._sleep, self._clock = sleep, clock
    self._failures = 0
    self._seconds = 0.0
    self._since: float | None = None
    self._inquiry: asyncio.Task[bool] | None = None
    self._proved = False

  @property
  def seconds(self) -> float:
    """Seconds of outage so far, the one that lasts included."""
    return self._seconds + (self._clock() - self._since if self._since is not None else 0.0)

  async def passes(self) -> bool:
    """Returns once calls may go through: at once, or after an outage, and then True."""
    waited = False
    while self.open and self._inquiry is not None:
      waited = await asyncio.shield(self._inquiry) or waited
    return waited

  def succeeded(self) -> None:
    """A call came through: the endpoint is alive."""
    self._failures = 0
    self._proved = True

  async def failed(self, last: bool) -> bool:
    """A call has failed for a reason that may pass. True, when the outage is over, if that was an
    outage; False if the request may have itself to blame. last: the call would now give up."""
    self._failures += 1
    if not self._patience or (not last and self._failures < self._after and not self._inquiry):
      return False
    if self._inquiry is None:
      self._inquiry = asyncio.create_task(self._inquire())
      self._inquiry.add_done_callback(_retrieve)
    return await asyncio.shield(self._inquiry)

  async def close(self) -> None:
    """Ends the probing; those who wait are cancelled."""
    if self._inquiry is not None:
      self._inquiry.cancel()
      await asyncio.gather(self._inquiry, return_exceptions=True)

  async def _inquire(self) -> bool:
    """Probes until the endpoint answers -> whether there was an outage."""
    begin, wait, self._proved = self._clock(), 1.0, False
    try:
      while not self._proved and (wrong := await self._probe()) is not None:
        if not self.open:
          self.open, self._since = True, begin
          self.outages += 1
          self.changed()
        pause = max(wait, self._held())
        if self._clock() - begin + pause > self._patience:
          raise self._over(self._clock() - begin, wrong)
        await self._sleep(pause)
        wait = min(2 * wait, self._longest_wait)
      return self.open
    finally:
      self._inquiry, self._failures = None, 0
      if self.open:
        self._seconds, self._since, self.open = self.seconds, None, False
        self.changed()


def _retrieve(task: asyncio.Task) -> None:
  # Those who wait have the exception too; where nobody waits any more it is nobody's.
  with contextlib.suppress(asyncio.CancelledError):
    task.exception()
