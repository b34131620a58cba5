"""Grader studies: a judge marks proofs that people have marked.

judge_rows.jsonl has a row a proof, append-only and reused as eval.jsonl is; a proof whose grading
failed has none and is asked for again. judge_summary.json holds estimates.agreement.
"""

from collections.abc import Sequence

from qed_jax import estimates
from qed_jax.evaluation import sources
from qed_jax.evaluation.rows import OUTAGE, Prices, dollars
from qed_jax.records import Grade, GradedProof, Problem

ROWS, SUMMARY = "judge_rows.jsonl", "judge_summary.json"


class Failed(TimeoutError):
  """The judge could not be asked; a kind of failure that attempts.run counts."""


def row(
  proof: GradedProof, proof_id: str, grade: Grade, *, benchmark: str, judge: str, prices: Prices
) -> dict:
  """A graded proof as judge_rows.jsonl holds it."""
  usage, problem = grade.usage, proof.problem
  return {
    "problem_id": problem.id,
    "sample": proof_id,
    "turn": 1,
    "turns": 1,
    "problem": problem.statement,
    "rubric": problem.rubric,
    "reference": problem.solution,
    "level": problem.level,
    "category": problem.category,
    "source": proof.source,
    "proof": proof.proof,
    "human": proof.score,
    "score": grade.score,
    "reason": grade.reason,
    "feedback": grade.feedback,
    "benchmark": benchmark,
    "judge": judge,
    "judge_input_tokens": usage.input_tokens,
    "judge_tokens": usage.output_tokens,
    "judge_calls": usage.calls,
    "judge_seconds": usage.seconds,
    "judge_cost": dollars(
      usage.input_tokens, usage.output_tokens, prices.judge_read, prices.judge_write
    ),
  }


def marker(proofs: dict[str, GradedProof], grade, *, benchmark: str, judge: str, prices: Prices):
  """async (problem, a proof's id) -> rows, for attempts.run. Raises Failed during an outage."""

  async def one(problem: Problem, proof_id: str) -> list[dict]:
    proof = proofs[proof_id]
    given = await grade(problem, proof.proof)
    if given.score is None and given.reason.startswith(OUTAGE):
      raise Failed(given.reason)
    return [row(proof, proof_id, given, benchmark=benchmark, judge=judge, prices=prices)]

  return one


def by_id(proofs: Sequence[GradedProof]) -> dict[str, GradedProof]:
  """Proofs by id; of equal ones the first."""
  found: dict[str, GradedProof] = {}
  for proof in proofs:
    found.setdefault(sources.proof_id(proof), proof)
  return found


def summarise(rows: Sequence[dict], wanted: int, *, label: str, prices: Prices, seed: int) -> dict:
  """A row of judge_summary.json: agreement with people in all, by source and level; `invalid` are
  proofs whose reply held no score, `missing` those that are not graded yet. None without grades."""
  graded = [r for r in rows if r["score"] is not None]
  counts = {"invalid": len(rows) - len(graded), "missing": wanted - len(rows)}
  read, written = (sum(r[name] for r in rows) for name in ("judge_input_tokens", "judge_tokens"))
  confusion = [[0] * 8 for _ in range(8)]
  for r in graded:
    confusion[r["human"]][r["score"]] += 1
  lengths = sorted(r["judge_tokens"] for r in rows)
  found = {
    "label": label,
    "benchmark": ", ".join(sorted({r["benchmark"] for r in rows})),
    "judge": ", ".join(sorted({r["judge"] for r in rows})),
    **counts,
    **_agreement(graded, seed),
    "confusion": confusion,  # [people's score][the judge's score]
    "judge_cost_sum": dollars(read, written, prices.judge_read, prices.judge_write),
    "judge_tokens": written / len(rows) if rows else 0.0,
    "judge_tokens_95": lengths[int(0.95 * (len(lengths) - 1))] if rows else 0,
    "judge_tokens_max": lengths[-1] if rows else 0,
  }
  for field in ("source", "level"):
    found[f"by_{field}"] = []
    for name in sorted({r[field] for r in rows}):
      here = [r for r in rows if r[field] == name]
      part = [r for r in here if r["score"] is not None]
      invalid = len(here) - len(part)
      entry = {field: name, "invalid": invalid, **_agreement(part, seed)}
      found[f"by_{field}"].append(entry)
  return found


def _agreement(rows: Sequence[dict], seed: int) -> dict:
  if not rows:
    return {"proofs": 0, "problems": 0}
  columns = ([r[name] for r in rows] for name in ("score", "human", "problem_id"))
  return estimates.agreement(*columns, seed=seed)


def table(summary: dict) -> str:
  """The summary as text for a terminal."""
  counts = f"invalid={summary['invalid']} missing={summary['missing']}"
  lines = [f"{summary['judge']} beside people's scores on {summary['benchmark']}"]
  if not summary["proofs"]:
    return "\n".join([*lines, f"  no grade  {counts}"])
  lines.append(f"  {summary['proofs']} proofs of {summary['problems']} problems, {counts}")
  for name in ("mae", "bias", "accuracy", "exact", "within_1", "advantage_difference"):
    if entry := summary[name]:
      interval = f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
      lines.append(f"  {name:<21} {interval}")
  for name in ("rmse", "tau_b", "tau_b_within", "ordered_alike"):
    value = summary[name]
    lines.append(f"  {name:<21} {'not defined' if value is None else format(value, '.3f')}")
  if summary["constant"] is not None:
    lines.append(
      f"  careful: the judge gave {summary['constant']} to every proof: it tells nothing apart"
    )
  return "\n".join(lines)
