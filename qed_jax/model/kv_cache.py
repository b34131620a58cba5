"""The key/value cache of the sampler: [L, slots, K, S, H] for keys and for values.

(slot, head) is contiguous, as a page is in the paged layout (design section 8), of which this is
the case of one page a slot. The cache is donated, carried whole through the scan over layers and
indexed by layer; it starts zeroed, since 0 * NaN is NaN.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """k_LBKSH, v_LBKSH: rotated keys and values by layer, slot, head and position."""

  k_LBKSH: Any
  v_LBKSH: Any


def create(config, slots: int, length: int, dtype) -> KVCache:
  """An empty cache: `slots` sequences of at most `length` tokens."""
  shape = (config.num_layers, slots, config.num_kv_heads, length, config.head_dim)
  return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def append(kv_cache: KVCache, layer, k_BTKH, v_BTKH, positions_BT) -> KVCache:
  """Write T tokens of every slot at their positions. A position past the end is dropped."""
  slots_B1 = jnp.arange(k_BTKH.shape[0])[:, None]

  def put(cache_LBKSH, new_BTKH):
    # Indices [B, T] around the slice over K come first in the result: [B, T, K, H].
    return cache_LBKSH.at[layer, slots_B1, :, positions_BT].set(
      new_BTKH.astype(cache_LBKSH.dtype), mode="drop"
    )

  return KVCache(put(kv_cache.k_LBKSH, k_BTKH), put(kv_cache.v_LBKSH, v_BTKH))


def insert(kv_cache: KVCache, slots_P, k_LPTKH, v_LPTKH) -> KVCache:
  """Write prefilled prompts into slots; a slot number past the end is dropped."""

  def put(cache_LBKSH, new_LPTKH):
    new_LPKTH = jnp.swapaxes(new_LPTKH, 2, 3).astype(cache_LBKSH.dtype)
    return cache_LBKSH.at[:, slots_P, :, : new_LPKTH.shape[3]].set(new_LPKTH, mode="drop")

  return KVCache(put(kv_cache.k_LBKSH, k_LPTKH), put(kv_cache.v_LBKSH, v_LPTKH))


def split(kv_cache: KVCache) -> list[KVCache]:
  """One cache of one layer for each layer."""
  layers = range(kv_cache.k_LBKSH.shape[0])
  return [jax.tree.map(lambda x, i=i: x[i : i + 1], kv_cache) for i in layers]


def join(kv_caches: list[KVCache]) -> KVCache:
  """The inverse of `split`."""
  return jax.tree.map(lambda *x: jnp.concatenate(x), *kv_caches)
