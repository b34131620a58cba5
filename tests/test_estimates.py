"""Estimates against closed forms, enumeration, simulation and scipy."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax import estimates

SCORES = st.integers(0, 7)


def draw(rng, problems: int, samples: int, between: float, within: float):
  """Scores of a benchmark: deviations between its problems, and within one."""
  means = rng.normal(3.5, between, problems)
  return [rng.normal(m, within, samples) for m in means]


@pytest.mark.parametrize("samples", [1, 4])
def test_the_interval_covers_the_mean_as_often_as_it_says(samples):
  """Of 300 benchmarks of 60 problems, resampled by problem, 95 % intervals hold the mean 90-99 %,
  also where a problem's samples are alike."""
  rng = np.random.default_rng(0)
  held = 0
  for seed in range(300):
    values = [s.mean() for s in draw(rng, 60, samples, 2.0, 1.0)]
    _, low, high = estimates.bootstrap(values, seed)
    held += low <= 3.5 <= high
  assert 0.90 <= held / 300 <= 0.99


def test_samples_taken_for_independent_would_not_cover():
  """What the clustering is for: as 960 values, 60 x 16 samples hold the mean far too seldom."""
  rng = np.random.default_rng(1)
  held = 0
  for seed in range(40):
    values = np.concatenate(draw(rng, 60, 16, 2.0, 1.0))
    _, low, high = estimates.bootstrap(values, seed)
    held += low <= 3.5 <= high
  assert held / 40 < 0.75


def test_intervals_of_unequal_clusters_cover():
  """The mean over values of clusters of 1 to 9: the ratio of sums, resampled by cluster."""
  rng = np.random.default_rng(2)
  held = 0
  for seed in range(200):
    sizes = rng.integers(1, 10, 50)
    clusters = [rng.normal(rng.normal(1.0, 1.0), 0.5, n) for n in sizes]
    mean, low, high = estimates.bootstrap_ratio([c.sum() for c in clusters], sizes, seed)
    assert mean == pytest.approx(np.concatenate(clusters).mean())
    held += low <= 1.0 <= high
  assert 0.88 <= held / 200 <= 0.99


@pytest.mark.parametrize("between, within, n", [(2.0, 1.0, 3), (0.5, 2.0, 8), (1.5, 1.5, 1)])
def test_standard_errors_are_the_deviations_of_repeated_evaluations(between, within, n):
  """Over new problems: sqrt((between^2 + within^2 / n) / P). Over new runs of the same problems:
  sqrt(within^2 / n / P). Both from one evaluation, on average over 400 of them."""
  rng, problems = np.random.default_rng(3), 40
  found = [draw(rng, problems, n, between, within) for _ in range(400)]
  expected = math.sqrt((between**2 + within**2 / n) / problems)
  squares = [estimates.standard_error([s.mean() for s in samples]) ** 2 for samples in found]
  assert math.sqrt(np.mean(squares)) == pytest.approx(expected, rel=0.03)
  if n == 1:
    assert estimates.standard_error_of_runs(found[0]) is None
    assert estimates.between_variance(found[0]) is None
    return
  runs = [estimates.standard_error_of_runs(samples) ** 2 for samples in found]
  assert math.sqrt(np.mean(runs)) == pytest.approx(within / math.sqrt(n * problems), rel=0.03)
  assert np.mean([estimates.within_variance(s) for s in found]) == pytest.approx(
    within**2, rel=0.03
  )
  apart = np.mean([estimates.between_variance(s) for s in found])
  assert apart == pytest.approx(between**2, rel=0.12)


def test_a_lone_sample_has_the_variance_of_the_others():
  full = estimates.standard_error_of_runs([[0.0, 2.0], [0.0, 2.0]])
  assert full == pytest.approx(math.sqrt(2 * 2 / 2) / 2)
  lone = estimates.standard_error_of_runs([[0.0, 2.0], [5.0]])
  assert lone == pytest.approx(math.sqrt(2 / 2 + 2 / 1) / 2)


