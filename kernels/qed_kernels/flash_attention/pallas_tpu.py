"""Flash attention of packed rows on a TPU: one forward and one backward kernel (Pallas, Mosaic).

A grid step is one tile of tiles.py: `query` tokens of all G query heads of a key head, stacked to
X = G * query rows, by `key` tokens. K and V are fetched once for the G heads, and dK and dV need no
sum over heads. Scores are in base 2 (exp2 is what the hardware has), sums and accumulators float32.

The forward pass keeps the running maximum in all 128 lanes, and the running sum as 128 partial sums
that are added up once, at the end: additions in place of reductions across lanes. The backward pass
visits tiles by key block and is one kernel of five products: dK and dV of a key block are summed in
VMEM, and so is dQ of all the queries of a call, which is why long rows take several calls. Nothing
is added up in an order that could vary: the gradients are the same to the bit from run to run.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qed_kernels import choice
from qed_kernels.flash_attention.residuals import named
from qed_kernels.flash_attention.tiles import FIRST, LAST, MASKED, VALID, Tiles, tiles

LANES = 128
UNSEEN = -1e30
LOG2E = math.log2(math.e)
QUERY_GRADIENTS = 16 << 20  # bytes of VMEM for dQ of the queries of a backward call
VMEM = 64 << 20  # bytes that a kernel may ask for: what a core of a v5p has, half of a v5e or v6e
X_XT = (((1,), (1,)), ((), ()))  # products of two matrices: which dimension of each is summed
X_X = (((1,), (0,)), ((), ()))
XT_X = (((0,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Tokens of a tile: `query` by `key`, its scores made `part` keys at a time; of padded rows.

  queries, keys: padded to whole blocks. first: the key of the first query.
  """

  query: int
  key: int
  part: int
  queries: int
  keys: int

  @property
  def first(self) -> int:
    return self.keys - self.queries


