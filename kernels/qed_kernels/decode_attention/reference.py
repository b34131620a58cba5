"""The contract of decode attention, one sequence and one token after another."""

import jax
import jax.numpy as jnp


def decode_attention(q_BTNH, k_BTKH, v_BTKH, cache, layer, positions_BT, scale: float):
  """In the dtype given: call it in float64. Not to be jitted: positions and table are read."""
  B, T, N, H = q_BTNH.shape
  k_LPKSH, v_LPKSH = cache.k_LPKSH, cache.v_LPKSH
  K, S = k_LPKSH.shape[2:4]
  o_BTNH = jnp.zeros(q_BTNH.shape, q_BTNH.dtype)
  places = [(b, t, int(positions_BT[b, t])) for b in range(B) for t in range(T)]
  places = [place for place in places if place[2] >= 0]
  for b, t, position in places:
    at = (layer, int(cache.table_BP[b, position // S]), slice(None), position % S)
    k_LPKSH, v_LPKSH = k_LPKSH.at[at].set(k_BTKH[b, t]), v_LPKSH.at[at].set(v_BTKH[b, t])
  for b, t, position in places:
    seen = lambda x_LPKSH: jnp.concatenate(list(x_LPKSH[layer, cache.table_BP[b]]), axis=1)  # noqa: E731, B023
    k_KSH, v_KSH = seen(k_LPKSH)[:, : position + 1], seen(v_LPKSH)[:, : position + 1]
    q_KGH = q_BTNH[b, t].reshape(K, N // K, H)
    p_KGS = jax.nn.softmax(scale * jnp.einsum("KGH,KSH->KGS", q_KGH, k_KSH), axis=-1)
    o_BTNH = o_BTNH.at[b, t].set(jnp.einsum("KGS,KSH->KGH", p_KGS, v_KSH).reshape(N, H))
  return o_BTNH, k_LPKSH, v_LPKSH
