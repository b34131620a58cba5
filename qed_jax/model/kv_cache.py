"""The paged key/value cache of the sampler: [L, P, K, S, H] for keys and for values.

A page holds S tokens of one sequence, (page, head)-contiguous (design section 8); a table row names
a sequence's pages in order. The cache is donated, carried whole through the scan over layers and
indexed by layer. Pages start zeroed and the values in them are finite, since 0 * NaN is NaN: what
a page held before can never reach who owns it next. Page 0 is nobody's: free slots point to it.

Where XLA's gather is dear (a CPU), a decode loop works on the pages of its slots laid side by side
(`gather`), each slot its own page, and gives them back at the end (`scatter`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qed_jax.sharding import constrain

NOBODY = 0  # the page that free slots and padding write to
INT8_MAX = 127.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """k_LPKSH, v_LPKSH: rotated keys and values by layer, page, head and offset in the page.

  In int8 each token and head has its own scale, so that what is stored depends on nothing else:
  k_scale_LPKS, v_scale_LPKS, float32; None otherwise. table_BP: int32, the pages of each sequence;
  None when sequence b is page b.
  """

  k_LPKSH: Any
  v_LPKSH: Any
  k_scale_LPKS: Any = None
  v_scale_LPKS: Any = None
  table_BP: Any = None

  @property
  def context(self) -> int:
    """Most tokens of a sequence."""
    pages = 1 if self.table_BP is None else self.table_BP.shape[1]
    return pages * self.k_LPKSH.shape[3]


def create(config, pages: int, page: int, dtype: str, by_layer: bool) -> KVCache | list[KVCache]:
  """Zeroed pages of `page` tokens, stored as `dtype` ("int8" or a float type).

  by_layer: a list with a cache of one layer for each layer, for parameters of numbered layers.
  """
  layers = 1 if by_layer else config.num_layers

  def one():
    shape = (layers, pages, config.num_kv_heads, page, config.head_dim)
    scale = (lambda: jnp.zeros(shape[:-1])) if dtype == "int8" else lambda: None
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scale(), scale())

  return [one() for _ in range(config.num_layers)] if by_layer else one()


def bytes_per_token(config, dtype: str) -> int:
  """Keys and values of one token over all layers."""
  a_head = config.head_dim * jnp.dtype(dtype).itemsize + (4 if dtype == "int8" else 0)
  return 2 * config.num_layers * config.num_kv_heads * a_head


def lay_out(kv_cache: KVCache) -> KVCache:
  """Pins the layout over the mesh: heads over `tensor`."""
  letters = {"k_LPKSH": "L_KSH", "v_LPKSH": "L_KSH", "k_scale_LPKS": "L_KS", "v_scale_LPKS": "L_KS"}
  return dataclasses.replace(kv_cache, **{
    name: constrain(x, letter)
    for name, letter in letters.items()
    if (x := getattr(kv_cache, name)) is not None
  })  # fmt: skip


def append(kv_cache: KVCache, layer, k_BTKH, v_BTKH, positions_BT) -> KVCache:
  """Write T tokens of every sequence at their positions; one without a page there is dropped.

  A negative position is padding and is dropped too.
  """
  pages, S = kv_cache.k_LPKSH.shape[1], kv_cache.k_LPKSH.shape[3]
  slots_B1 = jnp.arange(k_BTKH.shape[0])[:, None]
  if kv_cache.table_BP is None:
    page_BT = jnp.where(positions_BT < S, slots_B1, pages)
  else:
    width = kv_cache.table_BP.shape[1]
    index_BT = jnp.clip(positions_BT // S, 0, width - 1)
    page_BT = jnp.take_along_axis(kv_cache.table_BP, index_BT, axis=1)
    page_BT = jnp.where(positions_BT < width * S, page_BT, pages)
  page_BT = jnp.where(positions_BT < 0, pages, page_BT)
  offset_BT = positions_BT % S

  def put(cache_LPKSx, new_BTKx):
    if k_BTKH.shape[1] > 1:
      # Key heads among the indices: for a window over them XLA for TPUs copies the whole pool.
      head_11K = jnp.arange(new_BTKx.shape[2])[None, None]
      place = (layer, page_BT[:, :, None], head_11K, offset_BT[:, :, None])
      return cache_LPKSx.at[place].set(new_BTKx.astype(cache_LPKSx.dtype), mode="drop")
    # Indices [B, T] around the slice over K come first in the result: [B, T, K, ...].
    return cache_LPKSx.at[layer, page_BT, :, offset_BT].set(
      new_BTKx.astype(cache_LPKSx.dtype), mode="drop"
    )

  k_BTKH, v_BTKH, k_scale_BTK, v_scale_BTK = stored(kv_cache, k_BTKH, v_BTKH)
  kv_cache = dataclasses.replace(
    kv_cache, k_LPKSH=put(kv_cache.k_LPKSH, k_BTKH), v_LPKSH=put(kv_cache.v_LPKSH, v_BTKH)
  )
  if k_scale_BTK is None:
    return kv_cache
  return dataclasses.replace(
    kv_cache,
    k_scale_LPKS=put(kv_cache.k_scale_LPKS, k_scale_BTK),
    v_scale_LPKS=put(kv_cache.v_scale_LPKS, v_scale_BTK),
  )


def stored(kv_cache: KVCache, k_BTKH, v_BTKH) -> tuple[Any, Any, Any, Any]:
  """New tokens as the pages hold them: k_BTKH, v_BTKH, and k_scale_BTK, v_scale_BTK or None."""
  if kv_cache.k_scale_LPKS is None:
    dtype = kv_cache.k_LPKSH.dtype
    return *marked(k_BTKH.astype(dtype), v_BTKH.astype(dtype)), None, None
  k_BTKH, v_BTKH = marked(k_BTKH, v_BTKH)
  (k_BTKH, k_scale_BTK), (v_BTKH, v_scale_BTK) = quantise(k_BTKH), quantise(v_BTKH)
  return k_BTKH, v_BTKH, k_scale_BTK, v_scale_BTK


def read(kv_cache: KVCache, layer, dtype) -> tuple[Any, Any]:
  """One layer's keys and values of every sequence, side by side: k_BKSH, v_BKSH in `dtype`."""
  table_BP = kv_cache.table_BP
  if table_BP is None:
    own = lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)  # noqa: E731
    return own(kv_cache.k_LPKSH).astype(dtype), own(kv_cache.v_LPKSH).astype(dtype)
  B, P = table_BP.shape

  def side_by_side(x_LPKSH, scale_LPKS):
    x_BPKSH = x_LPKSH[layer, table_BP].astype(dtype)
    if scale_LPKS is not None:
      x_BPKSH *= scale_LPKS[layer, table_BP][..., None].astype(dtype)
    K, S, H = x_BPKSH.shape[2:]
    return jnp.moveaxis(x_BPKSH, 1, 2).reshape(B, K, P * S, H)

  return (
    side_by_side(kv_cache.k_LPKSH, kv_cache.k_scale_LPKS),
    side_by_side(kv_cache.v_LPKSH, kv_cache.v_scale_LPKS),
  )


