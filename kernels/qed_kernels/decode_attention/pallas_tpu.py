"""Paged decode attention on a TPU, the append of the new token fused in (Pallas, Mosaic).

A grid step is one live page of one sequence, with all its key heads (on the two cores of a v5p half
of them each): steps are as many as the live tokens need, whatever the table could hold. A (page,
head) is a contiguous tile, so gathering pages is an index map and Pallas' own pipeline does the
copies. The softmax runs over K * R rows at once, R the query heads of a key head padded to a tile's
8 rows.

The new token is merged into the tile of rows that holds its place on the sequence's last page, used
from there, and written through an aliased output that is flushed once a sequence: no scatter.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qed_kernels import choice
from qed_kernels.decode_attention import xla

FIRST, LAST = 1, 2
ROWS = 64  # of a key head: what "a few" new tokens are; more are a prefill
LANES, SUBLANES = 128, 8
UNSEEN = -1e30
LOG2E = math.log2(math.e)
VMEM = 64 << 20
X_XT = (((1,), (1,)), ((), ()))  # products of two matrices: which dimension of each is summed
X_X = (((1,), (0,)), ((), ()))


def decode_attention(q_BTNH, new, cache, layer, positions_BT, scale: float):
  """As the reference. Several new tokens a sequence are written by a scatter before."""
  limits(q_BTNH, cache)
  B, T, N, H = q_BTNH.shape
  K = cache.k_LPKSH.shape[2]
  q_BKXH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, -1, H)
  pad = -q_BKXH.shape[2] % SUBLANES
  q_BKRH = jnp.pad(q_BKXH, ((0, 0), (0, 0), (0, pad), (0, 0)))
  room = cache.table_BP.shape[1] * cache.k_LPKSH.shape[3]
  length_B = jnp.clip(jnp.max(positions_BT, axis=1) + 1, 0, room)
  rest = (layer, length_B)
  if T == 1:
    o_BKRH, cache = attention(scale, not choice.on_tpu(), q_BKRH, new, None, cache, *rest)
  else:
    cache = xla.append(new, cache, layer, positions_BT)
    at_BR = jnp.pad(jnp.tile(positions_BT, (1, N // K)), ((0, 0), (0, pad)), constant_values=-1)
    o_BKRH, _ = attention(scale, not choice.on_tpu(), q_BKRH, None, at_BR, cache, *rest)
  o_BKGTH = o_BKRH[:, :, : N // K * T].reshape(B, K, N // K, T, H)
  o_BTNH = jnp.moveaxis(o_BKGTH, 3, 1).reshape(q_BTNH.shape)
  # The rows of a sequence without tokens were never written.
  return jnp.where((positions_BT >= 0)[:, :, None, None], o_BTNH, 0), cache


def limits(q_BTNH, cache) -> None:
  """Raises NotImplementedError, one line, for what the kernel cannot do."""
  (T, N, H), (K, S), dtype = q_BTNH.shape[1:], cache.k_LPKSH.shape[2:4], cache.k_LPKSH.dtype
  if N % K:
    raise NotImplementedError(f"pallas_tpu: {N} query heads are no multiple of {K} key heads")
  if T > 1 and T * N // K > ROWS:
    raise NotImplementedError(f"pallas_tpu: {T} new tokens of {N // K} heads are over {ROWS} rows")
  if S % LANES:
    raise NotImplementedError(f"pallas_tpu: pages of {S} tokens, not a multiple of {LANES}")
  if H % LANES:
    raise NotImplementedError(f"pallas_tpu: head_dim {H} is no multiple of {LANES}")
  if dtype not in (jnp.bfloat16, jnp.float32, jnp.int8):
    raise NotImplementedError(f"pallas_tpu: pages of {dtype}, not bfloat16, float32 or int8")


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


def cores(K: int, stored) -> int:
  """How many cores of a chip share the key heads: the two of a v5p, where what they get of an array
  is still whole tiles."""
  two = choice.device().device_kind == "TPU v5" and K % 2 == 0 and stored != jnp.int8
  return 2 if two else 1


def attention(scale, interpret, q_BKRH, new, at_BR, cache, layer, length_B):
  """-> o_BKRH and the cache; rows of empty sequences are unwritten.

  Either one new token a sequence, which is written; or at_BR, int32, up to which position each row
  sees what is in the cache already.
  """
  B, K, R, H = q_BKRH.shape
  page, stored, table_BP = cache.k_LPKSH.shape[3], cache.k_LPKSH.dtype, cache.table_BP
  rows = 32 // stored.itemsize  # of a native tile: the least that can be written
  sequence_X, page_X, first_X, flags_X, count = work_list(length_B, table_BP, page)
  newest_B = jnp.maximum(length_B - 1, 0)
  target_B = jnp.take_along_axis(table_BP, (newest_B // page)[:, None], axis=1)[:, 0]
  tile_B = newest_B % page // rows
  scalars = (
    jnp.asarray(layer, jnp.int32).reshape(1), sequence_X, page_X, first_X, flags_X,
    *(x.astype(jnp.int32) for x in (length_B, target_B, tile_B)),
  )  # fmt: skip

  # All blocks have some of the key heads behind what says which page or sequence they are of.
  def spec(shape, at, zeros):
    return pl.BlockSpec(shape, lambda h, x, *scalars: (*at(x, *scalars), h, *(0,) * zeros))

  def of_page(x, layer, sequence, page, *_):
    return layer[0], page[x]

  def of_newest(x, layer, sequence, page, first, flags, length, target, tile):
    return layer[0], target[sequence[x]]

  def of_tile(h, x, layer, sequence, page, first, flags, length, target, tile):
    return layer[0], target[sequence[x]], h, tile[sequence[x]], 0

  halves = cores(K, stored)
  K //= halves
  of_sequence = lambda x, layer, sequence, *_: (sequence[x],)  # noqa: E731
  q_spec = spec((None, K, R, H), of_sequence, 2)
  page_spec = spec((None, None, K, page, H), of_page, 2)
  new_spec = spec((None, K, 1, H), of_sequence, 2)
  tile_spec = pl.BlockSpec((None, None, K, rows, H), of_tile)
  pages, page_specs = [cache.k_LPKSH, cache.v_LPKSH], [page_spec] * 2
  if stored == jnp.int8:
    pages += [cache.k_scale_LPKS, cache.v_scale_LPKS]
    page_specs += [spec((None, None, K, page), of_page, 1)] * 2
  if new is None:
    at_spec = pl.BlockSpec(
      (None, R, LANES), lambda h, x, *scalars: (*of_sequence(x, *scalars), 0, 0)
    )
    others, other_specs, out_specs = [across(at_BR)], [at_spec], []
  else:
    # As float32, of which one row is a tile's row; rows of smaller types are parts of one.
    others = [x_B1KH.astype(jnp.float32)[:, 0, :, None] for x_B1KH in (new.k_BTKH, new.v_BTKH)]
    other_specs, out_specs = [new_spec] * 2, [tile_spec] * 2
    if stored == jnp.int8:
      others += [x_B1K[:, 0, :, None] for x_B1K in (new.k_scale_BTK, new.v_scale_BTK)]
      other_specs += [spec((None, K, 1), of_sequence, 1)] * 2
      out_specs += [spec((None, None, K, page), of_newest, 1)] * 2

  of_rows = lambda: pltpu.VMEM((K * R, LANES), jnp.float32)  # noqa: E731
  abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
  o_BKRH, *written = pl.pallas_call(
    functools.partial(kernel, scale=scale, rows=rows, arrays=len(pages), append=new is not None),
    name="paged_decode",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(halves, count),
      in_specs=[q_spec, *page_specs, *other_specs],
      out_specs=[q_spec, *out_specs],
      scratch_shapes=[of_rows(), of_rows(), pltpu.VMEM((K * R, H), jnp.float32)],
    ),
    out_shape=[abstract(q_BKRH), *map(abstract, pages[: len(out_specs)])],
    input_output_aliases={len(scalars) + 1 + i: 1 + i for i in range(len(out_specs))},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
    ),
    interpret=interpret,
  )(*scalars, q_BKRH, *pages, *others)
  names = ("k_LPKSH", "v_LPKSH", "k_scale_LPKS", "v_scale_LPKS")
  return o_BKRH, dataclasses.replace(cache, **dict(zip(names, written, strict=False)))


def dot(x, y, dims):
  """A product of two matrices into float32; float32 ones in full."""
  full = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return lax.dot_general(x, y, dims, precision=full, preferred_element_type=jnp.float32)


def across(x_BR):
  """[B, R] -> [B, R, LANES], the same in all lanes."""
  return jnp.broadcast_to(x_BR[..., None], (*x_BR.shape, LANES))


def kernel(
  layer_ref, sequence_ref, page_ref, first_ref, flags_ref, length_ref, target_ref, tile_ref,
  q_ref, *refs, scale: float, rows: int, arrays: int, append: bool,
):  # fmt: skip
  """One page: the new token merged in if it is the last one, scores, softmax so far, P V.

  refs: keys and values of the page, with int8 their scales; the same of the new token, or without
  `append` the rows' positions; the output; what is written of the page; scratch. arrays: 2, or 4
  with scales.
  """
  refs, (largest_ref, sums_ref, o_sum_ref) = refs[:-3], refs[-3:]
  page_refs, refs = refs[:arrays], refs[arrays:]
  if append:
    new_refs, o_ref, out_refs = refs[:arrays], refs[arrays], refs[arrays + 1 :]
  else:
    at_ref, o_ref = refs
  (k_ref, v_ref), scale_refs = page_refs[:2], page_refs[2:]
  x = pl.program_id(1)
  first = first_ref[x]
  flags, live = flags_ref[x], length_ref[sequence_ref[x]] - first  # tokens of this page
  (K, R, _), page = q_ref.shape, k_ref.shape[1]

  @pl.when((flags & FIRST) != 0)
  def _():
    largest_ref[...] = jnp.full_like(largest_ref, UNSEEN)
    sums_ref[...] = jnp.zeros_like(sums_ref)
    o_sum_ref[...] = jnp.zeros_like(o_sum_ref)

  def merge() -> None:
    newest = live - 1
    at = pl.ds(pl.multiple_of(newest // rows * rows, rows), rows)
    hit_1r1 = lax.broadcasted_iota(jnp.int32, (1, rows, 1), 1) == newest % rows
    for ref, new_ref, out_ref in zip(page_refs[:2], new_refs[:2], out_refs[:2], strict=True):
      old_KrH = ref[:, at, :].astype(jnp.float32)
      tile_KrH = jnp.where(hit_1r1, new_ref[...], old_KrH).astype(ref.dtype)
      ref[:, at, :] = tile_KrH
      out_ref[...] = tile_KrH
    for ref, new_ref, out_ref in zip(scale_refs, new_refs[2:], out_refs[2:], strict=True):
      hit_KS = lax.broadcasted_iota(jnp.int32, ref.shape, 1) == newest
      scale_KS = jnp.where(hit_KS, new_ref[...], ref[...])
      ref[...] = scale_KS
      out_ref[...] = scale_KS

  if append:
    pl.when((flags & LAST) != 0)(merge)

  def seen(shape):
    key_XS = lax.broadcasted_iota(jnp.int32, shape, 1)
    if append:
      return key_XS < live
    at_XS = jnp.tile(at_ref[...], (K, page // LANES))
    return key_XS + first <= at_XS

  def body(masked: bool) -> None:
    by_head = []
    for h in range(K):
      s_RS = dot(q_ref[h], k_ref[h].astype(q_ref.dtype), X_XT)
      by_head.append(s_RS * scale_refs[0][h : h + 1, :] if scale_refs else s_RS)
    s_XS = jnp.concatenate(by_head) * (scale * LOG2E)
    if masked:
      s_XS = jnp.where(seen(s_XS.shape), s_XS, UNSEEN)
    before_XL = largest_ref[...]  # all lanes alike
    largest_XL = jnp.maximum(before_XL, jnp.max(s_XS, axis=1, keepdims=True))
    p_XS = jnp.exp2(s_XS - jnp.tile(largest_XL, (1, page // LANES)))
    shrink_XL = jnp.exp2(before_XL - largest_XL)
    largest_ref[...] = largest_XL
    lane_sums_XL = sum(p_XS[:, i : i + LANES] for i in range(0, page, LANES))
    sums_ref[...] = sums_ref[...] * shrink_XL + lane_sums_XL
    for h in range(K):
      own = slice(h * R, (h + 1) * R)
      p_RS = p_XS[own] * scale_refs[1][h : h + 1, :] if scale_refs else p_XS[own]
      pv_RH = dot(p_RS.astype(q_ref.dtype), v_ref[h].astype(q_ref.dtype), X_X)
      o_sum_ref[own, :] = o_sum_ref[own, :] * shrink_XL[own, :1] + pv_RH

  # Of several new tokens, the earlier ones do not see the later, on this page or the one before.
  ends_here = (flags & LAST) != 0 if append else live < page + R
  pl.when(jnp.logical_not(ends_here))(lambda: body(False))
  pl.when(ends_here)(lambda: body(True))

  @pl.when((flags & LAST) != 0)
  def _():
    sum_X1 = jnp.sum(sums_ref[...], axis=1, keepdims=True)
    o_ref[...] = (o_sum_ref[...] / sum_X1).astype(o_ref.dtype).reshape(o_ref.shape)
