"""The contract of flash attention, as plainly as it can be said: all others are tested by it."""

import jax.numpy as jnp


def flash_attention(q_BTNH, k_BSKH, v_BSKH, rows, scale: float):
  """Every score at once, in the dtype given: call it in float64.

  Returns o_BTNH and lse_BTN, the natural logarithm of the sum of exp(score) that a query sees.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  k_BSNH, v_BSNH = (jnp.repeat(x_BSKH, N // K, axis=2) for x_BSKH in (k_BSKH, v_BSKH))
  s_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH)
  query_1T1, key_11S = jnp.arange(S - T, S)[None, :, None], jnp.arange(S)[None, None]
  visible_BTS = (rows.start_BT[:, :, None] <= key_11S) & (key_11S <= query_1T1)
  s_BNTS = jnp.where(visible_BTS[:, None], s_BNTS, -jnp.inf)
  largest_BNT1 = jnp.max(s_BNTS, axis=-1, keepdims=True)
  e_BNTS = jnp.exp(s_BNTS - largest_BNT1)
  sum_BNT1 = jnp.sum(e_BNTS, axis=-1, keepdims=True)
  o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", e_BNTS / sum_BNT1, v_BSNH)
  lse_BNT = (largest_BNT1 + jnp.log(sum_BNT1))[..., 0]
  return o_BTNH, jnp.moveaxis(lse_BNT, 1, 2)
