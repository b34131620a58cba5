"""Rows with problem statements -> Problem: FineProofs-RL, its test set, and files like them."""

import hashlib
import pathlib

from qed_jax import records
from qed_jax.data import marking_scheme, rows

# Column names by field, the published FineProofs name first, then those of the proof benchmarks.
COLUMNS = {
  "id": ("id", "problem_id", "Problem ID"),
  "statement": ("problem", "Problem", "statement", "question", "task"),
  "rubric": ("rubrics", "rubric", "grading_scheme", "marking_scheme", "grading_guidelines")
  + ("Grading guidelines", "schema"),
  "answer": ("answer", "final_answer", "short_answer", "Short Answer"),
  "solution": ("solution", "reference_solution", "Solution", "sample_solution"),
  "source": ("source", "Source", "Problem Source", "competition", "dataset"),
  "level": ("level", "Level", "difficulty"),
  "category": ("category", "Category", "problem_type"),
}


def load(
  path_or_hub_id: str | pathlib.Path,
  *,
  revision: str | None,
  config: str,
  split: str,
  require: tuple[str, ...],
  reward_range: tuple[float, float] | None,
  max_bad_share: float,
) -> tuple[list[records.Problem], rows.Report]:
  """Problems of a Parquet, JSONL, JSON or CSV file, a folder, or a hub dataset at a revision.

  require: fields of Problem that must not be empty beside the statement, e.g. ("rubric",).
  reward_range: (low, high), keeps the rows whose reward_mean lies in it, ends included.
  A row is bad when a required field is missing, empty, NaN or not text, or when its id was seen
  before. Raises ValueError as rows.load does.
  """
  unknown = sorted(set(require) - COLUMNS.keys())
  if unknown:
    raise ValueError(f"require names {unknown[0]!r}; a Problem has {', '.join(COLUMNS)}")
  seen: set[str] = set()

  def parse(row: rows.Row) -> records.Problem | None:
    problem = from_row(row, require=require)
    if problem.id in seen:
      raise ValueError(f"has the id {problem.id!r} of an earlier row")
    seen.add(problem.id)
    if reward_range is not None:
      low, high = reward_range
      if not low <= rows.number(row, "reward_mean") <= high:
        return None
    return problem

  return rows.load(
    path_or_hub_id,
    parse,
    revision=revision,
    config=config,
    split=split,
    max_bad_share=max_bad_share,
  )


def from_row(row: rows.Row, *, require: tuple[str, ...]) -> records.Problem:
  """One row -> Problem; its id is a hash of the statement unless the row has one.

  A marking scheme or category may be a list, as MathArena has it. Raises ValueError(why) on a bad
  row, also when the items of such a scheme do not add up to 7 points.
  """
  if not any(name in row for name in COLUMNS["statement"]):
    raise ValueError(
      f"problem is missing among its columns ({', '.join(map(str, row))}): rename the statement's "
      f"column to one of {', '.join(COLUMNS['statement'])}"
    )
  row = _with_text(row)
  values = {
    field: rows.text(row, names, required=field == "statement" or field in require)
    for field, names in COLUMNS.items()
  }
  return records.Problem(**values | {"id": values["id"] or statement_id(values["statement"])})


def _with_text(row: rows.Row) -> rows.Row:
  """The row with structured marking schemes and lists of categories written out."""
  changed = {}
  for name in COLUMNS["rubric"]:
    if (items := marking_scheme.items_of(row.get(name))) is not None:
      changed[name] = marking_scheme.from_items(items)
  for name in COLUMNS["category"]:
    value = row.get(name)
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
      changed[name] = ", ".join(value)
  return {**row, **changed} if changed else row


def statement_id(statement: str) -> str:
  """16 hex digits of the statement's SHA-256: the same on every machine and in every file."""
  return hashlib.sha256(statement.strip().encode()).hexdigest()[:16]
