"""Three problems of a run with all their turns, for readers without scripts."""

from qed_jax.reporting import reading
from qed_jax.reporting.attempts import Library, Row, statement_of
from qed_jax.reporting.figures import short
from qed_jax.reporting.reading import clean, number

MOST_COLUMNS = 8
NARROW_LINE = 26  # characters; columns of such lines may be narrow
KINDS = {
  "Summary so far": lambda r: r.get("summary_before", r.get("summary")),
  "Reasoning": lambda r: r.get("reasoning"),
  "Proof": lambda r: r.get("proof"),
  "Summary written": lambda r: r.get("summary_after"),
  "Grader's words": lambda r: r.get("feedback") or r.get("reason"),
}


def of(library: Library) -> list[tuple[str, list[dict]]]:
  """(title, examples) of every run; of training those of the last step."""
  groups = []
  for run in library.runs:
    attempts, title = list(run.attempts.values()), run.label
    steps = [rows[-1].step for rows in attempts if run.training and rows[-1].step is not None]
    if steps:
      attempts = [rows for rows in attempts if rows[-1].step == max(steps)]
      title = f"{title}, step {max(steps):g}"
    picked = pick(attempts).items()
    shown = [
      example(place, [reading.read_row(run.path, row.at) for row in turns])
      for place, turns in picked
    ]
    groups.append((title, shown))
  return [(title, shown) for title, shown in groups if shown]


def pick(attempts: list[list[Row]]) -> dict[str, list[Row]]:
  """By rule: the best last grade (of equals, the largest gain over the turns), the median, the
  worst."""

  def merit(rows: list[Row]):
    first, last = (-1.0 if row.score is None else row.score for row in (rows[0], rows[-1]))
    return last, last - first

  ranked = sorted(attempts, key=merit, reverse=True)
  places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
  chosen = {place: name for name, place in reversed(places.items()) if ranked}
  return {chosen[place]: ranked[place] for place in sorted(chosen)}


def badge(row: dict) -> dict:
  """A grade as shown: "6 of 7" and the name of its colour; no score is no zero."""
  score = number(row.get("score"))
  if score is None:
    return {"text": "not graded", "kind": "none"}
  kind = "low" if score < 2.5 else "middle" if score < 5.5 else "high"
  return {"text": f"{score:g} of 7" if 0 <= score <= 7 else f"{score:g}", "kind": kind}


def example(title: str, rows: list[dict]) -> dict:
  """A problem and its turns, a column each; a row of the table that is empty drops out."""
  problem = rows[0].get("problem")
  inner = problem if isinstance(problem, dict) else {}
  statement = clean(statement_of(rows[0]))
  prompt = rows[0].get("messages")
  messages = [m for m in prompt if isinstance(m, dict)] if isinstance(prompt, list) else []
  columns = rows[:MOST_COLUMNS]
  cells = {kind: [clean(text_of(r)) for r in columns] for kind, text_of in KINDS.items()}
  longest = max(len(line) for texts in cells.values() for t in texts for line in t.split("\n"))
  return {
    "title": title,
    "statement": statement,
    "short": short(statement, 70),
    "rubric": clean(inner.get("rubric") or rows[0].get("rubric")),
    "messages": [(clean(m.get("role")), clean(m.get("content"))) for m in messages],
    "columns": [
      {
        "title": f"Turn {clean(r.get('turn'))}" if r.get("turn") is not None else "Answer",
        "cut": r.get("finish_reason") == "length",
        "badge": badge(r),
      }
      for r in columns
    ],
    "narrow": longest < NARROW_LINE,
    "left_out": len(rows) - len(columns),
    "cells": [(kind, texts) for kind, texts in cells.items() if any(texts)],
  }
