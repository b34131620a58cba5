"""Figures from scores: means and how sure they are, pass@k, the agreement of judges with people.

Scores come in problems, and the samples of a problem are alike. So a problem is what is resampled,
with all its samples: their mean already holds what differs between samples, and to resample them
as well would count that twice. Pure functions of numbers; a score that is missing is left out by
whoever calls, and counted there.
"""

import functools
import math
from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
REMEMBERED = 512  # values whose draws are kept: 41 MB


def bootstrap(values, seed: int = 0) -> tuple[float, float, float]:
  """(mean, low, high): the percentile bootstrap's 95 % interval of the mean of independent values.

  values: one number per problem (average the samples of a problem first, they are not independent).
  Raises ValueError when there is none.
  """
  values_I = np.asarray(values, float)
  if values_I.size == 0:
    raise ValueError("no values to take the mean of: every grade is missing")
  means = _resampled(values_I, seed) / values_I.size
  low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return float(values_I.mean()), float(low), float(high)


def bootstrap_ratio(sums, counts, seed: int = 0) -> tuple[float, float, float]:
  """(sum of sums / sum of counts, low, high): the mean of values that come in unequal clusters.

  sums, counts: of each cluster, the sum of its values and how many they are (above 0).
  """
  sums_I, counts_I = np.asarray(sums, float), np.asarray(counts, float)
  if sums_I.size == 0:
    raise ValueError("no values to take the mean of: every grade is missing")
  ratios = _resampled(sums_I, seed) / _resampled(counts_I, seed)
  low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return float(sums_I.sum() / counts_I.sum()), float(low), float(high)


def _resampled(values_I, seed: int):
  """[RESAMPLES] sums of `values_I` drawn anew, as many as they are."""
  size, rng = len(values_I), np.random.default_rng(seed)
  if size <= REMEMBERED:
    return _draws(size, seed) @ values_I
  sums = [values_I[rng.integers(0, size, size)].sum() for _ in range(RESAMPLES)]
  return np.array(sums)


@functools.lru_cache(maxsize=3)  # a summary asks for the same ones again and again
def _draws(size: int, seed: int):
  """[RESAMPLES, size]: how often each value is drawn, as floats for a product."""
  rng = np.random.default_rng(seed)
  index = rng.integers(0, size, (RESAMPLES, size)) + size * np.arange(RESAMPLES)[:, None]
  counts = np.bincount(index.ravel(), minlength=RESAMPLES * size)
  return counts.astype(float).reshape(RESAMPLES, size)


def standard_error(values) -> float | None:
  """Of the mean of independent values, one a problem; None for fewer than two."""
  values_I = np.asarray(values, float)
  if values_I.size < 2:
    return None
  return float(values_I.std(ddof=1) / math.sqrt(values_I.size))


def standard_error_of_runs(samples: Sequence[Sequence[float]]) -> float | None:
  """How far the mean moves when the same problems are sampled again.

  samples: the scores of each problem. A problem with one sample gets the variance that the others
  have on average; None when no problem has two.
  """
  within = within_variance(samples)
  if within is None:
    return None
  each = [np.var(s, ddof=1) if len(s) > 1 else within for s in samples]
  total = sum(variance / len(s) for variance, s in zip(each, samples, strict=True))
  return float(math.sqrt(total) / len(samples))


def within_variance(samples: Sequence[Sequence[float]]) -> float | None:
  """The variance of samples of one problem, pooled over the problems; None without two samples."""
  freedom = sum(len(s) - 1 for s in samples)
  if freedom == 0:
    return None
  return float(sum((len(s) - 1) * np.var(s, ddof=1) for s in samples if len(s) > 1) / freedom)


def between_variance(samples: Sequence[Sequence[float]]) -> float | None:
  """The variance of the problems' true means: what the samples' noise leaves of the means' own.

  With within_variance it says what more samples can bring: a mean over P problems with n samples
  has the variance (between + within / n) / P. None for one problem or without two samples.
  """
  within = within_variance(samples)
  if within is None or len(samples) < 2:
    return None
  means = np.var([np.mean(s) for s in samples], ddof=1)
  noise = within * np.mean([1 / len(s) for s in samples])
  return float(max(0.0, means - noise))


def pass_at_k(n: int, correct: int, k: int) -> float:
  """The chance that k of n samples, drawn without replacement, hold a correct one (unbiased).

  Source: "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), equation 1.
  Raises ValueError unless 0 <= correct <= n and 1 <= k <= n.
  """
  if not (0 <= correct <= n and 1 <= k <= n):
    raise ValueError(f"pass@{k} of {correct} correct among {n} samples: k must be 1 to {n}")
  if n - correct < k:
    return 1.0
  return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


