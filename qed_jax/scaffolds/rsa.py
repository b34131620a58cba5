"""Recursive self-aggregation: a population of proofs, each round merged from subsets of the last.

Source: arXiv 2509.26626 (population 16, subsets of 4 at random, 10 rounds, a random member at the
end); QED-Nano's eval agents/rsa_agent.py (8, 3, 3 rounds, circulant subsets, in which each proof is
used equally often, and a knock-out at the end). With `refine` every merged proof becomes the first
summary of a run of the reasoning cache, as in that paper's table 2 (8, 2, 10 rounds).

Calls: population, population x rounds, and with select="knockout" population - 1: 39 with
QED-Nano's numbers. The longest chain is 1 + rounds + log2(population) of them.

Failure. A first attempt without a proof is dropped and the population is smaller from then on. A
merge without a proof leaves the first proof of its subset in its place. A knock-out that cannot be
read is decided by a coin (in QED-Nano the later one won). One proof alone is merged with itself,
that is, improved.
"""

import numpy as np

from qed_jax.prompts import render
from qed_jax.records import Problem, Solution
from qed_jax.scaffolds.calls import Calls, together, turn_seed
from qed_jax.scaffolds.selection import knockout
from qed_jax.scaffolds.verdicts import numbered

FIELDS = {
  "merge_template": {"problem", "solutions"},
  "select_template": {"problem", "solutions"},
}


def subsets(count: int, size: int, kind: str, seed: int) -> list[list[int]]:
  """`count` subsets of range(count), of `size` members each or all there are."""
  rng, size = np.random.default_rng(seed), min(size, count)
  if kind == "random":
    return [rng.permutation(count)[:size].tolist() for _ in range(count)]
  order, offsets = rng.permutation(count).tolist(), rng.permutation(count)[:size].tolist()
  return [[order[(place + offset) % count] for offset in offsets] for place in range(count)]


async def solve(
  problem: Problem,
  chat,
  *,
  generate,
  refine,
  population: int,
  subset: int,
  rounds: int,
  subsets_by: str,
  select: str,
  sampling: dict,
  merge_template: str,
  select_template: str,
  seed: int,
) -> Solution:
  """The winner of the last population.

  generate: the scaffold of the first attempts. refine: None, or the reasoning cache. subsets_by:
  "circulant" or "random". select: "knockout" or "random".
  """
  calls = Calls.of(chat)

  async def merge(chosen: list[str], round_: int, place: int) -> str:
    content = render(merge_template, problem=problem.statement, solutions=numbered(chosen))
    merged = await calls.answer("merge", content, seed, round_, place, sampling=sampling)
    if refine and merged:
      own = turn_seed(seed, "refine", round_, place)
      merged = await calls.proof(refine, problem, own, summary=merged) or merged
    return merged or chosen[0]

  attempts = await together(
    calls.proof(generate, problem, turn_seed(seed, "generate", i)) for i in range(population)
  )
  members = [proof for proof in attempts if proof]
  for round_ in range(1, rounds + 1):
    blocks = subsets(len(members), subset, subsets_by, turn_seed(seed, "subsets", round_))
    members = await together(
      merge([members[i] for i in block], round_, place) for place, block in enumerate(blocks)
    )
  if not members:
    return calls.solution(problem, "")
  if select == "random":
    winner = int(np.random.default_rng(turn_seed(seed, "member")).integers(len(members)))
  else:
    how = {"template": select_template, "sampling": sampling}
    winner = await knockout(calls, problem, members, seed, **how)
  return calls.solution(problem, members[winner])
