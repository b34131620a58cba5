"""The contract of the scoring head, as plainly as it can be said: all others are tested by it."""

import jax
import jax.numpy as jnp


def score_head(x_BTD, w_VD, target_BT, temperature):
  """Every logit at once, in the dtype given: call it in float64.

  Returns logp_BT, of the target tokens, and entropy_BT of softmax(x w / temperature), in nats.
  """
  z_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, w_VD) / temperature
  logp_BTV = jax.nn.log_softmax(z_BTV, axis=-1)
  logp_BT = jnp.take_along_axis(logp_BTV, target_BT[..., None], axis=-1)[..., 0]
  return logp_BT, -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)
