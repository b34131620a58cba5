"""Attention under any mask with all its scores at once: what the XLA implementations share."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # not -inf: a query with nothing to see must stay finite


def wide(dtype):
  """The type of scores, sums and softmax: float32, or float64 when computing in it."""
  return jnp.promote_types(dtype, jnp.float32)


def product(equation: str, x, y):
  """einsum into the wide type; float32 is multiplied as float32, not rounded to bf16 or TF32."""
  full = x.dtype in (jnp.float32, jnp.float64) and x.dtype == y.dtype
  precision = jax.lax.Precision.HIGHEST if full else None
  return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=wide(x.dtype))


def attend(q_BTNH, k_BKSH, v_BKSH, visible_BTS, scale: float):
  """softmax(scale q k) v over the visible keys -> o_BTNH in q's dtype, lse_BTN in the wide type.

  The G query heads of a key head are rows of one product, X = G * T, and the softmax is divided by
  its sum after the product with v: nothing of the size of the scores is transposed, divided or, in
  the backward pass, summed.
  """
  B, T, N, H = q_BTNH.shape
  K, S = k_BKSH.shape[1:3]
  G = N // K
  q_BKXH = jnp.moveaxis(q_BTNH.reshape(B, T, K, G, H), 1, 3).reshape(B, K, G * T, H)
  s_BKXS = product("BKXH,BKSH->BKXS", q_BKXH, k_BKSH) * scale
  s_BKGTS = jnp.where(visible_BTS[:, None, None], s_BKXS.reshape(B, K, G, T, S), MASKED)
  largest_BKGT1 = jax.lax.stop_gradient(jnp.max(s_BKGTS, axis=-1, keepdims=True))
  e_BKXS = jnp.exp(s_BKGTS - largest_BKGT1).reshape(s_BKXS.shape)
  sum_BKX1 = jnp.sum(e_BKXS, axis=-1, keepdims=True)
  o_BKXH = product("BKXS,BKSH->BKXH", e_BKXS.astype(v_BKSH.dtype), v_BKSH)
  o_BKXH = (o_BKXH / sum_BKX1).astype(q_BTNH.dtype)
  lse_BKGT = largest_BKGT1[..., 0] + jnp.log(sum_BKX1).reshape(B, K, G, T)
  by_token = lambda x_BKGTx: jnp.moveaxis(x_BKGTx, 3, 1).reshape(B, T, N, *x_BKGTx.shape[4:])  # noqa: E731
  return by_token(o_BKXH.reshape(B, K, G, T, H)), by_token(lse_BKGT)
