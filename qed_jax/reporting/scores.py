"""Figures from graded proofs: by benchmark, by turn and tokens, paired, and judges beside people.

A proof that could not be graded is in no mean; it is counted beside it. Intervals are bootstraps
over problems, whose samples are averaged first.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from qed_jax import estimates
from qed_jax.reporting.attempts import Library, Row, Run

MOST_PAIRED = 8  # runs that are compared with one another, each with each
LEVELS = range(8)  # grades


def means(rows: Iterable[tuple[int, Row]]) -> dict[int, float]:
  """{problem: mean score of its graded proofs}."""
  scores = defaultdict(list)
  for problem, row in rows:
    if row.score is not None:
      scores[problem].append(row.score)
  return {problem: sum(found) / len(found) for problem, found in scores.items()}


def estimate(values: Sequence[float]) -> dict:
  """score, low, high; {} without values."""
  ends = zip(("score", "low", "high"), estimates.bootstrap(values), strict=True) if values else ()
  return dict(ends)


def by_benchmark(run: Run, library: Library) -> list[dict]:
  """Last turns by benchmark: score [0..7] with interval, problems, proofs, and those not graded."""
  rows = defaultdict(list)
  for problem, row in run.last():
    rows[library.problems[problem].benchmark].append((problem, row))
  return [
    {
      "run": run.label,
      "benchmark": benchmark,
      "problems": len({problem for problem, _ in found}),
      "proofs": len(found),
      "invalid": sum(row.score is None for _, row in found),
      "cut": sum(row.cut for _, row in found) / len(found),
      "tokens": tokens_of(run, benchmark, library),
      **estimate(list(means(found).values())),
    }
    for benchmark, found in sorted(rows.items())
  ]


def tokens_of(run: Run, benchmark: str, library: Library) -> float:
  """Mean tokens of an attempt, all its turns together."""
  totals = [
    sum(row.tokens for row in rows)
    for (problem, _), rows in run.attempts.items()
    if library.problems[problem].benchmark == benchmark
  ]
  return sum(totals) / len(totals)


def by_turn(run: Run) -> list[dict]:
  """After each turn: score with interval, and mean tokens of an attempt up to there."""
  rows, tokens = defaultdict(list), defaultdict(list)
  for (problem, _), turns in run.attempts.items():
    for row, total in zip(turns, itertools.accumulate(r.tokens for r in turns), strict=True):
      rows[row.turn].append((problem, row))
      tokens[row.turn].append(total)
  points = []
  for turn in sorted(rows):
    if found := estimate(list(means(rows[turn]).values())):
      points.append({"turn": turn, "tokens": sum(tokens[turn]) / len(tokens[turn]), **found})
  return points


def paired(a: Run, b: Run) -> dict | None:
  """Mean difference b - a over the problems that both have graded; None where there is none."""
  first, second = means(a.last()), means(b.last())
  common = sorted(first.keys() & second.keys())
  if not common:
    return None
  differences = [second[problem] - first[problem] for problem in common]
  signs = Counter(np.sign(differences).tolist())
  return {
    "a": a.label,
    "b": b.label,
    "problems": len(common),
    "alone": len(first.keys() ^ second.keys()),
    "better": signs[1.0],
    "equal": signs[0.0],
    "worse": signs[-1.0],
    **estimate(differences),
  }


def pairs(runs: Sequence[Run], notes: list[str]) -> list[dict]:
  """Paired differences of the evaluated runs, each with each."""
  runs = [run for run in runs if not run.training]
  if len(runs) > MOST_PAIRED:
    notes.append(f"Paired differences are of the first {MOST_PAIRED} of {len(runs)} runs.")
  found = (paired(a, b) for a, b in itertools.combinations(runs[:MOST_PAIRED], 2))
  return [pair for pair in found if pair]


def calibration(run: Run) -> dict | None:
  """The judge beside people: how far apart they are, and how often it gave which grade for theirs.

  mae, bias (judge - people) in points of 7; exact, near: shares of equal grades, and of grades at
  most one apart. counts: [people's grade, judge's grade]. None where people graded nothing.
  """
  rows = [row for turns in run.attempts.values() for row in turns if row.human is not None]
  if not rows:
    return None
  both = [(row.human, row.score) for row in rows if row.score is not None]
  errors = np.array([judge - human for human, judge in both])
  counts = np.zeros((len(LEVELS), len(LEVELS)), int)
  for human, judge in both:
    if round(human) in LEVELS and round(judge) in LEVELS:
      counts[round(human), round(judge)] += 1
  by_human = defaultdict(list)
  for human, judge in both:
    by_human[human].append(judge)
  return {
    "run": run.label,
    "n": len(both),
    "invalid": len(rows) - len(both),
    "mae": float(abs(errors).mean()) if both else None,
    "bias": float(errors.mean()) if both else None,
    "exact": float((errors == 0).mean()) if both else None,
    "near": float((abs(errors) <= 1).mean()) if both else None,
    "counts": counts.tolist(),
    "curve": [{"human": human, **estimate(judges)} for human, judges in sorted(by_human.items())],
  }
