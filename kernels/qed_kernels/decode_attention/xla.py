"""Decode attention in plain XLA, for every device: scatter the new tokens, gather the pages."""

import dataclasses

import jax.numpy as jnp

from qed_kernels.dense import attend


def decode_attention(q_BTNH, new, cache, layer, positions_BT, scale: float):
  """As the reference, softmax in float32. Work grows with the width of the table."""
  cache = append(new, cache, layer, positions_BT)
  table_BP, S = cache.table_BP, cache.k_LPKSH.shape[3]

  def side_by_side(x_LPKSH, scale_LPKS):
    x_BPKSH = x_LPKSH[layer, table_BP].astype(q_BTNH.dtype)
    if scale_LPKS is not None:
      x_BPKSH *= scale_LPKS[layer, table_BP][..., None].astype(q_BTNH.dtype)
    x_BKPSH = jnp.moveaxis(x_BPKSH, 1, 2)
    return x_BKPSH.reshape(*x_BKPSH.shape[:2], -1, x_BKPSH.shape[-1])

  k_BKSH = side_by_side(cache.k_LPKSH, cache.k_scale_LPKS)
  v_BKSH = side_by_side(cache.v_LPKSH, cache.v_scale_LPKS)
  visible_BTS = jnp.arange(table_BP.shape[1] * S)[None, None] <= positions_BT[:, :, None]
  return attend(q_BTNH, k_BKSH, v_BKSH, visible_BTS, scale)[0], cache


def append(new, cache, layer, positions_BT):
  """The cache with new tokens at their positions; negative ones are dropped."""
  table_BP, (P, _, S) = cache.table_BP, cache.k_LPKSH.shape[1:4]
  page_BT = jnp.take_along_axis(table_BP, jnp.maximum(positions_BT, 0) // S, axis=1)
  page_BT = jnp.where(positions_BT < 0, P, page_BT)  # past the end, and dropped

  def write(x_LPKSx, new_BTKx):
    if x_LPKSx is None:
      return None
    # Indices [B, T] around the slice over K come first in the result: [B, T, K, ...].
    at = x_LPKSx.at[layer, page_BT, :, positions_BT % S]
    return at.set(new_BTKx.astype(x_LPKSx.dtype), mode="drop")

  return dataclasses.replace(
    cache,
    k_LPKSH=write(cache.k_LPKSH, new.k_BTKH),
    v_LPKSH=write(cache.v_LPKSH, new.v_BTKH),
    k_scale_LPKS=write(cache.k_scale_LPKS, new.k_scale_BTK),
    v_scale_LPKS=write(cache.v_scale_LPKS, new.v_scale_BTK),
  )
