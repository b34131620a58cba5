"""Flash attention in plain XLA, for every device: a chunk of queries at a time."""

import jax
import jax.numpy as jnp

from qed_kernels.dense import attend

QUERY_CHUNK = 1024  # queries scored at once; bounds the [B, K, G, chunk, S] block of scores


def flash_attention(q_BTNH, k_BSKH, v_BSKH, rows, scale: float):
  """As the reference, softmax in float32; the backward pass computes each chunk again: O(T)."""
  (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
  k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
  key_11S = jnp.arange(S)[None, None]

  def block(q_BCNH, start_BC, query_C):
    visible_BCS = (key_11S >= start_BC[:, :, None]) & (key_11S <= query_C[None, :, None])
    return attend(q_BCNH, k_BKSH, v_BKSH, visible_BCS, scale)

  if T <= QUERY_CHUNK:
    return block(q_BTNH, rows.start_BT, jnp.arange(S - T, S))

  pad = -T % QUERY_CHUNK
  chunks = (T + pad) // QUERY_CHUNK

  def split(x_BTx):
    x_BTx = jnp.pad(x_BTx, ((0, 0), (0, pad)) + ((0, 0),) * (x_BTx.ndim - 2))
    return jnp.moveaxis(x_BTx.reshape(B, chunks, QUERY_CHUNK, *x_BTx.shape[2:]), 1, 0)

  def join(x_nBCx):
    x_BTx = jnp.moveaxis(x_nBCx, 0, 1)
    return x_BTx.reshape(B, T + pad, *x_BTx.shape[3:])[:, :T]

  query_nC = jnp.arange(S - T, S + pad).reshape(chunks, QUERY_CHUNK)
  run = jax.checkpoint(lambda chunk: block(*chunk))
  o_nBCNH, lse_nBCN = jax.lax.map(run, (split(q_BTNH), split(rows.start_BT), query_nC))
  return join(o_nBCNH), join(lse_nBCN)
