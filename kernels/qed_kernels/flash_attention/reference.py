"""The contract of flash attention, as plainly as it can be said: all others are tested by it."""

import jax.numpy as jnp


def flash_attention(q_BTNH, k_BTKH, v_BTKH, rows, scale: float):
  """Every score at once, in the dtype given: call it in float64.

  Returns o_BTNH and lse_BTN, the natural logarithm of the sum of exp(score) that a query sees.
  """
  B, T, N, H = q_BTNH.shape
  repeats = N // k_BTKH.shape[2]
  k_BTNH, v_BTNH = (jnp.repeat(x_BTKH, repeats, axis=2) for x_BTKH in (k_BTKH, v_BTKH))
  s_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH)
  query_1T1, key_11S = jnp.arange(T)[None, :, None], jnp.arange(T)[None, None]
  visible_BTS = (rows.start_BT[:, :, None] <= key_11S) & (key_11S <= query_1T1)
  s_BNTS = jnp.where(visible_BTS[:, None], s_BNTS, -jnp.inf)
  largest_BNT1 = jnp.max(s_BNTS, axis=-1, keepdims=True)
  e_BNTS = jnp.exp(s_BNTS - largest_BNT1)
  sum_BNT1 = jnp.sum(e_BNTS, axis=-1, keepdims=True)
  o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", e_BNTS / sum_BNT1, v_BTNH)
  lse_BNT = (largest_BNT1 + jnp.log(sum_BNT1))[..., 0]
  return o_BTNH, jnp.moveaxis(lse_BNT, 1, 2)
