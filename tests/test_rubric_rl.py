"""Rewards, group advantages and token weights: hand arithmetic, and properties of any group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax import objectives
from qed_jax.objectives import rubric_rl

advantages = jax.jit(rubric_rl.advantages, static_argnames=("baseline", "normalize_std"))
weights = jax.jit(rubric_rl.weights, static_argnames=("normalizer", "overlong_filter"))
PLAIN = {"baseline": "mean", "normalize_std": False}


def test_rewards_keep_failures_apart_from_zeros():
  """Score 7 of 7 is 1, 0 is 0 and valid, None is not valid."""
  reward_PA, valid_PA = rubric_rl.rewards([[7, 0, None]], max_score=7)
  np.testing.assert_array_equal(reward_PA, [[1, 0, 0]])
  np.testing.assert_array_equal(valid_PA, [[True, True, False]])
  with pytest.raises(ValueError, match="score 8 is outside 0..7"):
    rubric_rl.rewards([[8]], max_score=7)
  with pytest.raises(ValueError, match=r"groups have \[1, 2\] attempts"):
    rubric_rl.rewards([[1], [1, 2]], max_score=7)


def test_advantages_by_hand():
  """Three groups: one plain, one with a failed grade, one all equal."""
  reward_PA, valid_PA = rubric_rl.rewards(
    [[7, 0, 0, 7], [7, None, 0, 0], [3, 3, 3, 3]], max_score=7
  )
  advantage_PA, metrics = advantages(reward_PA, valid_PA, **PLAIN)
  expected = [[0.5, -0.5, -0.5, 0.5], [2 / 3, 0, -1 / 3, -1 / 3], [0, 0, 0, 0]]
  np.testing.assert_allclose(advantage_PA, expected, rtol=1e-6)
  means = objectives.finalise(metrics)
  np.testing.assert_allclose(means["reward"], (2 + 1 + 12 / 7) / 11, rtol=1e-6)
  np.testing.assert_allclose(means["dead_group_share"], 1 / 3)
  np.testing.assert_allclose(means["invalid_share"], 1 / 12)


def test_leave_one_out_compares_with_the_others():
  """Reward minus the mean of the other valid rewards."""
  reward_PA, valid_PA = rubric_rl.rewards([[7, None, 0, 0]], max_score=7)
  advantage_PA, _ = advantages(reward_PA, valid_PA, baseline="leave_one_out", normalize_std=False)
  np.testing.assert_allclose(advantage_PA, [[1, 0, -0.5, -0.5]], rtol=1e-6)


def test_normalising_divides_by_the_sample_deviation():
  """numpy's std with ddof 1, over the valid members, plus 1e-4."""
  reward_PA, valid_PA = rubric_rl.rewards([[7, 3, None, 1]], max_score=7)
  advantage_PA, _ = advantages(reward_PA, valid_PA, baseline="mean", normalize_std=True)
  members = np.array([7, 3, 1]) / 7
  expected = (members - members.mean()) / (members.std(ddof=1) + 1e-4)
  np.testing.assert_allclose(advantage_PA[0, [0, 1, 3]], expected, rtol=1e-5)
  assert advantage_PA[0, 2] == 0


@pytest.mark.parametrize("baseline", rubric_rl.BASELINES)
@pytest.mark.parametrize("normalize_std", [False, True])
def test_dead_groups_are_exactly_zero(baseline, normalize_std):
  """Equal rewards whose float32 mean rounds away from them, one valid member, and none."""
  scores = [[5] * 7, [5, None, None, None, None, None, None], [None] * 7]
  reward_PA, valid_PA = rubric_rl.rewards(scores, max_score=7)
  assert reward_PA[0, 0] != reward_PA[0].sum(dtype=np.float32) / np.float32(7)
  advantage_PA, metrics = advantages(
    reward_PA, valid_PA, baseline=baseline, normalize_std=normalize_std
  )
  np.testing.assert_array_equal(advantage_PA, np.zeros((3, 7)))
  assert objectives.finalise(metrics)["dead_group_share"] == 1