def with_table(kv_cache: KVCache | list[KVCache], table_BP) -> KVCache | list[KVCache]:
  """The pages under another table."""
  if isinstance(kv_cache, list):
    return [with_table(one, table_BP) for one in kv_cache]
  return dataclasses.replace(kv_cache, table_BP=table_BP)


def gather(kv_cache: KVCache, table_BP) -> KVCache:
  """The pages of every sequence as one page of its own."""
  B, P = table_BP.shape

  def side_by_side(x_LPKSH):
    x_LBPKSH = x_LPKSH[:, table_BP]
    L, _, _, K, S, H = x_LBPKSH.shape
    return jnp.moveaxis(x_LBPKSH, 2, 3).reshape(L, B, K, P * S, H)

  return KVCache(side_by_side(kv_cache.k_LPKSH), side_by_side(kv_cache.v_LPKSH))


def scatter(kv_cache: KVCache, working: KVCache, table_BP, first_B, last_B, most: int) -> KVCache:
  """Gives back the pages of positions first_B <= p < last_B of a gathered cache, `most` at most."""
  pages, S = kv_cache.k_LPKSH.shape[1], kv_cache.k_LPKSH.shape[3]
  B, P = table_BP.shape
  index_BW = first_B[:, None] // S + jnp.arange(min(P, (most - 1) // S + 2))[None]
  written_BW = (index_BW * S < last_B[:, None]) & (index_BW < P)
  inside_BW = jnp.minimum(index_BW, P - 1)
  page_BW = jnp.where(written_BW, jnp.take_along_axis(table_BP, inside_BW, axis=1), pages)

  def put(x_LPKSH, working_LBKSH):
    L, _, K, _, H = working_LBKSH.shape
    parts_LBKPSH = working_LBKSH.reshape(L, B, K, P, S, H)
    chosen_BW = inside_BW[None, :, None, :, None, None]
    parts_LBKWSH = jnp.take_along_axis(parts_LBKPSH, chosen_BW, axis=3)
    return x_LPKSH.at[:, page_BW].set(jnp.moveaxis(parts_LBKWSH, 3, 2), mode="drop")

  return dataclasses.replace(
    kv_cache,
    k_LPKSH=put(kv_cache.k_LPKSH, working.k_LPKSH),
    v_LPKSH=put(kv_cache.v_LPKSH, working.v_LPKSH),
  )


def copy(kv_cache: KVCache, source_R, target_R) -> KVCache:
  """Page target_R[i] becomes a copy of source_R[i]; a target past the end is dropped."""

  def put(x_LPKSx):
    return x_LPKSx.at[:, target_R].set(x_LPKSx[:, source_R], mode="drop")

  return jax.tree.map(put, kv_cache)


def marked(k_BTKH, v_BTKH) -> tuple[Any, Any]:
  """A token with a nan or an infinity: its key becomes nan and its value 0.

  The score of a nan key is nan to the queries that see it, whose logits then are not finite, and
  masked to all others, while a masked value is multiplied by 0 and has to be finite.
  """
  finite_BTKH = jnp.isfinite(k_BTKH) & jnp.isfinite(v_BTKH)
  finite_BTK1 = jnp.all(finite_BTKH, axis=-1, keepdims=True)
  return jnp.where(finite_BTK1, k_BTKH, jnp.nan), jnp.where(finite_BTK1, v_BTKH, 0)


def quantise(x_BTKH) -> tuple[Any, Any]:
  """int8 [B, T, K, H] and the scale of each token and head, float32 [B, T, K]."""
  x_BTKH = x_BTKH.astype(jnp.float32)
  scale_BTK = jnp.max(jnp.abs(x_BTKH), axis=-1) / INT8_MAX
  rounded_BTKH = jnp.round(x_BTKH / jnp.maximum(scale_BTK, 1e-30)[..., None])
  return rounded_BTKH.astype(jnp.int8), scale_BTK
