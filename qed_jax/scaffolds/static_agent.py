"""A fixed graph: some slots, in each a few proofs that are checked and improved, merged into one;
then the best slot is selected.

Source: QED-Nano's eval agents/math_static_agent.py: 4 slots without a given approach, 0 with one,
2 proofs a slot, 1 round of verify and improve, 29 calls.

Calls: slots x per_slot x (1 + 2 verifications), slots merges if per_slot is over 1, 1 selection,
and with `approaches` 1 to think of them. The longest chain is 1 + 2 verifications + 2, and 1 for
the approaches.

Failure. A proof that is missing is dropped, a slot without proofs too. Where a report or an
improvement is missing, the proof stays as it is; a slot whose merge is missing gives its first
proof. Fewer approaches than were asked for leave their slots without one. A selection that cannot
be read is decided by a coin over all slots (in QED-Nano the last one won).
"""

from qed_jax.prompts import render
from qed_jax.records import Problem, Solution
from qed_jax.scaffolds.calls import Calls, together, turn_seed
from qed_jax.scaffolds.selection import select
from qed_jax.scaffolds.verdicts import approaches as read_approaches
from qed_jax.scaffolds.verdicts import numbered, quote

FIELDS = {
  "approaches_template": {"problem", "count"},
  "approach_template": {"problem", "approach"},
  "verify_template": {"problem", "proof"},
  "improve_template": {"problem", "proof", "report"},
  "merge_template": {"problem", "solutions"},
  "select_template": {"problem", "solutions"},
}


async def solve(
  problem: Problem,
  chat,
  *,
  generate,
  slots: int,
  approaches: int,
  per_slot: int,
  verifications: int,
  sampling: dict,
  approaches_template: str,
  approach_template: str,
  verify_template: str,
  improve_template: str,
  merge_template: str,
  select_template: str,
  seed: int,
) -> Solution:
  """The selected slot's proof.

  generate: the scaffold of the proofs in the `slots` slots that have no approach; there are
  `approaches` more slots, whose proofs follow an approach that the model thought of.
  """
  calls = Calls.of(chat)

  async def answer(stage: str, template: str, *indices, **values: str) -> str:
    content = render(template, problem=problem.statement, **values)
    return await calls.answer(stage, content, seed, *indices, sampling=sampling)

  async def draft(slot: int, i: int, approach: str) -> str:
    if approach:
      proof = await answer("solve", approach_template, slot, i, approach=approach)
    else:
      proof = await calls.proof(generate, problem, turn_seed(seed, "generate", slot, i))
    for v in range(verifications if proof else 0):
      if report := await answer("verify", verify_template, slot, i, v, proof=quote(proof)):
        values = {"proof": proof, "report": report}
        proof = await answer("improve", improve_template, slot, i, v, **values) or proof
    return proof

  async def fill(slot: int, approach: str) -> str:
    drafts = [p for p in await together(draft(slot, i, approach) for i in range(per_slot)) if p]
    if len(drafts) < 2:
      return drafts[0] if drafts else ""
    return await answer("merge", merge_template, slot, solutions=numbered(drafts)) or drafts[0]

  plans = [""] * (slots + approaches)
  if approaches:
    text = await answer("approaches", approaches_template, count=str(approaches))
    for i, approach in enumerate(read_approaches(text, approaches)):
      plans[slots + i] = approach
  filled = await together(fill(slot, plan) for slot, plan in enumerate(plans))
  proofs = [proof for proof in filled if proof]
  if not proofs:
    return calls.solution(problem, "")
  how = {"template": select_template, "sampling": sampling}
  return calls.solution(problem, proofs[await select(calls, problem, proofs, seed, **how)])
