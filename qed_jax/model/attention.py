"""Attention behind one function each for packed rows and for the KV cache; picks a kernel.

A packed row is one int32 vector `start_BT` (layers.segment_starts): token t attends to s when
start[t] <= s <= t. The Pallas kernels plug in here: an implementation that cannot serve a case
raises NotImplementedError naming the limit, and `auto` takes the next.
"""

import functools

import jax
import jax.numpy as jnp

from qed_jax.model.layers import at_least_float32, einsum

MASKED = -1e30  # not -inf: a row with nothing to see must stay finite
QUERY_CHUNK = 1024  # queries scored at once; bounds the [B, K, G, chunk, S] block of scores


def attention(q_BTNH, k_BTKH, v_BTKH, start_BT, implementation: str):
  """Causal attention within segments. Returns o_BTNH in q's dtype; softmax in float32."""
  return IMPLEMENTATIONS[implementation](q_BTNH, k_BTKH, v_BTKH, start_BT)


def attend_block(q_BTKGH, k_BSKH, v_BSKH, visible_BTS):
  """softmax(q k / sqrt(H)) v over the visible keys; [B, T, K, G, H]."""
  wide = at_least_float32(q_BTKGH.dtype)
  scale = q_BTKGH.shape[-1] ** -0.5
  s_BKGTS = einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, out_dtype=wide) * scale
  s_BKGTS = jnp.where(visible_BTS[:, None, None], s_BKGTS, MASKED)
  p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1).astype(v_BSKH.dtype)
  return einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v_BSKH)


def xla_attention(q_BTNH, k_BSKH, v_BSKH, start_BT):
  """Plain XLA, a chunk of queries at a time, recomputed in the backward pass."""
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  key_11S = jnp.arange(S)[None, None]

  def block(q_BCKGH, start_BC, query_C):
    visible_BCS = (key_11S >= start_BC[:, :, None]) & (key_11S <= query_C[None, :, None])
    return attend_block(q_BCKGH, k_BSKH, v_BSKH, visible_BCS)

  if T <= QUERY_CHUNK:
    return block(q_BTKGH, start_BT, jnp.arange(T)).reshape(q_BTNH.shape)

  pad = -T % QUERY_CHUNK
  chunks = (T + pad) // QUERY_CHUNK

  def split(x_BT):
    x_BT = jnp.pad(x_BT, ((0, 0), (0, pad)) + ((0, 0),) * (x_BT.ndim - 2))
    return jnp.moveaxis(x_BT.reshape(B, chunks, QUERY_CHUNK, *x_BT.shape[2:]), 1, 0)

  query_T = jnp.arange(T + pad).reshape(chunks, QUERY_CHUNK)
  run = jax.checkpoint(lambda chunk: block(*chunk))
  o = jax.lax.map(run, (split(q_BTKGH), split(start_BT), query_T))
  return jnp.moveaxis(o, 0, 1).reshape(B, T + pad, N, H)[:, :T]


IMPLEMENTATIONS = {"auto": xla_attention, "xla": xla_attention}


@functools.partial(jax.named_call, name="cache_attention")
def cache_attention(q_BTNH, kv_cache, layer, positions_BT):
  """Attention of new tokens over the cache of their slot, their own entry included.

  Cache index s holds the token at position s, so a token at position p sees s <= p.
  """
  B, T, N, H = q_BTNH.shape
  k_BKSH = jax.lax.dynamic_index_in_dim(kv_cache.k_LBKSH, layer, 0, keepdims=False)
  v_BKSH = jax.lax.dynamic_index_in_dim(kv_cache.v_LBKSH, layer, 0, keepdims=False)
  K, S = k_BKSH.shape[1:3]
  G = N // K
  # X = G * T: the query rows of a key/value head.
  q_BKXH = jnp.moveaxis(q_BTNH.reshape(B, T, K, G, H), 1, 3).reshape(B, K, G * T, H)
  wide = at_least_float32(q_BTNH.dtype)
  s_BKXS = einsum("BKXH,BKSH->BKXS", q_BKXH, k_BKSH, out_dtype=wide) * H**-0.5
  visible_BXS = jnp.arange(S)[None, None] <= jnp.tile(positions_BT, (1, G))[:, :, None]
  s_BKXS = jnp.where(visible_BXS[:, None], s_BKXS, MASKED)
  p_BKXS = jax.nn.softmax(s_BKXS, axis=-1).astype(v_BKSH.dtype)
  o_BKXH = einsum("BKXS,BKSH->BKXH", p_BKXS, v_BKSH)
  return jnp.moveaxis(o_BKXH.reshape(B, K, G, T, H), 3, 1).reshape(q_BTNH.shape)
