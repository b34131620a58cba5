"""A model that plans: it calls tools for approaches, proofs, checks, and merges, then submits one.

Source: QED-Nano's eval agents/math_agent.py: at most 15 tool calls, 4 fresh solutions, 4
approaches.

A tool call is a JSON object in the planner's reply, `<call>{"tool": "verify", "solution":
"S1"}</call>`, so that any chat can plan, not only one with an API for tools. The tools:

  approaches {}                         A1, A2, ...: ideas, once
  solve {} or {"approach": "A1"}        a fresh solution S1, S2, ...
  verify {"solution": "S1"}             a report on it
  improve {"solution": "S1"}            a new solution from it and its reports
  merge {"solutions": ["S1", "S2"]}     a new solution from several
  select {"solutions": ["S1", "S2"]}    the best of several
  submit {"solution": "S1"}             the end

Calls: a turn of the planner for every tool call, and the tool's own; at most max_calls + 1 turns,
all in one chain. The planner sees the answers without their thinking, and never its own thinking.

Failure. A reply with no call or a wrong one is told so and counts as a call; after max_calls calls
there is one reminder to submit. A planner that never submits, or whose turn fails, gives the
youngest solution (an error in QED-Nano); with none at all, one is made directly. A tool whose model
call fails says so, and the planner goes on.
"""

import dataclasses

from qed_jax.prompts import render
from qed_jax.records import Problem, Solution
from qed_jax.scaffolds import verdicts
from qed_jax.scaffolds.calls import Calls, answer_of, assistant, turn_seed, user
from qed_jax.scaffolds.selection import select

FIELDS = {
  "plan_template": {"problem", "calls", "fresh"},
  "approaches_template": {"problem", "count"},
  "approach_template": {"problem", "approach"},
  "verify_template": {"problem", "proof"},
  "improve_template": {"problem", "proof", "report"},
  "merge_template": {"problem", "solutions"},
  "select_template": {"problem", "solutions"},
}
REMINDER = 'No calls are left. Submit now: <call>{"tool": "submit", "solution": "S1"}</call>'


class Misused(Exception):
  """A call that the planner has to mend. One line for it to read."""


@dataclasses.dataclass
class Board:
  """What there is so far. reports: by the solution's name."""

  approaches: dict[str, str] = dataclasses.field(default_factory=dict)
  solutions: dict[str, str] = dataclasses.field(default_factory=dict)
  reports: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  fresh: int = 0
  submitted: str = ""

  def add(self, proof: str) -> str:
    if not proof:
      return "It brought no solution."
    name = f"S{len(self.solutions) + 1}"
    self.solutions[name] = proof
    return f"{name}:\n\n{proof}"

  def solution(self, name) -> str:
    if not isinstance(name, str) or name not in self.solutions:
      there = ", ".join(self.solutions) or "none yet"
      raise Misused(f"there is no such solution; there are: {there}")
    return self.solutions[name]


async def solve(
  problem: Problem,
  chat,
  *,
  generate,
  max_calls: int,
  max_solutions: int,
  max_approaches: int,
  sampling: dict,
  plan_template: str,
  approaches_template: str,
  approach_template: str,
  verify_template: str,
  improve_template: str,
  merge_template: str,
  select_template: str,
  seed: int,
) -> Solution:
  """The submitted solution. generate: the scaffold of a solution without an approach."""
  calls, board = Calls.of(chat), Board()

  async def ask(stage: str, template: str, i: int, **values: str) -> str:
    content = render(template, problem=problem.statement, **values)
    return await calls.answer(stage, content, seed, i, sampling=sampling)

  async def approaches(i: int, call: dict) -> str:
    if board.approaches:
      raise Misused(f"there are approaches already: {', '.join(board.approaches)}")
    text = await ask("approaches", approaches_template, i, count=str(max_approaches))
    for n, approach in enumerate(verdicts.approaches(text, max_approaches), 1):
      board.approaches[f"A{n}"] = approach
    listed = (f"{name}: {approach}" for name, approach in board.approaches.items())
    return "\n\n".join(listed) or "It brought no approach."

  async def fresh(i: int, call: dict) -> str:
    if board.fresh == max_solutions:
      raise Misused(f"there were {max_solutions} fresh solutions already: improve or merge them")
    approach = call.get("approach")
    if approach is not None and (not isinstance(approach, str) or approach not in board.approaches):
      there = ", ".join(board.approaches) or "none yet"
      raise Misused(f"there is no such approach; there are: {there}")
    board.fresh += 1
    if approach is None:
      return board.add(await calls.proof(generate, problem, turn_seed(seed, "generate", i)))
    return board.add(await ask("solve", approach_template, i, approach=board.approaches[approach]))

  async def verify(i: int, call: dict) -> str:
    proof = board.solution(call.get("solution"))
    report = await ask("verify", verify_template, i, proof=verdicts.quote(proof))
    if report:
      board.reports.setdefault(call["solution"], []).append(report)
    return report or "It brought no report."

  async def improve(i: int, call: dict) -> str:
    proof = board.solution(call.get("solution"))
    report = "\n\n".join(board.reports.get(call["solution"], ())) or "There is no report yet."
    return board.add(await ask("improve", improve_template, i, proof=proof, report=report))

  def several(call: dict) -> list[str]:
    names = call.get("solutions")
    if not isinstance(names, list) or len(names) < 2:
      raise Misused('"solutions" must be a list of two names or more')
    return [board.solution(name) for name in names]

  async def merge(i: int, call: dict) -> str:
    solutions = verdicts.numbered(several(call))
    return board.add(await ask("merge", merge_template, i, solutions=solutions))

  async def choose(i: int, call: dict) -> str:
    proofs, how = several(call), {"template": select_template, "sampling": sampling}
    return call["solutions"][await select(calls, problem, proofs, seed, i, **how)]

  async def submit(i: int, call: dict) -> str:
    board.submitted = board.solution(call.get("solution"))
    return "Submitted."

  tools = {
    "approaches": approaches,
    "solve": fresh,
    "verify": verify,
    "improve": improve,
    "merge": merge,
    "select": choose,
    "submit": submit,
  }
  values = {"calls": str(max_calls), "fresh": str(max_solutions)}
  messages = [user(render(plan_template, problem=problem.statement, **values))]
  for i in range(max_calls + 1):
    completion = await calls.ask("plan", messages, seed, i, sampling=sampling)
    if completion is None:
      break
    said = answer_of(completion)
    call = verdicts.tool_call(said)
    name = call.get("tool") if call else None
    try:
      if not isinstance(name, str) or name not in tools:
        raise Misused(f"one call of a tool is needed: {', '.join(tools)}")
      if i >= max_calls and name != "submit":
        raise Misused("only submit is left")
      result = await tools[name](i, call)
    except Misused as error:
      result = f"That call cannot be made: {error}."
    if board.submitted:
      return calls.solution(problem, board.submitted)
    if i == max_calls - 1:
      result = f"{result}\n\n{REMINDER}"
    messages = [*messages, assistant(said), user(result)]
  proof = list(board.solutions.values())[-1] if board.solutions else ""
  proof = proof or await calls.proof(generate, problem, turn_seed(seed, "generate"))
  return calls.solution(problem, proof)