# --- judges


def tau_b(x, y) -> float | None:
  """Kendall's tau-b of two lists of scores, ties corrected; None where all of one are equal."""
  x_I, y_I = np.asarray(x, np.int16), np.asarray(y, np.int16)
  concordant = untied_x = untied_y = 0
  for i in range(1, len(x_I)):  # row by row: a square of 5,000 proofs would be 25 MB a copy
    dx, dy = np.sign(x_I[:i] - x_I[i]), np.sign(y_I[:i] - y_I[i])
    concordant += int(np.sum(dx * dy))
    untied_x += int(np.count_nonzero(dx))
    untied_y += int(np.count_nonzero(dy))
  if not (untied_x and untied_y):
    return None
  return concordant / math.sqrt(untied_x * untied_y)


def bucket(score: int) -> int:
  """The four classes of a 0-7 score: nothing, partial (1-3), much (4-6), complete (7)."""
  return 0 if score == 0 else 1 if score <= 3 else 2 if score <= 6 else 3


def agreement(
  judge: Sequence[int], human: Sequence[int], problem: Sequence[Hashable], seed: int = 0
) -> dict:
  """How a judge's scores (0..7) agree with people's; `problem` says whose attempts are compared.

  mae, bias (judge minus human), accuracy (the same of four classes, `bucket`), exact, within_1: as
  {"value", "low", "high"} with a 95 % interval over problems; rmse; tau_b over all proofs, and
  tau_b_within, its mean over the problems where it is defined (their number in tau_b_problems).
  advantage_difference: mean over problems of mean |(g - mean g) - (r - mean r)|, QED-Nano's
  measure (eval/scripts/stats.py): RL learns from differences within a problem alone; problems with
  one proof tell nothing of it and are left out (advantage_problems: how many told). ordered_alike:
  of the pairs of proofs of one problem that people scored differently (pairs), the share that the
  judge orders the same way; a tie of the judge's is not the same way.
  constant: the one score that the judge gave to everything, else None.
  """
  g_I, r_I = np.asarray(judge, float), np.asarray(human, float)
  if g_I.size == 0:
    raise ValueError("no proof has a judge's and a human score: there is nothing to compare")
  groups: dict[Hashable, list[int]] = {}
  for i, name in enumerate(problem):
    groups.setdefault(name, []).append(i)
  clusters = [np.array(index) for index in groups.values()]
  error_I = g_I - r_I
  same = np.array([bucket(int(g)) == bucket(int(r)) for g, r in zip(g_I, r_I, strict=True)])

  def mean(values_I) -> dict:
    value, low, high = bootstrap_ratio(
      [values_I[c].sum() for c in clusters], [len(c) for c in clusters], seed
    )
    return {"value": value, "low": low, "high": high}

  taus = [t for c in clusters if (t := tau_b(g_I[c], r_I[c])) is not None]
  several = [c for c in clusters if len(c) > 1]
  advantages = [float(np.mean(np.abs(error_I[c] - error_I[c].mean()))) for c in several]
  alike, pairs = _ordered_alike(g_I, r_I, several)
  advantage = dict(zip(("value", "low", "high"), bootstrap(advantages, seed), strict=True)) if (
    advantages
  ) else None  # fmt: skip
  return {
    "proofs": int(g_I.size),
    "problems": len(clusters),
    "mae": mean(np.abs(error_I)),
    "bias": mean(error_I),
    "accuracy": mean(same.astype(float)),
    "exact": mean((error_I == 0).astype(float)),
    "within_1": mean((np.abs(error_I) <= 1).astype(float)),
    "rmse": float(math.sqrt(np.mean(error_I**2))),
    "tau_b": tau_b(g_I, r_I),
    "tau_b_within": float(np.mean(taus)) if taus else None,
    "tau_b_problems": len(taus),
    "advantage_difference": advantage,
    "advantage_problems": len(several),
    "ordered_alike": alike / pairs if pairs else None,
    "pairs": pairs,
    "constant": int(g_I[0]) if len(set(g_I.tolist())) == 1 else None,
  }


def _ordered_alike(g_I, r_I, clusters) -> tuple[int, int]:
  alike = pairs = 0
  for c in clusters:
    dg, dr = (np.sign(v[c][:, None] - v[c][None, :]) for v in (g_I, r_I))
    upper = np.triu(dr != 0, 1)
    pairs += int(upper.sum())
    alike += int((upper & (dg == dr)).sum())
  return alike, pairs
