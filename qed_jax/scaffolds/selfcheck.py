"""Solve, improve, then verify and correct until the same proof has passed often enough in a row.

Source: Huang and Yang, arXiv 2507.15855; QED-Nano's eval agents/selfcheck_agent.py: accept after 5
passes in a row, give up after 10 failures in a row or 30 iterations.

Calls: 2, then in each iteration a report, its classification and, if it failed, a correction: at
most 2 + 3 x max_iterations, all in one chain.

Failure. Without a first proof there is nothing to check. An improvement or correction without a
proof keeps the proof as it is. A report that is missing or cannot be classified says nothing: it
counts as an iteration and neither as a pass nor as a failure. The verifier sees the proof alone.
A run that is given up returns its last proof with return_if_not_found, and otherwise none.
"""

from qed_jax.prompts import render
from qed_jax.records import Problem, Solution
from qed_jax.scaffolds.calls import Calls, answer_of, assistant, turn_seed, user
from qed_jax.scaffolds.verdicts import quote, verdict

FIELDS = {
  "prompt": {"problem", "summary"},
  "improve_template": set(),
  "verify_template": {"problem", "proof"},
  "classify_template": {"report"},
  "correct_template": {"report"},
}


async def solve(
  problem: Problem,
  chat,
  *,
  generate,
  correct_count: int,
  error_count: int,
  max_iterations: int,
  return_if_not_found: bool,
  sampling: dict,
  prompt: str,
  improve_template: str,
  verify_template: str,
  classify_template: str,
  correct_template: str,
  seed: int,
) -> Solution:
  """The accepted proof, or the last one.

  generate: the scaffold of the first proof. prompt: how the problem is put in the conversations
  in which it is improved and corrected. The templates of those two are messages that follow the
  proof.
  """
  calls = Calls.of(chat)
  asked = user(render(prompt, problem=problem.statement, summary=""))

  async def rewrite(stage: str, proof: str, message: str, *indices) -> str:
    messages = [asked, assistant(proof), user(message)]
    completion = await calls.ask(stage, messages, seed, *indices, sampling=sampling)
    return answer_of(completion) or proof

  async def check(proof: str, i: int) -> tuple[str, str | None]:
    content = render(verify_template, problem=problem.statement, proof=quote(proof))
    report = await calls.answer("verify", content, seed, i, sampling=sampling)
    if not report:
      return "", None
    content = render(classify_template, report=quote(report))
    said = await calls.ask("classify", [user(content)], seed, i, sampling=sampling)
    return report, verdict(said, ("yes", "no"))

  proof = await calls.proof(generate, problem, turn_seed(seed, "generate"))
  if not proof:
    return calls.solution(problem, "")
  proof = await rewrite("improve", proof, render(improve_template))
  passes = failures = 0
  for i in range(max_iterations):
    report, passed = await check(proof, i)
    if passed == "yes":
      passes, failures = passes + 1, 0
    elif passed == "no":
      passes, failures = 0, failures + 1
    if passes == correct_count or failures == error_count:
      break
    if passed == "no":
      proof = await rewrite("correct", proof, render(correct_template, report=report), i)
  found = passes == correct_count
  return calls.solution(problem, proof if found or return_if_not_found else "")