grades = st.lists(
  st.lists(st.one_of(st.none(), st.integers(0, 7)), min_size=4, max_size=4), min_size=3, max_size=3
)


@settings(deadline=None, max_examples=40)
@given(scores=grades, fill=st.floats(-1e6, 1e6, width=32), order=st.permutations(range(4)))
def test_advantages_of_any_group(scores, fill, order):
  """They sum to 0, follow a permutation, and do not see what an invalid reward holds."""
  reward_PA, valid_PA = rubric_rl.rewards(scores, max_score=7)
  advantage_PA = np.asarray(advantages(reward_PA, valid_PA, **PLAIN)[0])
  np.testing.assert_allclose(advantage_PA.sum(axis=1), 0, atol=1e-6)
  assert np.all(advantage_PA[~valid_PA] == 0)
  permuted, _ = advantages(reward_PA[:, order], valid_PA[:, order], **PLAIN)
  np.testing.assert_allclose(permuted, advantage_PA[:, order], atol=1e-6)
  filled, _ = advantages(np.where(valid_PA, reward_PA, np.float32(fill)), valid_PA, **PLAIN)
  np.testing.assert_array_equal(filled, advantage_PA)


LENGTHS = np.array([[10, 20, 30], [5, 5, 100]])
VALID = np.array([[True, True, True], [True, True, False]])
TRUNCATED = np.array([[False, False, True], [False, False, True]])


@pytest.mark.parametrize(
  ("normalizer", "expected"),
  [
    ("rollouts", [[1 / 5, 1 / 5, 1 / 5], [1 / 5, 1 / 5, 0]]),
    ("group_tokens", [[1 / 20, 1 / 20, 1 / 20], [1 / 5, 1 / 5, 0]]),
    ("tokens", [[1 / 70, 1 / 70, 1 / 70], [1 / 70, 1 / 70, 0]]),
  ],
)
def test_weights_by_hand(normalizer, expected):
  """Five graded rollouts of 60 + 10 tokens; the sixth was not graded and counts nowhere."""
  weight_PA = weights(LENGTHS, VALID, TRUNCATED, normalizer=normalizer, overlong_filter=False)
  np.testing.assert_allclose(weight_PA, expected, rtol=1e-6)
  filtered_PA = weights(LENGTHS, VALID, TRUNCATED, normalizer=normalizer, overlong_filter=True)
  np.testing.assert_allclose(filtered_PA, np.where(TRUNCATED, 0, expected), rtol=1e-6)


@pytest.mark.parametrize("normalizer", rubric_rl.NORMALIZERS)
def test_weights_when_nothing_was_graded(normalizer):
  """An outage of the judge for a whole step gives weights 0, not NaN."""
  weight_PA = weights(
    LENGTHS, np.zeros_like(VALID), TRUNCATED, normalizer=normalizer, overlong_filter=False
  )
  np.testing.assert_array_equal(weight_PA, np.zeros((2, 3)))


def test_unknown_options_of_rubric_rl_are_named():
  """A misspelt baseline or normaliser is refused with the choices."""
  with pytest.raises(ValueError, match="'median'.*leave_one_out"):
    rubric_rl.advantages(LENGTHS * 1.0, VALID, baseline="median", normalize_std=False)
  with pytest.raises(ValueError, match="'batch'.*rollouts, group_tokens, tokens"):
    rubric_rl.weights(LENGTHS, VALID, TRUNCATED, normalizer="batch", overlong_filter=False)


def test_spread_gives_every_token_its_rollouts_number():
  """Packed rows: tokens of rollouts 1 and 0 in one row, prompt and padding -1."""
  rollout_BT = jnp.array([[-1, 1, 1, 0], [2, 2, -1, -1]])
  spread = jax.jit(rubric_rl.spread)([0.5, -1.0, 3.0], rollout_BT)
  np.testing.assert_array_equal(spread, [[0, -1, -1, 0.5], [3, 3, 0, 0]])
