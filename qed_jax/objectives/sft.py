"""Supervised fine-tuning: weighted cross-entropy on the tokens that are targets."""

import jax.numpy as jnp


def weights(is_target_BT):
  """bool [B, T] of all rows of a step -> weight_BT: every target token counts the same, 1/total.

  The total is the step's, not a microbatch's or a row's, so that the loss is the token mean of the
  step. A step without targets gets zeros.
  """
  is_target_BT = jnp.asarray(is_target_BT, float)
  return is_target_BT / jnp.maximum(jnp.sum(is_target_BT), 1)


def loss(logp_BT, entropy_BT, batch):
  """-sum(weight * logp) over a Batch -> (loss, metrics), see objectives for how metrics merge.

  logp_BT, entropy_BT: float [B, T] aligned at the target, as `score` gives them.
  """
  assert logp_BT.shape == entropy_BT.shape == batch.weight_BT.shape
  target_BT = batch.weight_BT > 0
  # where, not a product: a NaN or an infinity at a token that is not trained must not get through.
  logp_BT = jnp.where(target_BT, logp_BT, 0)
  total = -jnp.sum(batch.weight_BT * logp_BT)
  tokens = jnp.sum(target_BT).astype(logp_BT.dtype)
  metrics = {
    "loss": total,
    "tokens": tokens,
    "nll": (-jnp.sum(logp_BT), tokens),
    "entropy": (jnp.sum(jnp.where(target_BT, entropy_BT, 0)), tokens),
  }
  return total, metrics
