"""The reasoning cache: reason, summarise, drop the trace, reason again from the summary.

Source: "Reasoning Cache" (arXiv 2602.03773), section 5.1 and appendix H; QED-Nano's use of it for
proofs (training/rc_actor.py, eval agents/reasoning_cache.py). The one implementation here
serves both: training takes `states` of it as prompts, evaluation its proof after every turn.

Departures from the original: a trace that was cut is summarised as it stands (there it became an
empty candidate); an empty summary keeps the previous one; training and evaluation use the same
templates; the original draws its states before the last summary exists, with a dummy
fourth state, which here is simply the summary after the last turn (`summarise_last`); and the
solution's proof is that of the last turn that has one, while the original returned nothing where
the last trace was cut.

Calls: `turns` to reason and one fewer to summarise, all in one chain. A failed call to reason ends
the run with the turns before it; a failed summary keeps the one before.
"""

import dataclasses

from qed_jax.prompts import render
from qed_jax.records import Completion, Problem, Solution, Turn
from qed_jax.scaffolds.calls import Calls, user
from qed_jax.scaffolds.calls import turn_seed as turn_seed  # training and evaluation take it here
from qed_jax.scaffolds.proof import split_proof

FIELDS = {
  "reason_template": {"problem", "summary"},
  "summarise_template": {"problem", "existing_summary", "reasoning"},
}


@dataclasses.dataclass(frozen=True)
class State:
  """What a turn starts from: a problem and the summary of the turns before it.

  turn counts from 1 (the empty summary); `writer` is the completion that wrote the summary.
  """

  problem: Problem
  summary: str
  turn: int
  writer: Completion | None = None


def reason_messages(template: str, problem: Problem, summary: str) -> list[dict[str, str]]:
  """The prompt of a turn, used unchanged in training and evaluation."""
  return [user(render(template, problem=problem.statement, summary=summary))]


def summary_messages(
  template: str, problem: Problem, summary: str, reasoning: str
) -> list[dict[str, str]]:
  """The prompt of a summary."""
  values = {"existing_summary": summary, "reasoning": reasoning}
  return [user(render(template, problem=problem.statement, **values))]


async def summarise(
  problem: Problem, summary: str, reasoning: str, chat, *, template: str, seed: int, sampling: dict
) -> Completion:
  """A new summary out of the last one and the latest reasoning; no thinking of its own."""
  messages = summary_messages(template, problem, summary, reasoning)
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
  calls = Calls.of(chat, summariser)
  done = []
  for index in range(1, turns + 1):
    messages = reason_messages(reason_template, problem, summary)
    completion = await calls.ask("reason", messages, seed, index, sampling=reason)
    if completion is None:
      break
    reasoning, proof = split_proof(completion.text)
    turn = Turn(index=index, summary_before=summary, completion=completion, proof=proof)
    if index < turns or summarise_last:
      written = await calls.ask(
        "summarise",
        summary_messages(summarise_template, problem, summary, reasoning),
        seed,
        index,
        sampling=summarise_sampling,
        thinking=False,
        summarises=True,
      )
      if written is not None:
        summary = split_proof(written.text)[1] or written.text.strip() or summary
      turn = dataclasses.replace(turn, summary_completion=written, summary_after=summary)
    done.append(turn)
  proofs = [turn.proof for turn in done if turn.proof]
  return calls.solution(problem, proofs[-1] if proofs else "", tuple(done))


def states(solution: Solution) -> tuple[State, ...]:
  """Every state that the run passed through: before its first turn, and after each summary."""
  first = State(solution.problem, solution.turns[0].summary_before, 1)
  later = tuple(
    State(solution.problem, turn.summary_after, turn.index + 1, turn.summary_completion)
    for turn in solution.turns
    if turn.summary_completion is not None
  )
  return (first, *later)
