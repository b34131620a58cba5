"""One pass: the prompt, one completion, its proof.

Source: QED-Nano's single turn (eval, run.py: max_tokens 229,376, T 0.8, top_p 1). One call.

A completion that was cut in its reasoning has no proof, and the solution's is then empty; one that
was cut in its proof counts as it stands.
"""

from qed_jax.prompts import render
from qed_jax.records import Problem, Solution, Turn
from qed_jax.scaffolds.calls import Calls, answer_of, user

FIELDS = {"prompt": {"problem", "summary"}}


async def solve(problem: Problem, chat, *, prompt: str, reason: dict, seed: int) -> Solution:
  """Ask once. `prompt` is a template with {problem} (and {summary}, left empty); `reason` holds
  max_tokens, temperature, top_p, top_k."""
  calls = Calls.of(chat)
  content = render(prompt, problem=problem.statement, summary="")
  completion = await calls.ask("reason", [user(content)], seed, 1, sampling=reason)
  proof = answer_of(completion)
  turns = (Turn(index=1, summary_before="", completion=completion, proof=proof),)
  return calls.solution(problem, proof, turns if completion else ())
