"""From grades to what the policy-gradient loss reads: rewards, group advantages, token weights.

P counts groups (attempts at one prompt; for cache RL one prompt is a problem with a summary), A the
attempts of a group. A rollout that could not be graded (score None) is not valid: it has no part in
its group's mean and no weight. Everything but `rewards` is pure and can be jitted.
"""

import jax.numpy as jnp
import numpy as np

BASELINES = ("mean", "leave_one_out")
NORMALIZERS = ("rollouts", "group_tokens", "tokens")
STD_FLOOR = 1e-4  # added to the group's deviation, as in the original (rl/__init__.py:380-465)


def rewards(score_PA, *, max_score):
  """Scores (int or None), a list per group -> (reward_PA float32 in [0, 1], valid_PA bool), numpy.

  Raises ValueError where groups differ in length or a score is outside 0..max_score.
  """
  if len({len(score_A) for score_A in score_PA}) > 1:
    raise ValueError(
      f"groups have {sorted({len(score_A) for score_A in score_PA})} attempts; "
      "give every group the same number"
    )
  for score in (score for score_A in score_PA for score in score_A):
    if score is not None and not 0 <= score <= max_score:
      raise ValueError(f"score {score} is outside 0..{max_score}; a grade that failed is None")
  valid_PA = np.array([[score is not None for score in score_A] for score_A in score_PA], bool)
  reward_PA = [[(score or 0) / max_score for score in score_A] for score_A in score_PA]
  return np.array(reward_PA, np.float32), valid_PA


def advantages(reward_PA, valid_PA, *, baseline, normalize_std):
  """Group-relative advantages -> (advantage_PA, metrics); see objectives for how metrics merge.

  baseline: "mean" of the group's valid rewards, or "leave_one_out", the mean of the others.
  normalize_std: divide by the group's deviation (ddof = 1) plus 1e-4.
  Invalid rollouts get 0, and so does all of a dead group: fewer than two valid rewards, or all of
  them equal. `dead_group_share` counts these among all groups.
  """
  if baseline not in BASELINES:
    raise ValueError(f"baseline is {baseline!r}; choose one of {', '.join(BASELINES)}")
  valid_PA = jnp.asarray(valid_PA, bool)
  reward_PA = jnp.where(valid_PA, jnp.asarray(reward_PA), 0)
  assert reward_PA.shape == valid_PA.shape and reward_PA.ndim == 2, reward_PA.shape
  count_P1 = jnp.sum(valid_PA, axis=1, keepdims=True).astype(reward_PA.dtype)
  others_P1 = jnp.maximum(count_P1 - 1, 1)
  mean_P1 = jnp.sum(reward_PA, axis=1, keepdims=True) / jnp.maximum(count_P1, 1)
  centered_PA = jnp.where(valid_PA, reward_PA - mean_P1, 0)
  # Compared, not computed from the mean: the float32 mean of seven times 5/7 is not 5/7.
  highest_P1 = jnp.max(jnp.where(valid_PA, reward_PA, -jnp.inf), axis=1, keepdims=True)
  lowest_P1 = jnp.min(jnp.where(valid_PA, reward_PA, jnp.inf), axis=1, keepdims=True)
  live_P1 = highest_P1 > lowest_P1

  advantage_PA = centered_PA
  if baseline == "leave_one_out":
    advantage_PA = advantage_PA * (count_P1 / others_P1)
  if normalize_std:
    std_P1 = jnp.sqrt(jnp.sum(centered_PA**2, axis=1, keepdims=True) / others_P1)
    advantage_PA = advantage_PA / (std_P1 + STD_FLOOR)
  advantage_PA = jnp.where(live_P1, advantage_PA, 0)

  def as_count(mask):
    return jnp.sum(mask).astype(reward_PA.dtype)

  groups, rollouts = as_count(jnp.ones_like(live_P1)), as_count(jnp.ones_like(valid_PA))
  metrics = {
    "reward": (jnp.sum(reward_PA), as_count(valid_PA)),
    "dead_group_share": (as_count(~live_P1), groups),
    "invalid_share": (as_count(~valid_PA), rollouts),
  }
  return advantage_PA, metrics


def weights(length_PA, valid_PA, truncated_PA, *, normalizer, overlong_filter):
  """Weight of each token of a rollout -> weight_PA float, 0 for rollouts that are not valid.

  length_PA: completion tokens. The arrays span the whole step (all microbatches, all hosts).
  normalizer: "rollouts", 1 / valid rollouts of the step (QED-Nano: a token sum per rollout);
  "group_tokens", 1 / mean length of the group's valid rollouts, as the original's
  group_normalization, which does not divide by the number of rollouts; "tokens", 1 / valid tokens
  of the step (the token mean of the reasoning-cache paper).
  overlong_filter: truncated rollouts get weight 0; they still count in the normaliser and in the
  group's mean reward.
  """
  if normalizer not in NORMALIZERS:
    raise ValueError(f"normalizer is {normalizer!r}; choose one of {', '.join(NORMALIZERS)}")
  valid_PA = jnp.asarray(valid_PA, bool)
  count_PA = valid_PA.astype(float)
  length_PA = jnp.asarray(length_PA) * count_PA
  if normalizer == "rollouts":
    divisor_PA = jnp.broadcast_to(jnp.sum(count_PA), count_PA.shape)
  elif normalizer == "tokens":
    divisor_PA = jnp.broadcast_to(jnp.sum(length_PA), count_PA.shape)
  else:
    members_P1 = jnp.maximum(jnp.sum(count_PA, axis=1, keepdims=True), 1)
    mean_P1 = jnp.sum(length_PA, axis=1, keepdims=True) / members_P1
    divisor_PA = jnp.broadcast_to(mean_P1, count_PA.shape)
  trained_PA = valid_PA & (divisor_PA > 0)
  if overlong_filter:
    trained_PA &= ~jnp.asarray(truncated_PA, bool)
  return jnp.where(trained_PA, 1 / jnp.where(divisor_PA > 0, divisor_PA, 1), 0)


def spread(value_R, rollout_BT):
  """One number per rollout -> one per token. rollout_BT: int index into value_R, -1 gives 0."""
  value_R = jnp.asarray(value_R)
  return jnp.where(rollout_BT >= 0, value_R[jnp.maximum(rollout_BT, 0)], 0)
