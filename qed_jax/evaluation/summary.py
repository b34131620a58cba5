"""What the rows of an evaluation say: scores with errors, by turn, budget, level and category.

A score is the mean over problems of the mean over a problem's graded samples, 0..7. An attempt
without a grade is left out of it and counted as invalid, one without a row as missing; both counts
stand in every part. Where the original differs (eval/scripts/stats.py): it counts the first as
zeros in one table and skips them in another, calls 5 points correct in one and 6 in the other, and
takes an empty answer for a truncated one.
"""

import collections
import statistics
from collections.abc import Iterable, Sequence

from qed_jax import estimates
from qed_jax.evaluation.rows import Prices, dollars
from qed_jax.records import Problem

TOP = 7
BUDGETS = 8  # points of the curve of score by tokens


def summarise(
  rows: Sequence[dict],
  problems: Sequence[Problem],
  samples: int,
  *,
  label: str,
  prices: Prices,
  pass_score: int,
  seed: int,
) -> dict:
  """A row of eval_summary.json. rows: all turns; those of other problems or samples are passed
  over. pass_score: from which score on a proof counts as correct in pass@k."""
  wanted = {(problem.id, sample) for problem in problems for sample in range(samples)}
  rows = [row for row in rows if (row["problem_id"], row["sample"]) in wanted]
  turns = max((row["turns"] for row in rows), default=1)
  by_turn = [[r for r in rows if r["turn"] == turn] for turn in range(1, turns + 1)] or [[]]
  first, last = by_turn[0], [row for row in rows if row["turn"] == row["turns"]]
  groups = {
    "by_level": ("level", _names(problems, "level")),
    "by_category": ("category", _names(problems, "category")),
  }

  def part(rows: Sequence[dict], among: Sequence[Problem]) -> dict:
    return score(rows, among, samples, seed)

  def by(field: str, names: Iterable[str]) -> list[dict]:
    found = []
    for name in names:
      among = [p for p in problems if getattr(p, field) == name]
      inside = {p.id for p in among}
      here, before = ([r for r in x if r["problem_id"] in inside] for x in (last, first))
      found.append({field: name, **part(here, among), "single_pass": part(before, among)})
    return found

  whole = part(last, problems)
  labels = {name: _only(rows, name) for name in ("benchmark", "scaffold", "model", "judge")}
  levels = by(*groups["by_level"])
  return {
    "label": label,
    **labels,
    "turns": turns,
    "samples": samples,
    **whole,
    **runs(last, problems, samples),
    "pass_at_k": pass_at_k(last, samples, pass_score, seed),
    "single_pass": part(first, problems),
    "by_turn": [
      {"turn": turn, "tokens": _mean(_so_far(rows, turn)), **part(here, problems)}
      for turn, here in enumerate(by_turn, 1)
    ],
    "by_budget": by_budget(rows, problems, samples, seed),
    "by_level": levels,
    "by_length": [{"length": entry["level"], **entry} for entry in levels],
    "by_category": by(*groups["by_category"]),
    **spending(rows, prices),
  }


def score(rows: Sequence[dict], problems: Sequence[Problem], samples: int, seed: int) -> dict:
  """{score, percent, low, high, stderr, stderr_runs, n, graded, invalid, missing} of rows that hold
  at most one proof a (problem, sample) pair. n: problems with a grade; None where there is none.

  stderr: over problems, what another draw of problems and samples would move; stderr_runs: over
  runs on these problems.
  """
  scores = samples_of(rows)
  counts = {
    "n": len(scores),
    "graded": sum(map(len, scores.values())),
    "invalid": sum(row["score"] is None for row in rows),
    "missing": len(problems) * samples - len(rows),
  }
  names = ("score", "percent", "low", "high", "stderr", "stderr_runs")
  if not scores:
    return dict.fromkeys(names) | counts
  means = [statistics.fmean(values) for values in scores.values()]
  mean, low, high = estimates.bootstrap(means, seed)
  errors = estimates.standard_error(means), estimates.standard_error_of_runs([*scores.values()])
  return dict(zip(names, (mean, 100 * mean / TOP, low, high, *errors), strict=True)) | counts


