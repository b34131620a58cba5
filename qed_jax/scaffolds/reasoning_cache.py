"""The reasoning cache: reason, summarise, drop the trace, reason again from the summary.

Source: "Reasoning Cache" (arXiv 2602.03773), section 5.1 and appendix H; QED-Nano's use of it for
proofs (training/rc_actor.py, eval agents/reasoning_cache.py). The one implementation here
serves both: training takes `states` of it as prompts, evaluation its proof after every turn.

Departures from the original: a trace that was cut is summarised as it stands (there it became an
empty candidate); an empty summary keeps the previous one; training and evaluation use the same
templates; and the original draws its states before the last summary exists, with a dummy
fourth state, which here is simply the summary after the last turn (`summarise_last`).
"""

import dataclasses
import zlib

from qed_jax.prompts import render
from qed_jax.records import Completion, Problem, Solution, Turn
from qed_jax.scaffolds.proof import split_proof


@dataclasses.dataclass(frozen=True)
class State:
  """What a turn starts from: a problem and the summary of the turns before it.

  turn counts from 1 (the empty summary); `writer` is the completion that wrote the summary.
  """

  problem: Problem
  summary: str
  turn: int
  writer: Completion | None = None


def turn_seed(seed: int, *parts) -> int:
  """A 31-bit seed for one call of a run, the same on every machine and in every order."""
  return zlib.crc32(repr((seed, *parts)).encode()) >> 1


def reason_messages(template: str, problem: Problem, summary: str) -> list[dict[str, str]]:
  """The prompt of a turn, used unchanged in training and evaluation."""
  content = render(template, problem=problem.statement, summary=summary)
  return [{"role": "user", "content": content}]


async def summarise(
  problem: Problem, summary: str, reasoning: str, chat, *, template: str, seed: int, sampling: dict
) -> Completion:
  """A new summary out of the last one and the latest reasoning; no thinking of its own."""
  content = render(
    template, problem=problem.statement, existing_summary=summary, reasoning=reasoning
  )
  messages = [{"role": "user", "content": content}]
  [completion] = await chat(messages, n=1, seed=seed, thinking=False, **sampling)
  return completion


async def solve(
  problem: Problem,
  chat,
  *,
  turns: int,
  reason_template: str,
  summarise_template: str,
  reason: dict,
  summarise_sampling: dict,
  seed: int,
  summariser=None,
  summary: str = "",
  summarise_last: bool = False,
) -> Solution:
  """Run `turns` turns from `summary`; every Turn holds its proof and its summary.

  reason and summarise_sampling: max_tokens, temperature, top_p, top_k of the two kinds of call, so
  that every turn costs at most their two budgets. summariser: another chat for the summaries (a
  frozen model), or None for `chat` itself. The last turn is summarised only with summarise_last.
  """
  summariser = summariser or chat
  done = []
  for index in range(1, turns + 1):
    messages = reason_messages(reason_template, problem, summary)
    [completion] = await chat(messages, n=1, seed=turn_seed(seed, "reason", index), **reason)
    reasoning, proof = split_proof(completion.text)
    turn = Turn(index=index, summary_before=summary, completion=completion, proof=proof)
    if index < turns or summarise_last:
      written = await summarise(
        problem,
        summary,
        reasoning,
        summariser,
        template=summarise_template,
        seed=turn_seed(seed, "summarise", index),
        sampling=summarise_sampling,
      )
      summary = split_proof(written.text)[1] or written.text.strip() or summary
      turn = dataclasses.replace(turn, summary_completion=written, summary_after=summary)
    done.append(turn)
  return Solution(problem, done[-1].proof, tuple(done))


def states(solution: Solution) -> tuple[State, ...]:
  """Every state that the run passed through: before its first turn, and after each summary."""
  first = State(solution.problem, solution.turns[0].summary_before, 1)
  later = tuple(
    State(solution.problem, turn.summary_after, turn.index + 1, turn.summary_completion)
    for turn in solution.turns
    if turn.summary_completion is not None
  )
  return (first, *later)
