"""One pass: the prompt, one completion, its proof."""

from qed_jax.prompts import render
from qed_jax.records import Problem, Solution, Turn
from qed_jax.scaffolds.proof import split_proof


async def solve(problem: Problem, chat, *, prompt: str, reason: dict, seed: int) -> Solution:
  """Ask once. `prompt` is a template with {problem} (and {summary}, left empty); `reason` holds
  max_tokens, temperature, top_p, top_k."""
  content = render(prompt, problem=problem.statement, summary="")
  messages = [{"role": "user", "content": content}]
  [completion] = await chat(messages, n=1, seed=seed, **reason)
  turn = Turn(
    index=1, summary_before="", completion=completion, proof=split_proof(completion.text)[1]
  )
  return Solution(problem, turn.proof, (turn,))
