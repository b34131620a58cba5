"""Decode attention in plain XLA, for every device: scatter the new tokens, gather the pages."""

import jax.numpy as jnp

from qed_kernels.dense import attend


def decode_attention(q_BTNH, k_BTKH, v_BTKH, cache, layer, positions_BT, scale: float):
  """As the reference, softmax in float32. Work grows with the width of the table."""
  table_BP, (P, _, S) = cache.table_BP, cache.k_LPKSH.shape[1:4]
  page_BT = jnp.take_along_axis(table_BP, jnp.maximum(positions_BT, 0) // S, axis=1)
  page_BT = jnp.where(positions_BT < 0, P, page_BT)  # past the end, and dropped

  def append(x_LPKSH, new_BTKH):
    # Indices [B, T] around the slice over K come first in the result: [B, T, K, H].
    at = x_LPKSH.at[layer, page_BT, :, positions_BT % S]
    return at.set(new_BTKH.astype(x_LPKSH.dtype), mode="drop")

  def side_by_side(x_LPKSH):
    x_BKPSH = jnp.moveaxis(x_LPKSH[layer, table_BP], 1, 2)
    return x_BKPSH.reshape(*x_BKPSH.shape[:2], -1, x_BKPSH.shape[-1]).astype(q_BTNH.dtype)

  k_LPKSH, v_LPKSH = append(cache.k_LPKSH, k_BTKH), append(cache.v_LPKSH, v_BTKH)
  visible_BTS = jnp.arange(table_BP.shape[1] * S)[None, None] <= positions_BT[:, :, None]
  o_BTNH, _ = attend(q_BTNH, side_by_side(k_LPKSH), side_by_side(v_LPKSH), visible_BTS, scale)
  return o_BTNH, k_LPKSH, v_LPKSH
