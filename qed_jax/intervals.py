"""Means with bootstrap intervals."""

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def bootstrap(values, seed: int = 0) -> tuple[float, float, float]:
  """(mean, low, high): the percentile bootstrap's 95 % interval of the mean of independent values.

  values: one number per problem (average the samples of a problem first, they are not independent).
  Raises ValueError when there is none.
  """
  values_I = np.asarray(values, float)
  if values_I.size == 0:
    raise ValueError("no values to take the mean of: every grade is missing")
  rng = np.random.default_rng(seed)
  means = np.empty(RESAMPLES)
  at_once = max(1, 2**22 // values_I.size)
  for start in range(0, RESAMPLES, at_once):
    count = min(at_once, RESAMPLES - start)
    index = rng.integers(0, values_I.size, (count, values_I.size))
    means[start : start + count] = values_I[index].mean(axis=1)
  low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return float(values_I.mean()), float(low), float(high)
