"""The window of open work: bounded lag without dropping anything, however long the work takes."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax.rollout.streaming import Window


def simulate(steps, per_step, max_lag, order, duration, seed=0):
  """Runs the loop of Experience on a clock of its own.

  duration(rng, number) -> (tokens, judge seconds). Each policy update takes a random time, in
  which sampling goes on. Returns per trained piece (number, step, version of its first token) and
  the pieces still open.
  """
  rng = np.random.default_rng(seed)
  window, now, trained = Window(per_step, max_lag, order), 0.0, []
  finishing, started = [], {}
  for step in range(steps):
    for number in window.admit(step):
      started[number] = step
      tokens, judge = duration(rng, number)
      heapq.heappush(finishing, (now + tokens + judge, number))
    while (due := window.due(step)) is None:
      now, number = heapq.heappop(finishing)
      window.finish(number)
    window.take(due)
    trained += [(number, step, started[number]) for number in due]
    now += rng.exponential(5.0)
    while finishing and finishing[0][0] <= now:
      window.finish(heapq.heappop(finishing)[1])
  return trained, window


def heavy_tail(rng, number):
  """Lengths over three orders of magnitude; one judge call in fifty hangs for long."""
  judge = rng.exponential(3.0) if rng.random() > 0.02 else 500.0
  return float(np.exp(rng.normal(2, 1.5))), judge


@pytest.mark.parametrize("order", ["admission", "arrival"])
@pytest.mark.parametrize("max_lag", [0, 1, 5])
def test_ten_thousand_rollouts_keep_the_lag_and_none_is_lost(order, max_lag):
  """Every piece admitted is trained once, in time, or is still open at the end."""
  per_step, steps = 16, 640
  trained, window = simulate(steps, per_step, max_lag, order, heavy_tail)
  assert len(trained) == steps * per_step >= 10_000
  assert all(0 <= step - version <= max_lag for _, step, version in trained)
  numbers = [number for number, _, _ in trained]
  assert len(set(numbers)) == len(numbers)
  admitted = set(numbers) | set(window.open)
  assert admitted == set(range(len(admitted)))
  assert len(window.open) <= max_lag * per_step
  if order == "admission":
    assert numbers == sorted(numbers)


def test_long_work_is_trained_as_often_as_short():
  """Of all that was admitted early enough to be due, everything was trained: no bias by length."""
  lengths = {}

  def duration(rng, number):
    lengths[number], judge = heavy_tail(rng, number)
    return lengths[number], judge

  steps, per_step, max_lag = 400, 8, 3
  trained, _ = simulate(steps, per_step, max_lag, "arrival", duration, seed=1)
  numbers = {number for number, _, _ in trained}
  due = range((steps - 1 - max_lag) * per_step)
  assert numbers >= set(due)
  longest = sorted(due, key=lengths.get)[-50:]
  assert numbers >= set(longest)


def test_arrival_waits_for_less_than_admission_does():
  """With a judge that sometimes hangs, taking what is there makes older tokens but fewer waits."""

  def lags(order):
    return np.mean([s - v for _, s, v in simulate(200, 8, 5, order, heavy_tail, seed=2)[0]])

  trained, _ = simulate(200, 8, 5, "arrival", heavy_tail, seed=2)
  numbers = [number for number, _, _ in trained]
  assert numbers != sorted(numbers)
  assert lags("arrival") <= 5 and lags("admission") <= 5


@settings(max_examples=60, deadline=None)
@given(
  st.integers(1, 6),
  st.integers(0, 4),
  st.sampled_from(["admission", "arrival"]),
  st.lists(st.floats(0.01, 1e4), min_size=1, max_size=20),
  st.integers(0, 2**31),
)
def test_any_durations_keep_the_lag(per_step, max_lag, order, durations, seed):
  """Whatever the work takes, the loop never gets stuck and never trains what is too old."""
  trained, window = simulate(
    30, per_step, max_lag, order, lambda rng, n: (durations[n % len(durations)], 0.0), seed
  )
  assert len(trained) == 30 * per_step
  assert all(0 <= step - version <= max_lag for _, step, version in trained)
  assert set(range(len(trained) + len(window.open))) == {n for n, *_ in trained} | set(window.open)


def test_a_restart_begins_what_was_open_again():
  """Numbers go on where they were; what was open is open under the new version, and in order."""
  window = Window(2, 2, "arrival")
  assert window.admit(0) == [0, 1, 2, 3, 4, 5]
  for number in (1, 3):
    window.finish(number)
  window.take(window.due(0))
  state = window.state()
  assert state == {"next": 6, "open": [0, 2, 4, 5]}
  again = Window(2, 2, "arrival")
  assert again.restore(state, 1) == [0, 2, 4, 5]
  assert again.admit(1) == [6, 7]
  for number in (5, 7, 0, 2, 4, 6):
    again.finish(number)
  assert again.due(1) == [5, 7]


def test_work_that_is_not_open_cannot_finish():
  with pytest.raises(ValueError, match="work 3 is not open"):
    Window(1, 0, "admission").finish(3)