def samples_of(rows: Iterable[dict]) -> dict[str, list[int]]:
  """Problem -> the scores that its samples got."""
  scores = collections.defaultdict(list)
  for row in rows:
    if row["score"] is not None:
      scores[row["problem_id"]].append(row["score"])
  return dict(scores)


def runs(rows: Sequence[dict], problems: Sequence[Problem], samples: int) -> dict:
  """Sample k of every problem as run k: {"run_means", "run_std"}, the published "(std)" in points
  of 7, with n - 1. Runs without any grade are left out; None for fewer than two."""
  of_run = collections.defaultdict(list)
  for row in rows:
    if row["score"] is not None:
      of_run[row["sample"]].append(row["score"])
  means = [statistics.fmean(of_run[k]) for k in sorted(of_run)]
  return {"run_means": means, "run_std": statistics.stdev(means) if len(means) > 1 else None}


def pass_at_k(rows: Sequence[dict], samples: int, pass_score: int, seed: int) -> list[dict]:
  """pass@k for k = 1, 2, 4, ... and n: {k, from_score, score, low, high, n, left_out}; left_out:
  problems with fewer than k graded samples, which can say nothing of it."""
  scores = samples_of(rows)
  ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
  found = []
  for k in ks:
    chances = [
      estimates.pass_at_k(len(s), sum(x >= pass_score for x in s), k)
      for s in scores.values()
      if len(s) >= k
    ]
    entry = {"k": k, "from_score": pass_score, "score": None, "low": None, "high": None}
    if chances:
      values = estimates.bootstrap(chances, seed)
      entry |= dict(zip(("score", "low", "high"), values, strict=True))
    found.append(entry | {"n": len(chances), "left_out": len(scores) - len(chances)})
  return found


def by_budget(
  rows: Sequence[dict], problems: Sequence[Problem], samples: int, seed: int
) -> list[dict]:
  """Score of the last proof that was there after so many tokens were written, for tokens in equal
  ratios up to the longest attempt. An attempt that has no proof by then has 0 points, as one that
  is cut has; how many these are is `unfinished`."""
  attempts = collections.defaultdict(list)
  for row in sorted(rows, key=lambda r: r["turn"]):
    so_far = attempts[row["problem_id"], row["sample"]]
    before = so_far[-1][0] + so_far[-1][1]["summary_tokens"] if so_far else 0
    so_far.append((before + row["tokens"], row))
  if not attempts:
    return []
  least = max(1, min(turns[0][0] for turns in attempts.values()))
  most = max(least, *(turns[-1][0] for turns in attempts.values()))
  steps = {round(least * (most / least) ** (i / (BUDGETS - 1))) for i in range(BUDGETS)} | {most}
  found = []
  for tokens in sorted(steps):
    here, unfinished = [], 0
    for turns in attempts.values():
      reached = [row for end, row in turns if end <= tokens]
      unfinished += not reached
      here.append(reached[-1] if reached else turns[0][1] | {"score": 0})
    part = score(here, problems, samples, seed)
    found.append({"tokens": tokens, **part, "unfinished": unfinished})
  return found


def spending(rows: Sequence[dict], prices: Prices) -> dict:
  """Tokens, calls, cost and cut shares. Cost is at the prices given, not at those of the rows."""
  attempts = {(row["problem_id"], row["sample"]) for row in rows}
  total = lambda name: sum(row[name] for row in rows)  # noqa: E731
  written = total("tokens") + total("summary_tokens")
  each = lambda value: value / len(attempts) if attempts else 0.0  # noqa: E731
  correct = collections.defaultdict(list)
  for row in rows:
    if row["score"] is not None:
      correct["correct" if row["score"] == TOP else "incorrect"].append(row["tokens"])
  cost = dollars(total("input_tokens"), written, prices.read, prices.write)
  judge_cost = dollars(
    total("judge_input_tokens"), total("judge_tokens"), prices.judge_read, prices.judge_write
  )
  stages: dict[str, collections.Counter] = {}
  for row in rows:
    for stage, spent in row["stages"].items():
      stages.setdefault(stage, collections.Counter()).update(spent)
  return {
    "truncated": sum(row["finish_reason"] == "length" for row in rows) / max(len(rows), 1),
    "no_proof": sum(not row["proof"].strip() for row in rows),
    "tokens_per_turn": written / max(len(rows), 1),
    "tokens": each(written),
    "tokens_sum": written,
    "input_tokens": each(total("input_tokens")),
    "tokens_correct": _mean(correct["correct"]),
    "tokens_incorrect": _mean(correct["incorrect"]),
    "calls": each(total("calls")),
    "depth": _mean([max(v) for v in _grouped(rows, "depth").values()]),
    "seconds": each(total("seconds")),
    "cost": each(cost),
    "cost_sum": cost,
    "judge_cost_sum": judge_cost,
    "judge_tokens_sum": total("judge_tokens"),
    "stages": {name: dict(counts) for name, counts in stages.items()},
  }


