"""The contract of decode attention, one sequence and one token after another."""

import dataclasses

import jax
import jax.numpy as jnp


def decode_attention(q_BTNH, new, cache, layer, positions_BT, scale: float):
  """In the dtype given: call it in float64. Not to be jitted: positions and table are read."""
  B, T, N, H = q_BTNH.shape
  K, S = cache.k_LPKSH.shape[2:4]
  places = [(b, t, int(positions_BT[b, t])) for b in range(B) for t in range(T)]
  places = [place for place in places if place[2] >= 0]

  def write(x_LPKSx, new_BTKx):
    for b, t, position in places if x_LPKSx is not None else ():
      at = (layer, int(cache.table_BP[b, position // S]), slice(None), position % S)
      x_LPKSx = x_LPKSx.at[at].set(new_BTKx[b, t])
    return x_LPKSx

  cache = dataclasses.replace(
    cache,
    k_LPKSH=write(cache.k_LPKSH, new.k_BTKH),
    v_LPKSH=write(cache.v_LPKSH, new.v_BTKH),
    k_scale_LPKS=write(cache.k_scale_LPKS, new.k_scale_BTK),
    v_scale_LPKS=write(cache.v_scale_LPKS, new.v_scale_BTK),
  )

  def seen(x_LPKSH, scale_LPKS, b, tokens):
    join = lambda x_LPKSx: jnp.concatenate(list(x_LPKSx[layer, cache.table_BP[b]]), axis=1)  # noqa: E731
    x_KSH = join(x_LPKSH)[:, :tokens].astype(q_BTNH.dtype)
    return x_KSH if scale_LPKS is None else x_KSH * join(scale_LPKS)[:, :tokens, None]

  o_BTNH = jnp.zeros(q_BTNH.shape, q_BTNH.dtype)
  for b, t, position in places:
    k_KSH = seen(cache.k_LPKSH, cache.k_scale_LPKS, b, position + 1)
    v_KSH = seen(cache.v_LPKSH, cache.v_scale_LPKS, b, position + 1)
    q_KGH = q_BTNH[b, t].reshape(K, N // K, H)
    p_KGS = jax.nn.softmax(scale * jnp.einsum("KGH,KSH->KGS", q_KGH, k_KSH), axis=-1)
    o_BTNH = o_BTNH.at[b, t].set(jnp.einsum("KGS,KSH->KGH", p_KGS, v_KSH).reshape(N, H))
  return o_BTNH, cache