def test_edges():
  assert estimates.bootstrap([4.0] * 9) == (4.0, 4.0, 4.0)
  assert estimates.standard_error([1.0]) is None
  for of_nothing in (lambda: estimates.bootstrap([]), lambda: estimates.bootstrap_ratio([], [])):
    with pytest.raises(ValueError, match="every grade is missing"):
      of_nothing()
  with pytest.raises(ValueError, match="nothing to compare"):
    estimates.agreement([], [], [])


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_one(n):
  for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
    draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    expected = sum(any(d) for d in draws) / len(draws)
    assert estimates.pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.data())
def test_pass_at_k_is_a_probability_that_grows(n, data):
  correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
  p = estimates.pass_at_k(n, correct, k)
  assert 0 <= p <= 1 and (p == 0) == (correct == 0)
  if k < n:
    assert estimates.pass_at_k(n, correct, k + 1) >= p
  if correct < n:
    assert estimates.pass_at_k(n, correct + 1, k) >= p


@pytest.mark.parametrize("n, correct, k", [(3, 4, 1), (3, 1, 4), (3, 1, 0), (0, 0, 1), (3, -1, 1)])
def test_pass_at_k_refuses_the_impossible(n, correct, k):
  with pytest.raises(ValueError, match="k must be"):
    estimates.pass_at_k(n, correct, k)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=40))
def test_tau_b_is_scipys(pairs):
  x, y = zip(*pairs, strict=True)
  expected = scipy.stats.kendalltau(x, y).statistic if len(x) > 1 else math.nan
  found = estimates.tau_b(x, y)
  if found is None:
    assert math.isnan(expected)
  else:
    assert found == pytest.approx(expected, abs=1e-12)


def advantage_difference(judge, human, problem):
  """The definition, word by word."""
  per_problem = []
  for name in dict.fromkeys(problem):
    g = [a for a, p in zip(judge, problem, strict=True) if p == name]
    r = [a for a, p in zip(human, problem, strict=True) if p == name]
    if len(g) > 1:
      centre_g, centre_r = sum(g) / len(g), sum(r) / len(r)
      each = [abs((a - centre_g) - (b - centre_r)) for a, b in zip(g, r, strict=True)]
      per_problem.append(sum(each) / len(each))
  return sum(per_problem) / len(per_problem) if per_problem else None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(SCORES, SCORES, st.integers(0, 3)), min_size=1, max_size=15))
def test_agreement_is_what_its_definitions_say(rows):
  judge, human, problem = zip(*rows, strict=True)
  found = estimates.agreement(judge, human, problem)
  off = [g - r for g, r in zip(judge, human, strict=True)]
  assert found["mae"]["value"] == pytest.approx(sum(map(abs, off)) / len(off))
  assert found["bias"]["value"] == pytest.approx(sum(off) / len(off))
  assert found["exact"]["value"] == pytest.approx(off.count(0) / len(off))
  classes = [{0}, {1, 2, 3}, {4, 5, 6}, {7}]
  same = [any({g, r} <= c for c in classes) for g, r in zip(judge, human, strict=True)]
  assert found["accuracy"]["value"] == pytest.approx(sum(same) / len(same))
  expected = advantage_difference(judge, human, problem)
  if expected is None:
    assert found["advantage_difference"] is None and found["advantage_problems"] == 0
  else:
    assert found["advantage_difference"]["value"] == pytest.approx(expected)
  pairs = [
    ((judge[i] - judge[j]), (human[i] - human[j]))
    for i, j in itertools.combinations(range(len(rows)), 2)
    if problem[i] == problem[j] and human[i] != human[j]
  ]
  assert found["pairs"] == len(pairs)
  if pairs:
    alike = sum(a * b > 0 for a, b in pairs) / len(pairs)
    assert found["ordered_alike"] == pytest.approx(alike)


def test_a_judge_that_always_says_seven_is_seen_through():
  """It orders nothing, its tau is not defined, and the constant is named."""
  found = estimates.agreement([7] * 6, [0, 7, 1, 7, 0, 3], ["a", "a", "a", "b", "b", "b"])
  assert found["constant"] == 7 and found["tau_b"] is None and found["ordered_alike"] == 0
  assert found["bias"]["value"] == pytest.approx(7 - 18 / 6)
  exact = estimates.agreement([0, 7, 3], [0, 7, 3], ["a", "a", "a"])
  assert exact["constant"] is None and exact["mae"]["value"] == 0 and exact["tau_b"] == 1.0
