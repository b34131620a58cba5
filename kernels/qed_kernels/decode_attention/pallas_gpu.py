"""Paged decode attention on a Hopper GPU, long sequences split over blocks of threads (Mosaic GPU).

A block of threads is a key head and a stretch of one sequence: a producer gathers its pages, a
consumer takes the softmax and P V. The R = G * T query rows of a key head, T new tokens of G heads,
fill 64 rows of a product: what the padding costs the tensor cores is theirs to give, the time goes
to reading the cache. The parts of a sequence are merged by their log-sum-exp in XLA, and the new
tokens are written by a scatter before.

int8 pages are widened to bf16 in shared memory; the scales of keys multiply scores, those of values
probabilities.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from qed_kernels import hopper
from qed_kernels.decode_attention import xla
from qed_kernels.hopper import COLUMN, LOWEST, MATRIX, ROW, ROWS, UNSEEN

KEYS = 64  # of a step
STEPS = 32  # of a block of threads, at most: 2,048 tokens
SLOTS = 4  # of a ring; registers allow one block of threads a multiprocessor, so it must be long
LOG2E = math.log2(math.e)


def decode_attention(q_BTNH, new, cache, layer, positions_BT, scale: float):
  """As the reference."""
  limits(q_BTNH, cache)
  interpret = hopper.interpreter("pallas_gpu")
  cache = xla.append(new, cache, layer, positions_BT)
  B, T, N, H = q_BTNH.shape
  K = cache.k_LPKSH.shape[2]
  by_head = lambda x: jnp.moveaxis(x, 1, 3).reshape(B, K, -1, *x.shape[4:])  # noqa: E731
  q_BKRH = by_head(q_BTNH.reshape(B, T, K, N // K, H))
  rows = q_BKRH.shape[2]
  q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, ROWS - rows), (0, 0)))
  # The position of each row's token, -1 for padding; the same for every key head.
  at_BR = jnp.pad(
    jnp.tile(positions_BT, (1, N // K)), ((0, 0), (0, ROWS - rows)), constant_values=-1
  )
  o_BKRH = attention(scale, interpret, q_BKRH, at_BR, cache, layer, rows)
  o_BKGTH = o_BKRH.reshape(B, K, N // K, T, H)
  return jnp.moveaxis(o_BKGTH, 3, 1).reshape(q_BTNH.shape).astype(q_BTNH.dtype), cache


def limits(q_BTNH, cache) -> None:
  """Raises NotImplementedError, one line, for what the kernel cannot do."""
  (T, N, H), (K, S), dtype = q_BTNH.shape[1:], cache.k_LPKSH.shape[2:4], cache.k_LPKSH.dtype
  if N % K:
    raise NotImplementedError(f"pallas_gpu: {N} query heads are no multiple of {K} key heads")
  if T * N // K > ROWS:
    raise NotImplementedError(f"pallas_gpu: {T} new tokens of {N // K} heads are over {ROWS} rows")
  if S % KEYS:
    raise NotImplementedError(f"pallas_gpu: pages of {S} tokens, not a multiple of {KEYS}")
  if H not in (64, 128):
    raise NotImplementedError(f"pallas_gpu: head_dim {H} is neither 64 nor 128")
  if q_BTNH.dtype != jnp.bfloat16:
    raise NotImplementedError(f"pallas_gpu: queries of {q_BTNH.dtype}, not bfloat16")
  if dtype not in (jnp.bfloat16, jnp.int8):
    raise NotImplementedError(f"pallas_gpu: pages of {dtype}, neither bfloat16 nor int8")


def attention(scale, interpret, q_BKRH, at_BR, cache, layer, rows: int):
  """-> o_BKRH of the first `rows` rows, float32 merged from parts in bf16; those of a negative
  position mean nothing."""
  (B, K, R, H), S, P = q_BKRH.shape, cache.k_LPKSH.shape[3], cache.table_BP.shape[1]
  kept = -(-rows // 8) * 8  # of a tile of shared memory: what is written for each part
  int8 = cache.k_LPKSH.dtype == jnp.int8
  parts = pl.cdiv(P * S, STEPS * KEYS)
  length_B = jnp.minimum(jnp.max(at_BR, axis=1) + 1, P * S)
  tile = hopper.operand(KEYS, H)
  ring = mg.SMEM((SLOTS, KEYS, H), jnp.int8) if int8 else hopper.operand(SLOTS, KEYS, H)
  scale_ring = mg.SMEM((SLOTS, KEYS), jnp.float32)
  pages = [cache.k_LPKSH, cache.v_LPKSH]
  scratch = [hopper.operand(R, H), mg.SMEM((R,), jnp.float32)]
  if int8:
    pages += [cache.k_scale_LPKS, cache.v_scale_LPKS]
    rings = [ring, ring, scale_ring, scale_ring, tile, tile]
  else:
    rings = [ring, ring]
  full = hopper.barriers(SLOTS, 2 if int8 else 1)
  kernel = functools.partial(
    decode_kernel, arrays=len(pages), scale=scale * LOG2E, interpret=interpret
  )
  o_XBKRH, lse_XBKR = hopper.call(
    kernel,
    "paged_decode",
    interpret,
    grid={"head": K, "part": parts, "sequence": B},
    outputs=[
      jax.ShapeDtypeStruct((parts, B, K, kept, H), q_BKRH.dtype),
      jax.ShapeDtypeStruct((parts, B, K, R), jnp.float32),
    ],
    scratch=[
      *scratch,
      *rings,
      *(hopper.barriers(1), full, full, hopper.barriers(SLOTS), hopper.barriers(SLOTS)),
    ],
    warpgroups=2,
  )(
    jnp.asarray(layer, jnp.int32).reshape(1), length_B, cache.table_BP, at_BR, q_BKRH, *pages
  )  # fmt: skip
  # A part past the end of its sequence was never written, and of one that only the later of several
  # new tokens reach, the others' rows are 0 / 0.
  part_X111 = jnp.arange(parts)[:, None, None, None] * STEPS * KEYS
  seen_XB1R = part_X111 <= at_BR[None, :, None]
  seen_XB1R, o_XBKRH = seen_XB1R[..., :rows], o_XBKRH[..., :rows, :]
  lse_XBKR = jnp.where(seen_XB1R, lse_XBKR[..., :rows], LOWEST)
  weight_XBKR = jnp.exp2(lse_XBKR - jnp.max(lse_XBKR, axis=0, keepdims=True))
  o_XBKRH = jnp.where(seen_XB1R[..., None], o_XBKRH * weight_XBKR[..., None], 0)
  return jnp.sum(o_XBKRH, axis=0) / jnp.sum(weight_XBKR, axis=0)[..., None]


def decode_kernel(
  layer_ref, length_ref, table_ref, at_ref, q_ref, *refs, arrays: int, scale: float, interpret: Any
):
  """A part of a sequence for a key head: scores, softmax so far, P V.

  arrays: 2, keys and values, or 4 with their scales. refs: these, outputs, scratch, barriers.
  """
  page_refs, (o_ref, lse_ref) = refs[:arrays], refs[arrays : arrays + 2]
  q_tile, lse_tile, *rings = refs[arrays + 2 : -5]
  q_full, k_full, v_full, k_free, v_free = refs[-5:]
  head, part, sequence = (lax.axis_index(name) for name in ("head", "part", "sequence"))
  warpgroup, length = lax.axis_index("warpgroup"), length_ref[sequence]
  first = part * STEPS
  last = lax.min(first + STEPS, pl.cdiv(length, KEYS))

  def widened(number, slot):
    """The keys (0) or values (1) of a slot as an operand, and their scales or None."""
    if arrays == 2:
      return rings[number].at[slot], None
    scale_K = hopper.load(rings[2 + number].at[slot], COLUMN, optimized=True)
    tile = rings[4 + number]
    tile[...] = hopper.load(rings[number].at[slot], MATRIX).astype(tile.dtype)
    mg.commit_smem()
    return tile, scale_K

  @pl.when((warpgroup == 0) & (first < last))
  def _():
    mg.copy_gmem_to_smem(q_ref.at[sequence, head], q_tile, q_full.at[0])
    at_R = hopper.load(at_ref.at[sequence], ROW)
    mg.barrier_wait(q_full.at[0])

    def step(i, carry):
      o_RH, largest_R, sum_R = carry
      slot = lax.rem(i - first, SLOTS)
      mg.barrier_wait(k_full.at[slot])
      k_tile, k_scale_K = widened(0, slot)
      s_RK = hopper.product(q_tile, hopper.transposed(k_tile))
      mg.barrier_arrive(k_free.at[slot])
      if k_scale_K is not None:
        s_RK *= hopper.columns(k_scale_K, s_RK.shape)

      def masked():
        key_RK = hopper.index(s_RK.shape, 1) + i * KEYS
        return jnp.where(key_RK <= hopper.rows(at_R, s_RK.shape), s_RK, UNSEEN)

      # Of several new tokens, the earlier ones do not see the later.
      s_RK = lax.cond((i + 2) * KEYS > length, masked, lambda: s_RK)
      new_largest_R = jnp.maximum(largest_R, s_RK.max(axis=1) * scale)
      shrink_R = jnp.exp2(largest_R - new_largest_R)
      p_RK = jnp.exp2(s_RK * scale - hopper.rows(new_largest_R, s_RK.shape))
      sum_R = sum_R * shrink_R + p_RK.sum(axis=1)
      mg.barrier_wait(v_full.at[slot])
      v_tile, v_scale_K = widened(1, slot)
      if v_scale_K is not None:
        p_RK *= hopper.columns(v_scale_K, p_RK.shape)
      o_RH *= hopper.rows(shrink_R, o_RH.shape)
      o_RH = hopper.add_product(o_RH, p_RK.astype(q_tile.dtype), v_tile, interpret)
      mg.barrier_arrive(v_free.at[slot])
      return o_RH, new_largest_R, sum_R

    empty = (
      hopper.full(q_tile.shape, 0, MATRIX),
      hopper.full((ROWS,), LOWEST, ROW),
      hopper.full((ROWS,), 0, ROW),
    )
    o_RH, largest_R, sum_R = lax.fori_loop(first, last, step, empty)
    q_tile[...] = (o_RH * hopper.rows(1 / sum_R, o_RH.shape)).astype(q_tile.dtype)
    lse_tile[...] = largest_R + jnp.log(sum_R) * LOG2E
    mg.commit_smem()
    written = q_tile.at[pl.ds(0, o_ref.shape[3])]
    mg.copy_smem_to_gmem(written, o_ref.at[part, sequence, head])
    mg.copy_smem_to_gmem(lse_tile, lse_ref.at[part, sequence, head])
    mg.wait_smem_to_gmem(0)

  @pl.when((warpgroup == 1) & (first < last))
  def _():
    layer, page_size = layer_ref[0], page_refs[0].shape[3]

    def copies(number, i):
      token = i * KEYS
      page = table_ref[sequence, lax.div(token, page_size)]
      at = (layer, page, head, pl.ds(lax.rem(token, page_size), KEYS))
      return [(page_refs[j].at[at], rings[j]) for j in range(number, arrays, 2)]

    streams = [
      (functools.partial(copies, 0), k_full, k_free),
      (functools.partial(copies, 1), v_full, v_free),
    ]
    hopper.produce(first, last, SLOTS, streams)
