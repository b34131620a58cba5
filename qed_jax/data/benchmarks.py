"""Benchmarks and other sets of problems -> Problem, and proofs that people graded -> GradedProof.

Read by their columns, whatever file or hub dataset they are in: FineProofs-SFT, -RL and -RL-test,
ProofBench, IMO-ProofBench, IMO-AnswerBench, IMO-GradingBench, MathArena's problem sets and outputs,
and any JSONL, CSV or Parquet file with a column for the statement.

Two faults of published files are mended and told in the report: the row of answerbench_v2.csv in
which a missing quote glues the answer to the statement (superhuman issue 13), and answers whose
last formula has no closing "$".
"""

import math
import pathlib
import re

from qed_jax import records
from qed_jax.data import problems, rows

SCORES = range(8)
# The text that was graded, the points it got, and who wrote it. GradingBench, ProofBench, ours,
# MathArena, in whose outputs "answer" is the model's text.
PROOF = ("Response", "model_solution", "proof", "model_proof", "answer")
POINTS = ("Points", "expert_rating", "human_score", "score", "points")
AUTHOR = ("generator", "model_name", "model", "Problem Source", "source")
_JUDGE = re.compile(r"points_judge_\d+")
# A statement that ends with ',answer"', as a CSV reader sees it when the quote before the comma is
# missing.
_GLUED = re.compile(r"(?P<statement>.*?)\s*,(?P<answer>\$[^\n]*\$)\"", re.DOTALL)


def load(
  source: str | pathlib.Path, *, revision: str | None, split: str, max_bad_share: float
) -> tuple[list[records.Problem], rows.Report]:
  """The different problems of a file, folder or hub dataset at a revision, in file order.

  split: which files of a folder or hub dataset. A problem that comes again, as in sets with several
  proofs a problem, is filtered; an id that comes again with another statement is a bad row, for
  which see rows.load, as for the ValueErrors that this raises.
  """
  seen: dict[str, str] = {}

  def parse(row: rows.Row) -> records.Problem | None:
    problem = problems.from_row(_reference_only(row), require=())
    if problem.id not in seen:
      seen[problem.id] = problem.statement
      return problem
    if seen[problem.id] != problem.statement:
      raise ValueError(f"has the id {problem.id!r} of an earlier row with another statement")
    return None

  return rows.load(
    source,
    parse,
    revision=revision,
    config="default",
    split=split,
    max_bad_share=max_bad_share,
    repair=repair,
  )


def load_graded(
  source: str | pathlib.Path, *, revision: str | None, split: str, max_bad_share: float
) -> tuple[list[records.GradedProof], rows.Report]:
  """Proofs with the whole points (0..7) that people gave: GradingBench, ProofBench, MathArena, and
  files with the columns `problem`, `proof` and `score`.

  Where two people graded, the score is their mean, halves rounded down. A row without a grade or
  with an empty proof is filtered; other scales than 0..7 are bad rows. Raises ValueError as
  rows.load does.
  """

  def parse(row: rows.Row) -> records.GradedProof | None:
    score = _points(row)
    proof = rows.text(row, PROOF, required=False).rpartition("</think>")[2].strip()
    problem = problems.from_row(_reference_only(row), require=())
    if score is None or not proof:
      return None
    return records.GradedProof(problem, proof, score, rows.text(row, AUTHOR, required=False))

  return rows.load(
    source,
    parse,
    revision=revision,
    config="default",
    split=split,
    max_bad_share=max_bad_share,
    repair=repair,
  )


def repair(row: rows.Row | rows.Ragged) -> tuple[rows.Row, str] | None:
  """The row without the known faults of published files, and what they were; None: it has none."""
  if isinstance(row, rows.Ragged):
    match = _GLUED.fullmatch(row.fields[1]) if len(row.fields) > 1 else None
    if len(row.fields) != len(row.header) - 1 or not match:
      return None
    fields = [row.fields[0], match["statement"], match["answer"], *row.fields[2:]]
    return dict(zip(row.header, fields, strict=True)), "the answer was glued to the statement"
  for name in problems.COLUMNS["answer"]:
    answer = row.get(name)
    if isinstance(answer, str) and _is_open(answer):
      return {**row, name: answer.rstrip() + "$"}, f"{name} had no closing $: {answer[-40:]!r}"
  return None


def _is_open(answer: str) -> bool:
  """Whether the last "$" of an answer begins a formula (with a command in it) and none ends it."""
  parts = re.split(r"(?<!\\)\$", answer)
  return len(parts) % 2 == 0 and "\\" in parts[-1] and len(answer) < 1000


def _reference_only(row: rows.Row) -> rows.Row:
  """The row without the proof that was graded, which must not pass for the final answer."""
  if any(_JUDGE.fullmatch(str(name)) for name in row):
    return {name: value for name, value in row.items() if name != "answer"}
  return row


def _points(row: rows.Row) -> int | None:
  """The score of a row, or None where nobody graded. Raises ValueError(why) off the scale."""
  judges = sorted(name for name in row if _JUDGE.fullmatch(str(name)))
  names = judges or [name for name in POINTS if name in row][:1]
  if not names:
    raise ValueError(
      f"no score among its columns ({', '.join(map(str, row))}): rename it to one of "
      f"{', '.join(POINTS)}"
    )
  given = []
  for name in names:
    value = row[name]
    if value in (None, "") or (isinstance(value, float) and math.isnan(value)):
      continue
    points = rows.number(row, name)
    best = row.get("max_" + name)
    if best not in (None, "") and rows.number(row, "max_" + name) != SCORES[-1]:
      raise ValueError(f"max_{name} is {best!r}: scores have to be out of {SCORES[-1]}")
    if not 0 <= points <= SCORES[-1] or (not judges and points != int(points)):
      raise ValueError(
        f"{name} is {value!r}, not one of 0 to 7: bring the scores to the seven-point scale"
      )
    given.append(points)
  return math.floor(sum(given) / len(given)) if given else None
