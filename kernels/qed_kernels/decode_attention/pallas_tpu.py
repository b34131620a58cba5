"""Paged decode attention on a TPU, the append of the new token fused in (Pallas, Mosaic).

A grid step is one live page of one sequence, with all its key heads: steps are as many as the live
tokens need, whatever the table could hold. A (page, head) is a contiguous tile, so gathering pages
is an index map and Pallas' own pipeline does the copies. The softmax runs over K * R rows at once,
R the query heads of a key head padded to a tile's 8 rows.

The new token is merged into the tile of rows that holds its place on the sequence's last page, used
from there, and written through an aliased output that is flushed once a sequence: no scatter.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qed_kernels import choice

FIRST, LAST = 1, 2
LANES, SUBLANES = 128, 8
UNSEEN = -1e30
LOG2E = math.log2(math.e)
VMEM = 64 << 20
X_XT = (((1,), (1,)), ((), ()))  # products of two matrices: which dimension of each is summed
X_X = (((1,), (0,)), ((), ()))


def decode_attention(q_BTNH, k_BTKH, v_BTKH, cache, layer, positions_BT, scale: float):
  """As the reference, for one new token a sequence."""
  limits(q_BTNH, cache)
  B, _, N, H = q_BTNH.shape
  K = cache.k_LPKSH.shape[2]
  G = N // K
  R = -(-G // SUBLANES) * SUBLANES
  q_BKRH = jnp.pad(q_BTNH.reshape(B, K, G, H), ((0, 0), (0, 0), (0, R - G), (0, 0)))
  length_B = jnp.maximum(positions_BT[:, 0] + 1, 0)
  interpret = not choice.on_tpu()
  o_BKRH, k_LPKSH, v_LPKSH = attention(
    scale, interpret, q_BKRH, k_BTKH[:, 0], v_BTKH[:, 0], cache, layer, length_B
  )
  # The rows of a sequence without tokens were never written.
  o_BKRH = jnp.where((length_B > 0)[:, None, None, None], o_BKRH, 0)
  return o_BKRH[:, :, :G].reshape(B, 1, N, H), k_LPKSH, v_LPKSH


def limits(q_BTNH, cache) -> None:
  """Raises NotImplementedError, one line, for what the kernel cannot do."""
  (T, N, H), (K, S), dtype = q_BTNH.shape[1:], cache.k_LPKSH.shape[2:4], cache.k_LPKSH.dtype
  if T != 1:
    raise NotImplementedError(f"pallas_tpu: {T} new tokens a sequence, not 1")
  if N % K:
    raise NotImplementedError(f"pallas_tpu: {N} query heads are no multiple of {K} key heads")
  if S % LANES:
    raise NotImplementedError(f"pallas_tpu: pages of {S} tokens, not a multiple of {LANES}")
  if H % LANES:
    raise NotImplementedError(f"pallas_tpu: head_dim {H} is no multiple of {LANES}")
  if dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f"pallas_tpu: pages of {dtype}, not bfloat16 or float32")


def work_list(length_B, table_BP, page: int):
  """The live pages: sequence, page, first position and flags of each grid step, and how many.

  int32 [B * P] each; what is past the count is not visited. length_B counts the new token.
  """
  B, P = table_BP.shape
  pages_B = -(-length_B // page)
  end_B, step_X = jnp.cumsum(pages_B), jnp.arange(B * P)
  sequence_X = jnp.minimum(jnp.searchsorted(end_B, step_X, side="right"), B - 1)
  last_X = jnp.maximum(pages_B[sequence_X] - 1, 0)
  index_X = jnp.clip(step_X - (end_B - pages_B)[sequence_X], 0, last_X)
  flags_X = FIRST * (index_X == 0) + LAST * (index_X == last_X)
  lists = (sequence_X, table_BP[sequence_X, index_X], index_X * page, flags_X)
  return *(x.astype(jnp.int32) for x in lists), end_B[-1].astype(jnp.int32)


def attention(scale, interpret, q_BKRH, k_BKH, v_BKH, cache, layer, length_B):
  """-> o_BKRH and the pages with the new token in them; rows of empty sequences are unwritten."""
  B, K, R, H = q_BKRH.shape
  k_LPKSH, v_LPKSH, table_BP = cache.k_LPKSH, cache.v_LPKSH, cache.table_BP
  page, stored = k_LPKSH.shape[3], k_LPKSH.dtype
  rows = 32 // stored.itemsize  # of a native tile: the least that can be written
  sequence_X, page_X, first_X, flags_X, count = work_list(length_B, table_BP, page)
  newest_B = jnp.maximum(length_B - 1, 0)
  target_B = jnp.take_along_axis(table_BP, (newest_B // page)[:, None], axis=1)[:, 0]
  tile_B = newest_B % page // rows

  q_spec = pl.BlockSpec((None, K, R, H), lambda x, layer, sequence, *_: (sequence[x], 0, 0, 0))
  new_spec = pl.BlockSpec((None, K, 1, H), lambda x, layer, sequence, *_: (sequence[x], 0, 0, 0))
  page_spec = pl.BlockSpec(
    (None, None, K, page, H), lambda x, layer, sequence, page, *_: (layer[0], page[x], 0, 0, 0)
  )

  def written(x, layer, sequence, page, first, flags, length, target, tile):
    return layer[0], target[sequence[x]], 0, tile[sequence[x]], 0

  tile_spec = pl.BlockSpec((None, None, K, rows, H), written)
  of_rows = lambda: pltpu.VMEM((K * R, LANES), jnp.float32)  # noqa: E731
  scalars = (
    jnp.asarray(layer, jnp.int32).reshape(1), sequence_X, page_X, first_X, flags_X,
    *(x.astype(jnp.int32) for x in (length_B, target_B, tile_B)),
  )  # fmt: skip
  return pl.pallas_call(
    functools.partial(kernel, scale=scale, rows=rows),
    name="paged_decode",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(count,),
      in_specs=[q_spec, page_spec, page_spec, new_spec, new_spec],
      out_specs=[q_spec, tile_spec, tile_spec],
      scratch_shapes=[of_rows(), of_rows(), pltpu.VMEM((K * R, H), jnp.float32)],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(q_BKRH.shape, q_BKRH.dtype),
      jax.ShapeDtypeStruct(k_LPKSH.shape, stored),
      jax.ShapeDtypeStruct(v_LPKSH.shape, stored),
    ],
    input_output_aliases={len(scalars) + 1: 1, len(scalars) + 2: 2},
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM),
    interpret=interpret,
  )(
    *scalars,
    q_BKRH,
    k_LPKSH,
    v_LPKSH,
    # As float32, of which one row is a tile's row; a bfloat16 row is half of one.
    k_BKH.astype(jnp.float32)[:, :, None],
    v_BKH.astype(jnp.float32)[:, :, None],
  )


def dot(x, y, dims):
  """A product of two matrices into float32; float32 ones in full."""
  full = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return lax.dot_general(x, y, dims, precision=full, preferred_element_type=jnp.float32)


def kernel(
  layer_ref, sequence_ref, page_ref, first_ref, flags_ref, length_ref, target_ref, tile_ref,
  q_ref, k_ref, v_ref, new_k_ref, new_v_ref, o_ref, k_out_ref, v_out_ref,
  largest_ref, sums_ref, o_sum_ref, *, scale: float, rows: int,
):  # fmt: skip
  """One page: the new token merged in if it is the last one, scores, softmax so far, P V."""
  x = pl.program_id(0)
  flags, live = flags_ref[x], length_ref[sequence_ref[x]] - first_ref[x]  # tokens of this page
  (K, R, _), page = q_ref.shape, k_ref.shape[1]

  @pl.when((flags & FIRST) != 0)
  def _():
    largest_ref[...] = jnp.full_like(largest_ref, UNSEEN)
    sums_ref[...] = jnp.zeros_like(sums_ref)
    o_sum_ref[...] = jnp.zeros_like(o_sum_ref)

  @pl.when((flags & LAST) != 0)
  def _():
    newest = live - 1
    at = pl.ds(pl.multiple_of(newest // rows * rows, rows), rows)
    hit_1r1 = lax.broadcasted_iota(jnp.int32, (1, rows, 1), 1) == newest % rows
    for ref, new_ref, out_ref in ((k_ref, new_k_ref, k_out_ref), (v_ref, new_v_ref, v_out_ref)):
      old_KrH = ref[:, at, :].astype(jnp.float32)
      tile_KrH = jnp.where(hit_1r1, new_ref[...], old_KrH).astype(ref.dtype)
      ref[:, at, :] = tile_KrH
      out_ref[...] = tile_KrH

  def body(masked: bool) -> None:
    s_XS = jnp.concatenate([dot(q_ref[h], k_ref[h], X_XT) for h in range(K)]) * (scale * LOG2E)
    if masked:
      s_XS = jnp.where(lax.broadcasted_iota(jnp.int32, s_XS.shape, 1) < live, s_XS, UNSEEN)
    before_XL = largest_ref[...]  # all lanes alike
    largest_XL = jnp.maximum(before_XL, jnp.max(s_XS, axis=1, keepdims=True))
    p_XS = jnp.exp2(s_XS - jnp.tile(largest_XL, (1, page // LANES)))
    shrink_XL = jnp.exp2(before_XL - largest_XL)
    largest_ref[...] = largest_XL
    lane_sums_XL = sum(p_XS[:, i : i + LANES] for i in range(0, page, LANES))
    sums_ref[...] = sums_ref[...] * shrink_XL + lane_sums_XL
    p_XS = p_XS.astype(v_ref.dtype)
    for h in range(K):
      own = slice(h * R, (h + 1) * R)
      pv_RH = dot(p_XS[own], v_ref[h], X_X)
      o_sum_ref[own, :] = o_sum_ref[own, :] * shrink_XL[own, :1] + pv_RH

  pl.when((flags & LAST) == 0)(lambda: body(False))
  pl.when((flags & LAST) != 0)(lambda: body(True))

  @pl.when((flags & LAST) != 0)
  def _():
    sum_X1 = jnp.sum(sums_ref[...], axis=1, keepdims=True)
    o_ref[...] = (o_sum_ref[...] / sum_X1).astype(o_ref.dtype).reshape(o_ref.shape)
