"""Pairs of problem and sample through a scaffold and a judge, some of them at once.

Each pair is written as soon as it is done. A pair whose model call failed for good has no row: it
is missing, it is counted, and the next run asks for it again. When pair after pair fails it is the
endpoint that is wrong, and the run stops with what it said.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from qed_jax.chat import ChatError, Unavailable
from qed_jax.evaluation.rows import OUTAGE, Labels, Prices, problem_of, proofs, regraded, rows_of
from qed_jax.records import Grade, Problem
from qed_jax.scaffolds.reasoning_cache import turn_seed

FAILURES = (ChatError, TimeoutError)
Grader = Callable[[Problem, str], Awaitable[Grade]]


def attempt(
  solve, chat, grade: Grader, *, seed: int, labels: Labels, prices: Prices, summariser=None
) -> Callable[[Problem, int], Awaitable[list[dict]]]:
  """async (problem, sample) -> its rows. solve: a prepared scaffold; grade: a judge.

  The seed of a sample depends on (seed, problem, sample) alone: asking for more samples later
  brings those that one longer run would have brought.
  """

  async def marked(problem: Problem, proof: str) -> Grade:
    """A judge that gives up costs no proof: it is marked by the next run."""
    try:
      return await grade(problem, proof)
    except FAILURES as error:
      return Grade(None, f"{OUTAGE}: {one_line(error)}")

  async def one(problem: Problem, sample: int) -> list[dict]:
    solution = await solve(
      problem, chat, seed=turn_seed(seed, problem.id, sample), summariser=summariser
    )
    grades = await asyncio.gather(*(marked(problem, proof) for proof in proofs(solution)))
    return rows_of(sample, solution, grades, labels, prices)

  return one


async def run(
  pairs: Iterable[tuple[Problem, int]],
  one: Callable[[Problem, int], Awaitable[list[dict]]],
  done: Callable[[list[dict]], None],
  *,
  at_once: int,
  failures_in_a_row: int,
) -> list[str]:
  """done(await one(*pair)) for every pair, `at_once` of them in flight -> lines about failed ones.

  What `one` returns is given to `done` in the event loop, in the order in which pairs end. Raises
  ValueError, one line, after so many failures in a row without a success between them. Whatever
  else is raised ends the run; what is done has been given out.
  """
  pairs = iter(pairs)
  failed: list[str] = []
  in_a_row = 0

  def count(why: str, error: Exception | None = None) -> None:
    nonlocal in_a_row
    in_a_row += 1
    if in_a_row >= failures_in_a_row or isinstance(error, Unavailable):
      raise ValueError(
        f"{in_a_row} attempts failed one after the other, the last with: {why}; what is done is "
        "kept: mend it and run the same command again"
      ) from error

  async def worker() -> None:
    nonlocal in_a_row
    for problem, sample in pairs:
      try:
        rows = await one(problem, sample)
      except FAILURES as error:
        failed.append(f"{problem.id}, sample {sample}: {one_line(error)}")
        count(one_line(error), error)
        continue
      done(rows)
      if outages := [row["reason"] for row in rows if is_outage(row)]:
        count(f"the judge {outages[-1]}")
      else:
        in_a_row = 0

  workers = [asyncio.ensure_future(worker()) for _ in range(at_once)]
  try:
    await asyncio.gather(*workers)
  finally:
    for task in workers:
      task.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
  return failed


def is_outage(row: dict) -> bool:
  """Whether the proof has no grade because the judge could not be asked."""
  return row["score"] is None and row["reason"].startswith(OUTAGE)


def one_line(error: Exception) -> str:
  return " ".join(str(error).split()) or type(error).__name__


async def grade_again(
  rows: Sequence[dict], grade: Grader, prices: Prices, *, at_once: int
) -> tuple[list[dict], int]:
  """(the rows, how many of them got the grade that an outage of the judge had left out)."""
  slots = asyncio.Semaphore(at_once)

  async def one(row: dict) -> dict:
    if not is_outage(row):
      return row
    async with slots:
      return regraded(row, await grade(problem_of(row), row["proof"]), prices)

  new = await asyncio.gather(*(one(row) for row in rows))
  return new, sum(a["score"] != b["score"] for a, b in zip(rows, new, strict=True))
