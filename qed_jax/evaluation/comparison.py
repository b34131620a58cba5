"""Two evaluations beside each other: the paired difference on the problems that both have.

  python -m qed_jax.evaluate compare RUN_A RUN_B

The problems differ far more than the models, and both met the same ones: the difference is taken
problem by problem and the problems are resampled. What only one of them has, and what has no
grade, is counted and left out.
"""

import statistics
from collections.abc import Sequence

from qed_jax import estimates
from qed_jax.evaluation.summary import TOP, samples_of


def compare(a: Sequence[dict], b: Sequence[dict], *, turn: int, seed: int) -> dict:
  """B minus A. turn: which proof of an attempt, 0 the last one.

  {difference, low, high, stderr, a, b, better, equal, worse, n, only_a, only_b, invalid_a,
  invalid_b, by_level, by_category, ...}; scores are of 7, over the n shared problems. Raises
  ValueError, one line, when they share no graded problem.
  """
  a, b = _proofs(a, turn), _proofs(b, turn)
  whole = difference(a, b, seed)
  if whole["n"] == 0:
    raise ValueError(
      "the two runs share no problem that has a grade in both: are they of one benchmark? "
      f"(A: {_only(a, 'benchmark')}; B: {_only(b, 'benchmark')})"
    )
  found = {
    "turn": turn or "last",
    **{f"{name}_{side}": _only(rows, name) for name in ("model", "scaffold", "judge", "benchmark")
       for side, rows in (("a", a), ("b", b))},
    **whole,
  }  # fmt: skip
  for field in ("level", "category"):
    names = sorted({row[field] for row in (*a, *b)}, key=lambda name: (len(name), name))
    parts = [([r for r in a if r[field] == x], [r for r in b if r[field] == x]) for x in names]
    found[f"by_{field}"] = [
      {field: x, **difference(*part, seed)} for x, part in zip(names, parts, strict=True)
    ]
  return found


def difference(a: Sequence[dict], b: Sequence[dict], seed: int) -> dict:
  """B minus A over the problems with a grade in both."""
  scores_a, scores_b = samples_of(a), samples_of(b)
  ids_a, ids_b = ({row["problem_id"] for row in rows} for rows in (a, b))
  shared = sorted(scores_a.keys() & scores_b.keys())
  means = [(statistics.fmean(scores_a[x]), statistics.fmean(scores_b[x])) for x in shared]
  each = [second - first for first, second in means]
  found = dict.fromkeys(("difference", "low", "high", "stderr", "a", "b"))
  if each:
    names = ("difference", "low", "high")
    found |= dict(zip(names, estimates.bootstrap(each, seed), strict=True))
    found["stderr"] = estimates.standard_error(each)
    found["a"], found["b"] = (statistics.fmean(column) for column in zip(*means, strict=True))
  return found | {
    "n": len(shared),
    "better": sum(x > 0 for x in each),
    "equal": sum(x == 0 for x in each),
    "worse": sum(x < 0 for x in each),
    "only_a": len(ids_a - ids_b),
    "only_b": len(ids_b - ids_a),
    "invalid_a": sum(row["score"] is None for row in a),
    "invalid_b": sum(row["score"] is None for row in b),
  }


def _proofs(rows: Sequence[dict], turn: int) -> list[dict]:
  found = [row for row in rows if row["turn"] == (turn or row["turns"])]
  if not found:
    raise ValueError(f"no row has turn {turn}: the runs have 1 to {max(r['turn'] for r in rows)}")
  return found


def _only(rows: Sequence[dict], name: str) -> str:
  return ", ".join(sorted({row[name] for row in rows}))


def table(found: dict) -> str:
  """The comparison as text for a terminal."""
  lines = [
    f"A: {found['model_a']}, {found['scaffold_a']}, judged by {found['judge_a']}",
    f"B: {found['model_b']}, {found['scaffold_b']}, judged by {found['judge_b']}",
  ]
  for name, what in (("judge", "judges"), ("benchmark", "benchmarks")):
    if found[f"{name}_a"] != found[f"{name}_b"]:
      lines.append(f"careful: the {what} differ, so the difference is not the models' alone")
  lines.append(
    f"B - A, mean score of {TOP} on shared problems, 95 % interval (turn {found['turn']})"
  )
  lines.append(_entry("all", found))
  for field in ("level", "category"):
    entries = found[f"by_{field}"]
    if len(entries) > 1:
      lines += [_entry(f"{field} {entry[field] or '(none)'}", entry) for entry in entries]
  return "\n".join(lines)


def _entry(name: str, e: dict) -> str:
  counts = f"n={e['n']} only A={e['only_a']} only B={e['only_b']}"
  counts += f" invalid A={e['invalid_a']} B={e['invalid_b']}"
  if e["difference"] is None:
    return f"  {name:<18} no shared grade  {counts}"
  return (
    f"  {name:<18} {e['difference']:+.2f} [{e['low']:+.2f}, {e['high']:+.2f}] "
    f"({e['a']:.2f} to {e['b']:.2f}; better {e['better']}, equal {e['equal']}, "
    f"worse {e['worse']})  {counts}"
  )
