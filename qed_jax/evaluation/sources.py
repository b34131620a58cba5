"""What is evaluated on: problems to solve, and proofs that people graded."""

import hashlib

from qed_jax.data import benchmarks, rows, tiny_world
from qed_jax.records import GradedProof, Problem
from qed_jax.rollout.jobs import TINY_WORLD

NEEDS = {"rubric": "rubric", "answer": "answer", "exact": "rubric"}


def problems(block, judge, seed: int) -> list[Problem]:
  """The first `block.problems` of a benchmark; of the tiny world, that many different ones.

  block: the config's source, revision, split, max_bad_share, problems. Raises ValueError, one line,
  when the source cannot be read, or when the judge has nothing to mark any of them by.
  """
  if block.source == TINY_WORLD:
    drawn = tiny_world.problems(seed, 2 * block.problems, block.split)
    return list({problem.id: problem for problem in drawn}.values())[: block.problems]
  found, report = benchmarks.load(block.source, **_where(block))
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

  Raises ValueError, one line, when the source cannot be read.
  """
  found, report = benchmarks.load_graded(block.source, **_where(block))
  _name_bad(report)
  return found[: block.problems]


def _where(block) -> dict:
  return {name: block[name] for name in ("revision", "split", "max_bad_share")}


def proof_id(proof: GradedProof) -> str:
  """16 hex digits of what the judge sees of it."""
  seen = "\0".join([proof.problem.id, proof.problem.statement, proof.proof])
  return hashlib.sha256(seen.encode("utf-8", "replace")).hexdigest()[:16]


def _name_bad(report: rows.Report) -> None:
  for fault in report.repaired:
    print(f"repaired {fault}", flush=True)
  for bad in report.bad[: rows.NAMED]:
    print(f"skipped {bad}", flush=True)
  if report.bad:
    print(f"{len(report.bad)} of {report.read} rows are bad and were skipped", flush=True)
