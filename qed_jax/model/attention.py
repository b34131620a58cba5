"""Attention behind one function each for packed rows and for the KV cache; picks a kernel.

A packed row is one int32 vector `start_BT` (layers.segment_starts): token t attends to s when
start[t] <= s <= t. The Pallas kernels plug in here: an implementation that cannot serve a case
raises NotImplementedError naming the limit, and `auto` takes the next.
"""

import functools

import jax
import jax.numpy as jnp

from qed_jax.model import kv_cache as kv
from qed_jax.model.layers import at_least_float32, einsum

MASKED = -1e30  # not -inf: a row with nothing to see must stay finite
SCORES_AT_ONCE = 2**20  # scores of a head that attention over the cache makes at once
QUERY_CHUNK = 1024  # queries scored at once; bounds the [B, K, G, chunk, S] block of scores


def attention(q_BTNH, k_BTKH, v_BTKH, start_BT, implementation: str):
  """Causal attention within segments. Returns o_BTNH in q's dtype; softmax in float32."""
  return IMPLEMENTATIONS[implementation](q_BTNH, k_BTKH, v_BTKH, start_BT)


def attend(q_BTNH, k_BKSH, v_BKSH, visible_BTS):
  """softmax(q k / sqrt(H)) v over the visible keys: o_BTNH.

  The G query heads of a key head are rows of one product, X = G * T, and the softmax is divided by
  its sum after the product with v: nothing of the size of the scores is transposed, divided or, in
  the backward pass, summed.
  """
  B, T, N, H = q_BTNH.shape
  K, S = k_BKSH.shape[1:3]
  G = N // K
  q_BKXH = jnp.moveaxis(q_BTNH.reshape(B, T, K, G, H), 1, 3).reshape(B, K, G * T, H)
  wide = at_least_float32(q_BTNH.dtype)
  s_BKXS = einsum("BKXH,BKSH->BKXS", q_BKXH, k_BKSH, out_dtype=wide) * H**-0.5
  s_BKGTS = jnp.where(visible_BTS[:, None, None], s_BKXS.reshape(B, K, G, T, S), MASKED)
  largest_BKGT1 = jax.lax.stop_gradient(jnp.max(s_BKGTS, axis=-1, keepdims=True))
  e_BKXS = jnp.exp(s_BKGTS - largest_BKGT1).reshape(s_BKXS.shape)
  o_BKXH = einsum("BKXS,BKSH->BKXH", e_BKXS.astype(v_BKSH.dtype), v_BKSH, out_dtype=wide)
  o_BKXH = (o_BKXH / jnp.sum(e_BKXS, axis=-1, keepdims=True)).astype(q_BTNH.dtype)
  return jnp.moveaxis(o_BKXH.reshape(B, K, G, T, H), 3, 1).reshape(B, T, N, H)


def xla_attention(q_BTNH, k_BSKH, v_BSKH, start_BT):
  """Plain XLA, a chunk of queries at a time, recomputed in the backward pass."""
  B, T, N, H = q_BTNH.shape
  k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
  key_11S = jnp.arange(k_BKSH.shape[2])[None, None]

  def block(q_BCNH, start_BC, query_C):
    visible_BCS = (key_11S >= start_BC[:, :, None]) & (key_11S <= query_C[None, :, None])
    return attend(q_BCNH, k_BKSH, v_BKSH, visible_BCS)

  if T <= QUERY_CHUNK:
    return block(q_BTNH, start_BT, jnp.arange(T))

  pad = -T % QUERY_CHUNK
  chunks = (T + pad) // QUERY_CHUNK

  def split(x_BT):
    x_BT = jnp.pad(x_BT, ((0, 0), (0, pad)) + ((0, 0),) * (x_BT.ndim - 2))
    return jnp.moveaxis(x_BT.reshape(B, chunks, QUERY_CHUNK, *x_BT.shape[2:]), 1, 0)

  query_T = jnp.arange(T + pad).reshape(chunks, QUERY_CHUNK)
  run = jax.checkpoint(lambda chunk: block(*chunk))
  o = jax.lax.map(run, (split(q_BTNH), split(start_BT), query_T))
  return jnp.moveaxis(o, 0, 1).reshape(B, T + pad, N, H)[:, :T]


IMPLEMENTATIONS = {"auto": xla_attention, "xla": xla_attention}


@functools.partial(jax.named_call, name="cache_attention")
def cache_attention(q_BTNH, kv_cache: kv.KVCache, layer, positions_BT):
  """Attention of new tokens over the cache of their sequence, their own entry included: o_BTNH.

  The pages of a sequence side by side hold its tokens by position, so a token at position p sees
  s <= p. A large block of scores, a prefill's, is made a sequence at a time.
  """
  B, T = positions_BT.shape

  def attend_all(q_BTNH, kv_cache, positions_BT):
    k_BKSH, v_BKSH = kv.read(kv_cache, layer, q_BTNH.dtype)
    key_11S = jnp.arange(k_BKSH.shape[2])[None, None]
    return attend(q_BTNH, k_BKSH, v_BKSH, key_11S <= positions_BT[:, :, None])

  if kv_cache.table_BP is None or T == 1 or B * T * kv_cache.context <= SCORES_AT_ONCE:
    return attend_all(q_BTNH, kv_cache, positions_BT)

  def one(row):
    q_TNH, table_P, positions_T = row
    own = kv.with_table(kv_cache, table_P[None])
    return attend_all(q_TNH[None], own, positions_T[None])[0]

  return jax.lax.map(one, (q_BTNH, kv_cache.table_BP, positions_BT))
