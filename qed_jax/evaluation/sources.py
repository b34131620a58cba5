"""What is evaluated on: problems to solve, and proofs that people graded."""

import hashlib

from qed_jax.data import problems as problem_files
from qed_jax.data import rows, tiny_world
from qed_jax.records import GradedProof, Problem
from qed_jax.rollout.jobs import TINY_WORLD

# Column names of the proof and of people's score, beside those of a Problem.
PROOF = ("proof", "model_solution", "response", "student_answer")
SCORE = ("human", "expert_rating", "score", "points", "grade")
NEEDS = {"rubric": "rubric", "answer": "answer", "exact": "rubric"}


def problems(block, judge, seed: int) -> list[Problem]:
  """The first `block.problems` of a benchmark; of the tiny world, that many different ones.

  block: the config's source, revision, split, max_bad_share, problems. Raises ValueError, one line,
  when the source cannot be read, or when the judge has nothing to mark any of them by.
  """
  if block.source == TINY_WORLD:
    drawn = tiny_world.problems(seed, 2 * block.problems, block.split)
    return list({problem.id: problem for problem in drawn}.values())[: block.problems]
  found, report = problem_files.load(
    block.source,
    revision=block.revision,
    config="default",
    split=block.split,
    require=(),
    reward_range=None,
    max_bad_share=block.max_bad_share,
  )
  _name_bad(report)
  need = NEEDS[judge.reward]
  lacking = [problem.id for problem in found if not getattr(problem, need)]
  if len(lacking) == len(found):
    raise ValueError(
      f"no problem of {block.source} has a {need}, by which reward {judge.reward!r} of the judge "
      "marks: set another judge.reward, or look at the names of the columns"
    )
  if lacking:
    print(f"left out {len(lacking)} problems without a {need}, the first {lacking[0]}", flush=True)
  found = [problem for problem in found if getattr(problem, need)]
  return found[: block.problems]


def graded(block) -> list[GradedProof]:
  """The first `block.problems` proofs with a score that people gave them.

  Rows have a problem's columns, a proof and a score (PROOF, SCORE); a score that is no whole number
  of 0..7 makes a bad row. Raises ValueError, one line, when the source cannot be read.
  """
  found, report = rows.load(
    block.source,
    _graded_row,
    revision=block.revision,
    config="default",
    split=block.split,
    max_bad_share=block.max_bad_share,
  )
  _name_bad(report)
  return found[: block.problems]


def _graded_row(row: rows.Row) -> GradedProof:
  problem = problem_files.from_row(row, require=())
  name = next((name for name in SCORE if row.get(name) is not None), SCORE[0])
  score = rows.number(row, name)
  if score not in range(8):
    raise ValueError(f"{name} is {score:g}, not a whole number from 0 to 7")
  return GradedProof(problem, rows.text(row, PROOF, required=True), int(score), problem.source)


def proof_id(proof: GradedProof) -> str:
  """16 hex digits of what the judge sees of it."""
  seen = "\0".join([proof.problem.id, proof.problem.statement, proof.proof])
  return hashlib.sha256(seen.encode("utf-8", "replace")).hexdigest()[:16]


def _name_bad(report: rows.Report) -> None:
  for bad in report.bad[: rows.NAMED]:
    print(f"skipped {bad}", flush=True)
  if report.bad:
    print(f"{len(report.bad)} of {report.read} rows are bad and were skipped", flush=True)
