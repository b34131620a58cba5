"""Asks for what a ledger lacks: bounded concurrency, progress, and a stop when nothing succeeds."""

import asyncio
import collections
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from qed_jax import metrics
from qed_jax.chat import ChatError
from qed_jax.curation.ledger import Ledger
from qed_jax.rollout.requests import RequestError

T = TypeVar("T")
SHOWN = 3  # reasons of failures that are printed


class Unusable(ValueError):
  """What came back cannot be used; the item stays missing and is asked for by the next run."""


async def fill(
  ledger: Ledger,
  wanted: Mapping[str, T],
  ask: Callable[[T], Awaitable[dict[str, Any]]],
  *,
  concurrency: int,
  max_failures: int,
  label: str,
) -> int:
  """Adds a record for each wanted key that the ledger lacks; returns how many are still missing.

  wanted: what `ask` gets, by key. A failed call leaves its key missing. max_failures: after so many
  of them in a row the rest is not tried: raises ValueError in one line, and what is finished stays.
  """
  missing = [key for key in wanted if key not in ledger]
  waiting = iter(missing)
  reasons: collections.Counter[str] = collections.Counter()
  progress = metrics.Progress(label, len(wanted) - len(missing), len(wanted))
  done, in_a_row, last = len(wanted) - len(missing), 0, ""

  async def worker() -> None:
    nonlocal done, in_a_row, last
    for key in waiting:
      if in_a_row >= max_failures:
        return
      try:
        record = await ask(wanted[key])
      except (ChatError, RequestError, Unusable, TimeoutError) as error:
        in_a_row, last = in_a_row + 1, str(error) or "the chat timed out"
        reasons[last] += 1
        continue
      await asyncio.to_thread(ledger.add, key, record)
      done, in_a_row = done + 1, 0
      progress.update(done, {})

  try:
    async with asyncio.TaskGroup() as group:
      for _ in range(min(concurrency, len(missing))):
        group.create_task(worker())
  except BaseExceptionGroup as errors:  # the first is the cause; the group cancelled the others
    raise errors.exceptions[0] from None
  finally:
    progress.close()
  for reason, count in reasons.most_common(SHOWN):
    print(f"{label}: {count} failed: {reason}", flush=True)
  if in_a_row >= max_failures and done < len(wanted):
    raise ValueError(
      f"{label}: {in_a_row} calls in a row failed, the last with: {last}; {done} of {len(wanted)} "
      "are finished and kept: mend the cause and run the same command again"
    )
  return len(wanted) - done
