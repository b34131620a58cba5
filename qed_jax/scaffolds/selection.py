"""Which of several proofs is best, by asking: all at once, or two at a time.

"equal" and what cannot be read decide nothing, and a coin that is keyed by the run's seed is
thrown. (In QED-Nano the last candidate won then.)
"""

import numpy as np

from qed_jax.prompts import render
from qed_jax.records import Problem
from qed_jax.scaffolds.calls import Calls, together, turn_seed, user
from qed_jax.scaffolds.verdicts import numbered, verdict


async def select(
  calls: Calls, problem: Problem, proofs: list[str], seed: int, *indices, template: str, sampling
) -> int:
  """The index of the best of `proofs`, which are one or more; one proof costs no call.

  template: text with {problem} and {solutions}, which are counted from 1.
  """
  if len(proofs) == 1:
    return 0
  content = render(template, problem=problem.statement, solutions=numbered(proofs))
  completion = await calls.ask("select", [user(content)], seed, *indices, sampling=sampling)
  choice = verdict(completion, [str(i + 1) for i in range(len(proofs))])
  if choice is None:
    return int(np.random.default_rng(turn_seed(seed, "coin", *indices)).integers(len(proofs)))
  return int(choice) - 1


async def knockout(
  calls: Calls, problem: Problem, proofs: list[str], seed: int, *, template: str, sampling
) -> int:
  """The index of the winner of a single elimination: len(proofs) - 1 calls.

  Each round is drawn anew, so that neither place in a pair is anyone's; the odd one passes.
  """
  alive, round_ = list(range(len(proofs))), 0
  while len(alive) > 1:
    round_ += 1
    np.random.default_rng(turn_seed(seed, "draw", round_)).shuffle(alive)

    async def duel(a: int, b: int, round_=round_) -> int:
      pair = [proofs[a], proofs[b]]
      how = {"template": template, "sampling": sampling}
      return (a, b)[await select(calls, problem, pair, seed, round_, a, b, **how)]

    pairs = zip(alive[::2], alive[1::2], strict=False)
    odd = alive[-1:] if len(alive) % 2 else []
    alive = await together(duel(a, b) for a, b in pairs) + odd
  return alive[0]