def _grouped(rows: Iterable[dict], name: str) -> dict[tuple, list]:
  """Pair -> the rows' values."""
  found = collections.defaultdict(list)
  for row in rows:
    found[row["problem_id"], row["sample"]].append(row[name])
  return found


def _so_far(rows: Sequence[dict], turn: int) -> list[int]:
  """Tokens of each attempt when it had the proof of this turn."""
  spent = collections.Counter()
  for row in rows:
    if row["turn"] <= turn:
      own = row["tokens"] + row["summary_tokens"] * (row["turn"] < turn)
      spent[row["problem_id"], row["sample"]] += own
  return [*spent.values()]


def _mean(values: Sequence[float]) -> float | None:
  return statistics.fmean(values) if values else None


def _names(problems: Sequence[Problem], field: str) -> list[str]:
  return sorted({getattr(p, field) for p in problems}, key=lambda name: (len(name), name))


def _only(rows: Sequence[dict], name: str) -> str:
  return ", ".join(sorted({row[name] for row in rows}))


# --- text


def table(summary: dict) -> str:
  """The summary as text for a terminal; every line says what is invalid and missing in it."""
  lines = [
    f"{summary['label']} on {summary['benchmark']}, {summary['scaffold']}, judged by "
    f"{summary['judge']}: mean score of 7, 95 % interval",
    _entry("all", summary),
  ]
  turns, levels, categories = (summary[name] for name in ("by_turn", "by_level", "by_category"))
  if len(turns) > 1:
    lines += [_entry(f"turn {entry['turn']}", entry) for entry in turns]
  for entries, field in ((levels, "level"), (categories, "category")):
    if len(entries) > 1:
      lines += [_entry(f"{field} {entry[field] or '(none)'}", entry) for entry in entries]
  if summary["samples"] > 1:
    passed = [
      f"pass@{e['k']} {_number(e['score'], '.3f')}" + f" ({e['left_out']} left out)" * e["left_out"]
      for e in summary["pass_at_k"]
    ]
    lines.append(f"  {', '.join(passed)}; {_deviation(summary)}")
  lines.append(
    f"  {summary['tokens']:,.0f} tokens an attempt, {summary['calls']:.1f} calls, "
    f"{100 * summary['truncated']:.1f} % truncated, ${summary['cost']:.4f} (judge "
    f"${summary['judge_cost_sum']:.2f} in all)"
  )
  return "\n".join(lines)


def _entry(name: str, entry: dict) -> str:
  counts = f"n={entry['n']} invalid={entry['invalid']} missing={entry['missing']}"
  if entry["score"] is None:
    return f"  {name:<18} no grade  {counts}"
  error = _number(entry["stderr"], ".2f")
  return (
    f"  {name:<18} {entry['score']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}] "
    f"{entry['percent']:5.1f} %  +-{error}  {counts}"
  )


def _deviation(summary: dict) -> str:
  if summary["run_std"] is None:
    return "one run"
  percent = 100 * summary["run_std"] / TOP
  return f"{len(summary['run_means'])} runs with a deviation of {percent:.1f} points of 100"


def _number(value: float | None, how: str) -> str:
  return "?" if value is None else format(value, how)
