"""Which tiles of the [T, S] rectangle of scores a packed row needs, as lists for a kernel's grid.

A tile is a block of queries by a block of keys. Those above the diagonal or in other segments are
not in the list: they cost nothing, not even a grid step. The lists depend on the segments alone and
are made once a batch for all layers and both passes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

FIRST, LAST, MASKED, VALID = 1, 2, 4, 8  # flags of a tile


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
  """Tiles of a row in the order in which they are visited, X of them for the worst row.

  query_BX, key_BX: int32, the blocks. flags_BX: int32; FIRST and LAST of their group, MASKED where
  part of the tile is not seen, VALID; 0 on the idle entries past count_B, which repeat the last
  tile. The tiles of a group share their query block ("by query") or their key block ("by key").
  touched_BG: bool, whether block G of what is grouped by is in any tile.
  """

  query_BX: Any
  key_BX: Any
  flags_BX: Any
  count_B: Any
  touched_BG: Any


def tiles(start_BT, query_block: int, key_block: int, by: str, first: int = 0) -> Tiles:
  """The tiles of queries first, ..., first + T - 1 of rows; query t sees keys start[t] <= s <= t.

  start_BT: int32, of these queries alone. query_block divides T, key_block divides first + T.
  by: "query" for a pass that sums over keys, "key" for one that sums over queries.
  """
  B, T = start_BT.shape
  queries, keys = T // query_block, (first + T) // key_block
  first_1Q1 = first + jnp.arange(queries)[None, :, None] * query_block
  first_11K = jnp.arange(keys)[None, None] * key_block
  start_BQq = start_BT.reshape(B, queries, query_block)  # does not fall along a row
  seen_BQK = (first_11K < first_1Q1 + query_block) & (first_11K + key_block > start_BQq[..., :1])
  whole_BQK = (first_11K + key_block - 1 <= first_1Q1) & (first_11K >= start_BQq[..., -1:])
  if by == "key":
    seen_BQK, whole_BQK = jnp.swapaxes(seen_BQK, 1, 2), jnp.swapaxes(whole_BQK, 1, 2)
  most = sum(-(-(first + (i + 1) * query_block) // key_block) for i in range(queries))

  def of_row(seen_GI, whole_GI):
    inner = seen_GI.shape[1]
    found_X = jnp.nonzero(seen_GI.ravel(), size=most, fill_value=0)[0]
    count, step_X = jnp.sum(seen_GI), jnp.arange(most)
    valid_X = step_X < count
    index_X = jnp.where(valid_X, found_X, found_X[count - 1])
    group_X = index_X // inner
    new_X = group_X != jnp.roll(group_X, 1)
    first_X = (step_X == 0) | new_X
    last_X = (step_X == count - 1) | jnp.roll(new_X, -1)
    masked_X = ~whole_GI.ravel()[index_X]
    flags_X = FIRST * first_X + LAST * last_X + MASKED * masked_X + VALID
    return group_X, index_X % inner, jnp.where(valid_X, flags_X, 0), count

  group_BX, inner_BX, flags_BX, count_B = jax.vmap(of_row)(seen_BQK, whole_BQK)
  query_BX, key_BX = (group_BX, inner_BX) if by == "query" else (inner_BX, group_BX)
  lists = (x.astype(jnp.int32) for x in (query_BX, key_BX, flags_BX, count_B))
  return Tiles(*lists, touched_BG=jnp.any(seen_BQK, axis=2))
