"""The policy-gradient loss of QED-Nano: clipped surrogates at a sampling temperature, token sums.

For a token t with weight w, advantage A, behaviour log-probability log mu and rho = pi / mu:

  ppo        p = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
  reinforce  p = log pi . A . stop_gradient(min(rho, 1 + eps_high))
  loss       - sum w (p - kl_coef (e^d - d - 1) + entropy_coef H),   d = clip(log ref - log pi)

QED-Nano has eps_low = eps_high = 4, so the bounds of rho are [-3, 5] and only rho > 5 with A > 0 is
clipped. w = 1 / rollouts of the step (rubric_rl.weights); `tools/check_policy_gradient.py` compares
value and gradient with numbers from the authors' own code.

What differs from PPO and GRPO:
- rho is taken against the probabilities that the sampler wrote down token by token, after
  temperature, possibly from several versions of the policy; no "old" policy is run again.
- no critic: A is the reward minus the mean of its group, by default not divided by the group's
  deviation; it is constant over a rollout (advantage_BT could hold one number a token).
- a sum over tokens divided by rollouts: no division by a rollout's own length.
- one pass over each batch; no reference policy is run unless kl_coef asks for one; the entropy
  bonus is exact, over the whole vocabulary.

What differs from the original code (github.com/CMU-AIRe/QED-Nano, training/pipelinerl/finetune):
- hidden gradient scale: there, the optimiser saw the gradient divided by accumulation passes and
  ranks (64 or 256 in the published runs). Here it sees the gradient of this loss and nothing else,
  so a clip norm taken from the original must be chosen anew.
- sentinel rows (dummy tokens with loss x 0 that kept ranks in step) do not exist: rows are padded,
  and padding has segment 0 and weight 0.
- a judge failure counted as reward 0 there. Here such a rollout has weight 0, is no part of its
  group's mean and is not counted among the rollouts that divide the loss.
- overlong filtering there looked for the stop token in prompt and completion together, found the
  prompt's, and so never acted. Here truncation is what the sampler reports (rubric_rl.weights).
- there, sequence-parallel slices lost the target at every slice boundary. Here none is lost.
- non-finite values there ended the run; here nothing that is not trained can make the loss
  non-finite, and the training loop decides about the rest.
"""

import math

import jax
import jax.numpy as jnp

POLICY_LOSSES = ("ppo", "reinforce")
LAGS = 4  # metrics tell apart lags 0 .. LAGS - 1, the last of them and over


def loss(
  logp_BT,
  entropy_BT,
  batch,
  *,
  policy_loss,
  eps_low,
  eps_high,
  kl_coef,
  entropy_coef,
  clamp_log_ratio,
):
  """Loss of a Batch with advantages and behaviour log-probabilities -> (loss, metrics).

  logp_BT, entropy_BT: float [B, T], of the policy at the sampling temperature, aligned at the
  target. policy_loss: "ppo" or "reinforce". clamp_log_ratio: bound of |log ref - log pi|. The
  coefficients may be traced, so that a schedule needs no recompilation.
  Tokens with weight 0 take no part, whatever their other entries hold.
  Raises ValueError for another policy_loss, or for a kl_coef without reference_logp_BT.
  """
  if policy_loss not in POLICY_LOSSES:
    raise ValueError(f"policy_loss is {policy_loss!r}; choose one of {', '.join(POLICY_LOSSES)}")
  has_reference = batch.reference_logp_BT is not None
  if not has_reference and not (isinstance(kl_coef, int | float) and kl_coef == 0):
    raise ValueError(f"kl_coef is {kl_coef} but the batch has no reference_logp_BT; set it to 0")
  weight_BT = batch.weight_BT
  assert logp_BT.shape == entropy_BT.shape == weight_BT.shape == batch.advantage_BT.shape

  trained_BT = weight_BT > 0

  def keep(x_BT):
    # where, not a product: a NaN at a token that is not trained must not get through.
    return jnp.where(trained_BT, x_BT, 0)

  logp_BT, entropy_BT = keep(logp_BT), keep(entropy_BT)
  advantage_BT = keep(batch.advantage_BT)
  log_ratio_BT = keep(logp_BT - keep(batch.behavior_logp_BT))
  # e^40 in float32: far above any clip, and its square is finite, so that 0 . inf cannot occur.
  largest = 0.45 * math.log(jnp.finfo(log_ratio_BT.dtype).max)
  ratio_BT = jnp.exp(jnp.minimum(log_ratio_BT, largest))

  if policy_loss == "ppo":
    free_BT = ratio_BT * advantage_BT
    bound_BT = jnp.clip(ratio_BT, 1 - eps_low, 1 + eps_high) * advantage_BT
    policy_BT = jnp.minimum(free_BT, bound_BT)
    clipped_BT = trained_BT & (bound_BT < free_BT)
  else:
    truncated_BT = jax.lax.stop_gradient(jnp.minimum(ratio_BT, 1 + eps_high))
    policy_BT = logp_BT * advantage_BT * truncated_BT
    clipped_BT = trained_BT & (ratio_BT > 1 + eps_high)

  gain_BT = policy_BT + entropy_coef * entropy_BT
  tokens = jnp.sum(trained_BT).astype(logp_BT.dtype)

  def mean(x_BT):
    return jnp.sum(keep(x_BT)), tokens

  metrics = {
    "tokens": tokens,
    "policy_loss": -jnp.sum(weight_BT * policy_BT),
    "entropy": mean(entropy_BT),
    "advantage": mean(advantage_BT),
    # Two estimates of KL(mu || pi) from tokens of mu: k1 unbiased, k3 never negative.
    "kl_behavior": mean(-log_ratio_BT),
    "kl_behavior_k3": mean(ratio_BT - 1 - log_ratio_BT),
    "ratio": mean(ratio_BT),
    "ratio_sq": mean(ratio_BT**2),
    "ratio_max": jnp.max(keep(ratio_BT)),
    "clip_share": mean(clipped_BT.astype(logp_BT.dtype)),
  }
  if batch.lag_BT is not None:
    for lag in range(LAGS):
      of_lag_BT = trained_BT & (jnp.minimum(batch.lag_BT, LAGS - 1) == lag)
      count = jnp.sum(of_lag_BT).astype(logp_BT.dtype)
      of_lag = lambda x_BT, mask_BT=of_lag_BT: jnp.sum(jnp.where(mask_BT, x_BT, 0))  # noqa: E731
      metrics[f"ratio_lag_{lag}"] = of_lag(ratio_BT), count
      metrics[f"ratio_sq_lag_{lag}"] = of_lag(ratio_BT**2), count
      metrics[f"share_lag_{lag}"] = count, tokens
  if has_reference:
    d_BT = jnp.clip(keep(batch.reference_logp_BT) - logp_BT, -clamp_log_ratio, clamp_log_ratio)
    kl_BT = jnp.exp(d_BT) - d_BT - 1
    gain_BT = gain_BT - kl_coef * kl_BT
    metrics["kl_reference"] = mean(kl_BT)
  total = -jnp.sum(weight_BT * gain_BT)
  metrics["loss"] = total
  return total, jax.lax.stop_gradient(metrics)
