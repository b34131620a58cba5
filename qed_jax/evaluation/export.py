"""Rows in the column names of QED-Nano's evaluation (eval/scripts/run.py and eval.py).

  python -m qed_jax.evaluate export RUN OUT.jsonl

A row for the last proof of every attempt. Its statistics take a file for a run, so `--sample=0`
and so on write the samples one by one.
"""

from collections.abc import Sequence


def columns(rows: Sequence[dict], sample: int | None) -> list[dict]:
  """rows: all turns of eval.jsonl. sample: the one to take, None for all.

  score and grade are null where there is no grade. cost_run sums over the turns of an attempt.
  """
  attempts: dict[tuple, list[dict]] = {}
  for row in rows:
    if sample in (None, row["sample"]):
      attempts.setdefault((row["problem_id"], row["sample"]), []).append(row)
  return [_attempt(sorted(turns, key=lambda r: r["turn"])) for turns in attempts.values()]


def _attempt(turns: list[dict]) -> dict:
  last = turns[-1]
  total = lambda *names: sum(turn[name] for turn in turns for name in names)  # noqa: E731
  history = [{"role": "user", "type": "text", "content": last["problem"]}]
  for turn in turns:
    history.append({"role": "assistant", "type": "cot", "content": turn["reasoning"]})
    history.append({"role": "assistant", "type": "response", "content": turn["proof"]})
  graded = last["score"] is not None
  return {
    "problem_id": last["problem_id"],
    "problem": last["problem"],
    "solution": last["reference"],
    "answer": last["answer"],
    "grading_guidelines": last["rubric"],
    "grading_scheme": last["rubric"],
    "level": last["level"],
    "category": last["category"],
    "sample": last["sample"],
    "model_solution": last["proof"],
    "history": history,
    "cost_run": {
      "cost": total("cost"),
      "input_tokens": total("input_tokens"),
      "output_tokens": total("tokens", "summary_tokens"),
      "time": total("seconds"),
    },
    "schema_0": [{"title": "Proof", "points": 7, "desc": last["rubric"]}],
    "grade": [{"points": last["score"], "desc": last["feedback"]}] if graded else None,
    "grade_cost": {
      "cost": total("judge_cost"),
      "input_tokens": total("judge_input_tokens"),
      "output_tokens": total("judge_tokens"),
      "time": total("judge_seconds"),
    },
    "score": last["score"],
    "model": last["model"],
    "grader": last["judge"],
  }