def blocks(T: int, S: int) -> Blocks:
  """For the last T of S tokens."""
  if S <= LANES:
    return Blocks(LANES, LANES, LANES, LANES, LANES)
  key = min(1024, -(-S // 256) * 256)
  # The wider units of a v6e are kept busier by twice the rows (tools/tpu_static.py).
  query = 512 if key % 512 == 0 and choice.device().device_kind.startswith("TPU v6") else 256
  part = 512 if key % 512 == 0 else 256
  return Blocks(query, key, part, -(-T // query) * query, -(-S // key) * key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """The padded rows, their tiles by query, and their tiles by key for each backward call.

  Padding is in front, so that the last query stays the token of the last key.
  """

  start_BT: Any
  forward: Tiles
  backward: tuple[Tiles, ...]


def plan(start_BT, keys: int, group: int, head_dim: int) -> Plan:
  """start_BT: int32, of the last T keys. group: query heads of a key head. Once a batch."""
  T = start_BT.shape[1]
  b = blocks(T, keys)
  start_BT = start_BT + (b.keys - keys)
  # Padding sees itself, and starts never fall.
  padding_BT = jnp.minimum(jnp.repeat(start_BT[:, :1], b.queries - T, axis=1), b.first)
  start_BT = jnp.concatenate([padding_BT, start_BT], axis=1)
  backward = tuple(
    tiles(start_BT[:, first - b.first : until - b.first], b.query, b.key, "key", first)
    for first, until in calls(b, group, head_dim)
  )
  return Plan(start_BT, tiles(start_BT, b.query, b.key, "query", b.first), backward)


def calls(b: Blocks, group: int, head_dim: int) -> list[tuple[int, int]]:
  """Where the queries of each backward call begin and end, as keys: dQ of them fits into VMEM."""
  fits = max(1, QUERY_GRADIENTS // (4 * group * head_dim * b.key)) * b.key
  cuts = [b.first, *range((b.first // fits + 1) * fits, b.keys, fits), b.keys]
  return list(itertools.pairwise(cuts))


def flash_attention(q_BTNH, k_BSKH, v_BSKH, rows, scale: float):
  """As the reference: o_BTNH, and lse_BTN in float32. rows.plan is of `plan`."""
  limits(q_BTNH, k_BSKH)
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  b = blocks(T, S)
  pad = lambda x, size: jnp.pad(x, ((0, 0), (size - x.shape[1], 0), (0, 0), (0, 0)))  # noqa: E731
  q_BKGTH = jnp.transpose(pad(q_BTNH, b.queries).reshape(B, -1, K, N // K, H), (0, 2, 3, 1, 4))
  k_BKSH, v_BKSH = (jnp.swapaxes(pad(x, b.keys), 1, 2) for x in (k_BSKH, v_BSKH))
  interpret = not choice.on_tpu()
  o_BKGTH, lse_BKGT = attention(scale, interpret, q_BKGTH, k_BKSH, v_BKSH, rows.plan)
  o_BTNH = jnp.transpose(o_BKGTH, (0, 3, 1, 2, 4)).reshape(B, -1, N, H)[:, -T:]
  return o_BTNH, jnp.transpose(lse_BKGT, (0, 3, 1, 2)).reshape(B, -1, N)[:, -T:]


def limits(q_BTNH, k_BSKH) -> None:
  """Raises NotImplementedError, one line, for what the kernels cannot do."""
  H, N, K = q_BTNH.shape[3], q_BTNH.shape[2], k_BSKH.shape[2]
  if H % 64 or H > 256:
    raise NotImplementedError(f"pallas_tpu: head_dim {H} is not 64, 128, 192 or 256")
  if N % K:
    raise NotImplementedError(f"pallas_tpu: {N} query heads are no multiple of {K} key heads")
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f"pallas_tpu: {q_BTNH.dtype} is neither bfloat16 nor float32")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(scale: float, interpret: Any, q_BKGTH, k_BKSH, v_BKSH, plan: Plan):
  """o_BKGTH and lse_BKGT (natural logarithm) of padded rows."""
  o_BKGTH, lse2_BKQ1X = forward(scale, interpret, q_BKGTH, k_BKSH, v_BKSH, plan)
  return o_BKGTH, from_rows(lse2_BKQ1X, q_BKGTH.shape) / LOG2E


def attention_forward(scale, interpret, q_BKGTH, k_BKSH, v_BKSH, plan):
  o_BKGTH, lse2_BKQ1X = named(*forward(scale, interpret, q_BKGTH, k_BKSH, v_BKSH, plan))
  lse_BKGT = from_rows(lse2_BKQ1X, q_BKGTH.shape) / LOG2E
  return (o_BKGTH, lse_BKGT), (q_BKGTH, k_BKSH, v_BKSH, plan, o_BKGTH, lse2_BKQ1X)


def attention_backward(scale, interpret, kept, cotangents):
  q_BKGTH, k_BKSH, v_BKSH, plan, o_BKGTH, lse2_BKQ1X = kept
  do_BKGTH, dlse_BKGT = cotangents
  G, T, H = q_BKGTH.shape[2:]
  b = blocks(T, k_BKSH.shape[2])
  # d score = p (dp - sum(p dp)) + p dlse, and sum(p dp) = sum(o do).
  own_BKGT = jnp.einsum("BKGTH,BKGTH->BKGT", o_BKGTH, do_BKGTH, preferred_element_type=jnp.float32)
  offset_BKQ1X = to_rows(own_BKGT - dlse_BKGT, b.query)
  dq, dk, dv = [], jnp.zeros(k_BKSH.shape, jnp.float32), jnp.zeros(v_BKSH.shape, jnp.float32)
  for (first, until), part in zip(calls(b, G, H), plan.backward, strict=True):
    here = slice(first - b.first, until - b.first)
    rows = slice(here.start // b.query, here.stop // b.query)
    dq_here, dk_here, dv_here = backward(
      scale, interpret, b, first, part, plan.start_BT[:, here],
      q_BKGTH[:, :, :, here], k_BKSH[:, :, :until], v_BKSH[:, :, :until], do_BKGTH[:, :, :, here],
      lse2_BKQ1X[:, :, rows], offset_BKQ1X[:, :, rows],
    )  # fmt: skip
    dq.append(dq_here)
    dk, dv = dk.at[:, :, :until].add(dk_here), dv.at[:, :, :until].add(dv_here)
  return jnp.concatenate(dq, axis=3), dk.astype(k_BKSH.dtype), dv.astype(v_BKSH.dtype), None


attention.defvjp(attention_forward, attention_backward)


def to_rows(x_BKGT, query: int):
  """[B, K, G, T] -> [B, K, Q, 1, X]: the rows of each query block's tiles as one lane vector."""
  B, K, G, T = x_BKGT.shape
  x_BKQGq = jnp.swapaxes(x_BKGT.reshape(B, K, G, T // query, query), 2, 3)
  return x_BKQGq.reshape(B, K, T // query, 1, G * query)


def from_rows(x_BKQ1X, shape):
  """The inverse of `to_rows`."""
  B, K, G, T = shape[:4]
  return jnp.swapaxes(x_BKQ1X.reshape(B, K, -1, G, T // x_BKQ1X.shape[2]), 2, 3).reshape(B, K, G, T)


def dot(x, y, dims):
  """A product of two matrices into float32; float32 ones in full."""
  full = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return lax.dot_general(x, y, dims, precision=full, preferred_element_type=jnp.float32)


def cost(q_BKGTH, k_BKSH, products: int):
  """What XLA's scheduler is told: the causal part of the scores, and each array read once."""
  T, H = q_BKGTH.shape[3:]
  scores = q_BKGTH.size // H * (2 * k_BKSH.shape[2] - T) // 2
  return pl.CostEstimate(
    flops=2 * products * scores * H,
    transcendentals=scores,
    bytes_accessed=(2 * q_BKGTH.size + 2 * k_BKSH.size) * q_BKGTH.dtype.itemsize,
  )


def each_kind(flags, body) -> None:
  """body(masked) of a valid tile, compiled twice: tiles seen whole pay nothing for masks."""
  pl.when((flags & (MASKED | VALID)) == VALID)(lambda: body(False))
  pl.when((flags & (MASKED | VALID)) == MASKED | VALID)(lambda: body(True))


def tile_specs(b: Blocks, G: int, H: int, entries: int):
  """What a tile reads or writes of [B, K, G, T, H], of [B, K, S, H] and of [B, K, Q, 1, X]."""
  tile = lambda n, t: n * entries + t  # noqa: E731
  return (
    pl.BlockSpec(
      (None, None, G, b.query, H), lambda n, h, t, query, *_: (n, h, 0, query[tile(n, t)], 0)
    ),
    pl.BlockSpec((None, None, b.key, H), lambda n, h, t, query, key, _: (n, h, key[tile(n, t)], 0)),
    pl.BlockSpec(
      (None, None, None, 1, G * b.query),
      lambda n, h, t, query, *_: (n, h, query[tile(n, t)], 0, 0),
    ),
  )


def over_tiles(kernel, name, listed: Tiles, *, inputs, outputs, scratch, products, interpret):
  """Runs a kernel over the listed tiles of every row and key head -> its outputs.

  inputs: arrays and their specs; the first two are q and k. outputs: shapes and their specs.
  scratch: shapes of float32 in VMEM. products: matrix products of a tile.
  """
  arrays, in_specs = zip(*inputs, strict=True)
  shapes, out_specs = zip(*outputs, strict=True)
  B, K = arrays[1].shape[:2]
  return pl.pallas_call(
    kernel,
    name=name,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(B, K, jnp.max(listed.count_B)),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
    ),
    cost_estimate=cost(arrays[0], arrays[1], products),
    interpret=interpret,
  )(listed.query_BX.ravel(), listed.key_BX.ravel(), listed.flags_BX.ravel(), *arrays)


# --- forward -----------------------------------------------------------------------------------


def forward(scale, interpret, q_BKGTH, k_BKSH, v_BKSH, plan: Plan):
  """-> o_BKGTH and lse_BKQ1X, float32, in base 2."""
  B, K, G, T, H = q_BKGTH.shape
  b, listed = blocks(T, k_BKSH.shape[2]), plan.forward
  X, entries = G * b.query, listed.query_BX.shape[1]
  q_spec, kv_spec, row_spec = tile_specs(b, G, H, entries)
  start_spec = pl.BlockSpec(
    (None, b.query, LANES), lambda n, h, t, query, *_: (n, query[n * entries + t], 0)
  )
  start_BTL = jnp.broadcast_to(plan.start_BT[..., None], (B, T, LANES))
  return over_tiles(
    functools.partial(forward_kernel, b=b, G=G, scale=scale, entries=entries),
    "flash_forward",
    listed,
    inputs=((q_BKGTH, q_spec), (k_BKSH, kv_spec), (v_BKSH, kv_spec), (start_BTL, start_spec)),
    outputs=(
      (q_BKGTH, q_spec),
      (jax.ShapeDtypeStruct((B, K, T // b.query, 1, X), jnp.float32), row_spec),
    ),
    scratch=((X, LANES), (X, LANES), (X, H)),
    products=2,
    interpret=interpret,
  )


def forward_kernel(
  query_ref, key_ref, flags_ref, q_ref, k_ref, v_ref, start_ref, o_ref, lse_ref,
  largest_ref, sums_ref, o_sum_ref, *, b: Blocks, G: int, scale: float, entries: int,
):  # fmt: skip
  """One tile: scores, softmax so far, and P V added to the output."""
  tile = pl.program_id(0) * entries + pl.program_id(2)
  flags, X, H = flags_ref[tile], G * b.query, q_ref.shape[-1]

  @pl.when((flags & FIRST) != 0)
  def _():
    largest_ref[...] = jnp.full_like(largest_ref, UNSEEN)
    sums_ref[...] = jnp.zeros_like(sums_ref)
    o_sum_ref[...] = jnp.zeros_like(o_sum_ref)

  def body(masked: bool) -> None:
    q_XH = q_ref[...].reshape(X, H)
    if masked:
      row_XL = lax.broadcasted_iota(jnp.int32, (X, LANES), 0)
      t_XL = b.first + query_ref[tile] * b.query + lax.rem(row_XL, b.query)
      start_XL = jnp.tile(start_ref[...], (G, 1))
    for first in range(0, b.key, b.part):
      part = pl.ds(first, b.part)
      widen = lambda x_XL: jnp.tile(x_XL, (1, b.part // LANES))  # noqa: E731
      s_XS = dot(q_XH, k_ref[part, :], X_XT) * (scale * LOG2E)
      if masked:
        s_XS_index = lax.broadcasted_iota(jnp.int32, (X, b.part), 1)
        s_XS_index += key_ref[tile] * b.key + first
        seen_XS = (s_XS_index <= widen(t_XL)) & (s_XS_index >= widen(start_XL))
        s_XS = jnp.where(seen_XS, s_XS, UNSEEN)
      before_XL = largest_ref[...]  # all lanes alike
      largest_XL = jnp.maximum(before_XL, jnp.max(s_XS, axis=1, keepdims=True))
      p_XS, shrink_XL = jnp.exp2(s_XS - widen(largest_XL)), jnp.exp2(before_XL - largest_XL)
      largest_ref[...] = largest_XL
      lane_sums_XL = sum(p_XS[:, i : i + LANES] for i in range(0, b.part, LANES))
      sums_ref[...] = sums_ref[...] * shrink_XL + lane_sums_XL
      before_XH = o_sum_ref[...] * across(shrink_XL, H)  # before the product: a fiftieth faster
      o_sum_ref[...] = before_XH + dot(p_XS.astype(v_ref.dtype), v_ref[part, :], X_X)

  each_kind(flags, body)

  @pl.when((flags & LAST) != 0)
  def _():
    sum_X1 = jnp.sum(sums_ref[...], axis=1, keepdims=True)
    o_ref[...] = (o_sum_ref[...] * (1 / sum_X1)).astype(o_ref.dtype).reshape(o_ref.shape)
    lse_ref[...] = (largest_ref[...] + jnp.log2(sum_X1)).T[:1]


def across(x_XL, H: int):
  """A value that is the same in all lanes, [X, LANES] -> [X, H]."""
  return x_XL[:, :H] if H <= LANES else jnp.tile(x_XL, (1, -(-H // LANES)))[:, :H]


# --- backward ----------------------------------------------------------------------------------


def backward(
  scale, interpret, b: Blocks, first: int, listed: Tiles, start_BT,
  q_BKGTH, k_BKSH, v_BKSH, do_BKGTH, lse_BKQ1X, offset_BKQ1X,
):  # fmt: skip
  """Queries first, ..., first + T - 1 and the S = first + T keys up to them -> dq, dk, dv.

  offset: what is subtracted from dP. dk and dv are float32 and of these queries alone.
  """
  B, K, G, T, H = q_BKGTH.shape
  S, X, Q, entries = k_BKSH.shape[2], G * b.query, T // b.query, listed.query_BX.shape[1]
  q_spec, kv_spec, row_spec = tile_specs(b, G, H, entries)
  start_spec = pl.BlockSpec(
    (None, 1, b.query), lambda n, h, t, query, *_: (n, 0, query[n * entries + t])
  )
  dq_spec = pl.BlockSpec((None, None, G, T, H), lambda n, h, t, *_: (n, h, 0, 0, 0))
  keys = jax.ShapeDtypeStruct(k_BKSH.shape, jnp.float32)
  dq, dk, dv = over_tiles(
    functools.partial(backward_kernel, b=b, G=G, scale=scale, entries=entries, first=first),
    "flash_backward",
    listed,
    inputs=(
      (q_BKGTH, q_spec),
      (k_BKSH, kv_spec),
      (v_BKSH, kv_spec),
      (do_BKGTH, q_spec),
      (start_BT[:, None], start_spec),
      (lse_BKQ1X, row_spec),
      (offset_BKQ1X, row_spec),
    ),
    outputs=((q_BKGTH, dq_spec), (keys, kv_spec), (keys, kv_spec)),
    scratch=((Q, X, H), (b.key, H), (b.key, H)),
    products=5,
    interpret=interpret,
  )
  # A key block that is in no tile was never written.
  touched_B1S1 = jnp.repeat(listed.touched_BG, b.key, axis=1)[:, None, :S, None]
  return dq, jnp.where(touched_B1S1, dk, 0), jnp.where(touched_B1S1, dv, 0)


def backward_kernel(
  query_ref, key_ref, flags_ref, q_ref, k_ref, v_ref, do_ref, start_ref, lse_ref, offset_ref,
  dq_ref, dk_ref, dv_ref, dq_sum_ref, dk_sum_ref, dv_sum_ref,
  *, b: Blocks, G: int, scale: float, entries: int, first: int,
):  # fmt: skip
  """One tile, its scores transposed, so that what is known of a query is a lane vector."""
  step = pl.program_id(2)
  tile = pl.program_id(0) * entries + step
  flags, query, X, H = flags_ref[tile], query_ref[tile], G * b.query, q_ref.shape[-1]

  @pl.when(step == 0)
  def _():
    dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

  @pl.when((flags & FIRST) != 0)
  def _():
    dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
    dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

  def body(masked: bool) -> None:
    q_XH, do_XH = q_ref[...].reshape(X, H), do_ref[...].reshape(X, H)
    lse_1X, offset_1X = lse_ref[...], offset_ref[...]
    if masked:
      row_1X = lax.broadcasted_iota(jnp.int32, (1, X), 1)
      t_1X = first + query * b.query + lax.rem(row_1X, b.query)
      start_1X = jnp.tile(start_ref[...], (1, G))
    for offset in range(0, b.key, b.part):
      part = pl.ds(offset, b.part)
      k_SH, v_SH = k_ref[part, :], v_ref[part, :]
      s_SX = dot(k_SH, q_XH, X_XT) * (scale * LOG2E)
      if masked:
        s_SX_index = lax.broadcasted_iota(jnp.int32, (b.part, X), 0)
        s_SX_index += key_ref[tile] * b.key + offset
        s_SX = jnp.where((s_SX_index <= t_1X) & (s_SX_index >= start_1X), s_SX, UNSEEN)
      p_SX = jnp.exp2(s_SX - lse_1X)
      dv_sum_ref[part, :] += dot(p_SX.astype(do_XH.dtype), do_XH, X_X)
      ds_SX = (p_SX * (dot(v_SH, do_XH, X_XT) - offset_1X)).astype(q_XH.dtype)
      dk_sum_ref[part, :] += dot(ds_SX, q_XH, X_X)
      dq_sum_ref[query] += dot(ds_SX, k_SH, XT_X)

  each_kind(flags, body)

  @pl.when((flags & LAST) != 0)
  def _():
    dk_ref[...] = dk_sum_ref[...] * scale
    dv_ref[...] = dv_sum_ref[...]

  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    for i in range(dq_sum_ref.shape[0]):
      dq_GqH = (dq_sum_ref[i] * scale).astype(dq_ref.dtype).reshape(G, b.query, H)
      dq_ref[:, pl.ds(i * b.query, b.query), :] = dq_GqH
