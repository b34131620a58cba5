"""Nomos: many solutions, scored by their author, grouped by their conclusion, then a knock-out.

Source: NousResearch/nomos and QED-Nano's eval agents/nomos_agent.py: 16 solutions; with 8 perfect
ones or more those are kept, at most 12, otherwise the 12 best; one call keeps the group to trust.

Calls: 2 x solutions, 1 to consolidate, and one fewer than are kept: at most 44 with these numbers.

Failure. A solution without a proof is dropped. A score that fails or cannot be read is none: such a
solution ranks between 3 points and 4. A consolidation that cannot be read keeps all, a duel of the
knock-out that cannot be read is decided by a coin.

Departure from the original harness: that spreads workers over many problems for three hours, most
to those with the fewest perfect solutions; here each problem has its own budget, as in QED-Nano.
"""

from qed_jax.prompts import render
from qed_jax.records import Problem, Solution
from qed_jax.scaffolds.calls import Calls, together, turn_seed, user
from qed_jax.scaffolds.selection import knockout
from qed_jax.scaffolds.verdicts import keep, numbered, quote, verdict

POINTS = "0", "1", "2", "3", "4", "5", "6", "7"
FIELDS = {
  "score_template": {"problem", "proof"},
  "consolidate_template": {"problem", "solutions"},
  "select_template": {"problem", "solutions"},
}


async def solve(
  problem: Problem,
  chat,
  *,
  generate,
  solutions: int,
  target_perfect: int,
  max_kept: int,
  sampling: dict,
  score_template: str,
  consolidate_template: str,
  select_template: str,
  seed: int,
) -> Solution:
  """The winner of the knock-out. generate: the scaffold of the solutions."""
  calls = Calls.of(chat)

  async def attempt(i: int) -> tuple[str, int | None]:
    proof = await calls.proof(generate, problem, turn_seed(seed, "generate", i))
    if not proof:
      return "", None
    content = render(score_template, problem=problem.statement, proof=quote(proof))
    completion = await calls.ask("score", [user(content)], seed, i, sampling=sampling)
    points = verdict(completion, POINTS)
    return proof, None if points is None else int(points)

  found = [pair for pair in await together(attempt(i) for i in range(solutions)) if pair[0]]
  perfect = [pair for pair in found if pair[1] == 7]
  if len(perfect) < target_perfect:
    perfect = sorted(found, key=lambda pair: 3.5 if pair[1] is None else pair[1], reverse=True)
  kept = [proof for proof, _ in perfect[:max_kept]]
  if not kept:
    return calls.solution(problem, "")
  if len(kept) > 1:
    values = {"problem": problem.statement, "solutions": numbered(kept)}
    content = render(consolidate_template, **values)
    completion = await calls.ask("consolidate", [user(content)], seed, sampling=sampling)
    chosen = keep(completion, len(kept))
    kept = kept if chosen is None else [kept[i] for i in chosen]
  how = {"template": select_template, "sampling": sampling}
  return calls.solution(problem, kept[await knockout(calls, problem, kept, seed, **how)])
