"""A solution and its grades as rows of eval.jsonl: one for every graded proof.

The reasoning cache has a proof a turn, other scaffolds one. Tokens, calls, seconds and cost of a
row are those of its turn, so that sums over rows count every model call once; calls that belong to
no turn are the last row's.
"""

import dataclasses
from collections.abc import Sequence

from qed_jax.records import Call, Grade, Problem, Solution
from qed_jax.scaffolds.proof import split_proof

MARKING = ("engine", "style", "template", "votes", "aggregate")  # what grades depend on
OUTAGE = "failed"  # how the reason of a grade begins that may yet be had


@dataclasses.dataclass(frozen=True)
class Labels:
  """What was run on what, and who marked it."""

  benchmark: str
  scaffold: str
  model: str
  judge: str


@dataclasses.dataclass(frozen=True)
class Prices:
  """US dollars per million tokens: of the policy's, and of the judge's."""

  read: float
  write: float
  judge_read: float
  judge_write: float


def rows_of(
  sample: int, solution: Solution, grades: Sequence[Grade], labels: Labels, prices: Prices
) -> list[dict]:
  """A row for each of proofs(solution), with its grade."""
  own = [
    [call for call in solution.calls if id(call.completion) in _completions(turn)]
    for turn in solution.turns
  ] or [[]]
  known = {id(call) for calls in own for call in calls}
  own[-1] += [call for call in solution.calls if id(call) not in known]
  parts = [_turn(turn) for turn in solution.turns] or [_whole(solution)]
  return [
    {
      "problem_id": solution.problem.id,
      **_statement(solution.problem),
      "sample": sample,
      **part,
      **_grade(grade, prices),
      **_spent(calls, prices),
      "turns": len(parts),
      **dataclasses.asdict(labels),
    }
    for part, grade, calls in zip(parts, grades, own, strict=True)
  ]


def proofs(solution: Solution) -> list[str]:
  """What is graded: the proof of every turn, or the one proof."""
  return [turn.proof for turn in solution.turns] or [solution.proof]


def regraded(row: dict, grade: Grade, prices: Prices) -> dict:
  """The row with another grade; what the judge was paid before stays counted."""
  new = _grade(grade, prices)
  spent = ("judge_input_tokens", "judge_tokens", "judge_calls", "judge_seconds", "judge_cost")
  return row | new | {name: row[name] + new[name] for name in spent}


def problem_of(row: dict) -> Problem:
  """The problem that a row is about."""
  return Problem(
    id=row["problem_id"],
    statement=row["problem"],
    rubric=row["rubric"],
    answer=row["answer"],
    solution=row["reference"],
    level=row["level"],
    category=row["category"],
  )


def judge_name(judge) -> str:
  """Who marks, as rows name it; grades of two of these are not comparable."""
  if judge.reward != "rubric":
    return {"answer": "math-verify", "exact": "exact"}[judge.reward]
  how = [f"{name} {judge[name]}" for name in MARKING if judge.get(name)]
  effort = f" {judge.reasoning_effort}" if judge.reasoning_effort else ""
  return ", ".join([f"{judge.model}{effort}", *how])


def _statement(problem: Problem) -> dict:
  return {
    "problem": problem.statement,
    "rubric": problem.rubric,
    "reference": problem.solution,
    "answer": problem.answer,
    "level": problem.level,
    "category": problem.category,
  }


def _completions(turn) -> set[int]:
  """The turn's one or two completions, by identity: they hold arrays."""
  return {id(turn.completion), id(turn.summary_completion)}


def _turn(turn) -> dict:
  written = turn.summary_completion
  return {
    "turn": turn.index,
    "summary": turn.summary_before,
    "reasoning": split_proof(turn.completion.text)[0],
    "proof": turn.proof,
    "finish_reason": turn.completion.finish_reason,
    "tokens": turn.completion.usage.output_tokens,
    "summary_tokens": written.usage.output_tokens if written else 0,
  }


def _whole(solution: Solution) -> dict:
  """A scaffold without turns: the reasoning is that of the call that wrote the proof."""
  authors = [c for c in solution.calls if solution.proof and solution.proof in c.completion.text]
  last = (authors or list(solution.calls))[-1].completion if solution.calls else None
  return {
    "turn": 1,
    "summary": "",
    "reasoning": split_proof(last.text)[0] if last else "",
    "proof": solution.proof,
    "finish_reason": last.finish_reason if last else "stop",
    "tokens": sum(call.completion.usage.output_tokens for call in solution.calls),
    "summary_tokens": 0,
  }


def _grade(grade: Grade, prices: Prices) -> dict:
  usage = grade.usage
  return {
    "score": grade.score,
    "reason": grade.reason,
    "feedback": grade.feedback,
    "judge_input_tokens": usage.input_tokens,
    "judge_tokens": usage.output_tokens,
    "judge_calls": usage.calls,
    "judge_seconds": usage.seconds,
    "judge_cost": dollars(
      usage.input_tokens, usage.output_tokens, prices.judge_read, prices.judge_write
    ),
  }


def _spent(calls: Sequence[Call], prices: Prices) -> dict:
  """Sums over calls; seconds are the models', and calls side by side count each."""
  usages = [call.completion.usage for call in calls]
  read, written = sum(u.input_tokens for u in usages), sum(u.output_tokens for u in usages)
  stages: dict[str, dict] = {}
  for call in calls:
    stage = stages.setdefault(call.stage, {"calls": 0, "input_tokens": 0, "tokens": 0, "cut": 0})
    stage["calls"] += 1
    stage["input_tokens"] += call.completion.usage.input_tokens
    stage["tokens"] += call.completion.usage.output_tokens
    stage["cut"] += call.completion.finish_reason == "length"
  return {
    "input_tokens": read,
    "calls": len(calls),
    "depth": max((call.depth for call in calls), default=0),
    "seconds": sum(u.seconds for u in usages),
    "cost": dollars(read, written, prices.read, prices.write),
    "stages": stages,
  }


def dollars(read: int, written: int, read_price: float, write_price: float) -> float:
  """Tokens at prices per million."""
  return (read * read_price + written * write_price) / 1e6
