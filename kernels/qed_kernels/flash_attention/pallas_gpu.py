"""Flash attention of packed rows on a Hopper GPU: a forward and two backward kernels (Mosaic GPU).

A block of threads has two consumer warpgroups and a producer. The forward pass gives each consumer
64 queries of one head; while one takes the softmax of its scores the other has the tensor cores,
and they hand them over by a barrier of both ("turn"), as in FlashAttention-3 (arXiv 2407.08608).
The backward pass makes dQ by the same blocks of queries, and dK and dV by blocks of keys that see
the queries of all G heads of their group: no atomics, so gradients are the same to the bit.

Blocks of keys before the first segment of a block of queries are not visited, nor are queries past
the last segment of a block of keys. Scores are in base 2, sums and accumulators float32.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from qed_kernels import hopper
from qed_kernels.flash_attention.residuals import named
from qed_kernels.hopper import COLUMN, LOWEST, MATRIX, ROW, ROWS, UNSEEN

QUERIES = 2 * ROWS  # of a block of threads, half a warpgroup's each; also its keys for dK, dV
FORWARD_KEYS = 128  # of a step of the forward pass
BACKWARD = 64  # keys of a step for dQ, queries of a step for dK and dV
SLOTS = 2  # of a ring
LOG2E = math.log2(math.e)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """Padded rows: query t sees the keys start[t] <= s that are not after its own, and key s is seen
  by queries t < end[s] whose keys are not before it. int32.

  Padding is in front, so that the last query stays the token of the last key.
  """

  start_BT: Any
  end_BS: Any


def plan(start_BT, keys: int, group: int, head_dim: int) -> Plan:
  """start_BT: int32, of the last T keys. Once a batch, for all layers."""
  T = start_BT.shape[1]
  queries, padded = padded_size(T), padded_size(keys)
  start_BT = start_BT + (padded - keys)
  # Padding sees itself, and starts never fall.
  padding_BT = jnp.minimum(jnp.repeat(start_BT[:, :1], queries - T, axis=1), padded - queries)
  start_BT = jnp.concatenate([padding_BT, start_BT], axis=1)
  key_S = jnp.arange(padded, dtype=jnp.int32)
  end_BS = jax.vmap(lambda start_T: jnp.searchsorted(start_T, key_S, side="right"))(start_BT)
  return Plan(start_BT, end_BS.astype(jnp.int32))


def padded_size(tokens: int) -> int:
  return -(-tokens // QUERIES) * QUERIES


def flash_attention(q_BTNH, k_BSKH, v_BSKH, rows, scale: float):
  """As the reference: o_BTNH, and lse_BTN in float32. rows.plan is of `plan`."""
  limits(q_BTNH, k_BSKH)
  interpret, T = hopper.interpreter("pallas_gpu"), q_BTNH.shape[1]
  pad = lambda x: jnp.pad(  # noqa: E731
    x, ((0, 0), (padded_size(x.shape[1]) - x.shape[1], 0), (0, 0), (0, 0))
  )
  o_BTNH, lse_BNT = attention(scale, interpret, pad(q_BTNH), pad(k_BSKH), pad(v_BSKH), rows.plan)
  return o_BTNH[:, -T:], jnp.swapaxes(lse_BNT, 1, 2)[:, -T:]


def limits(q_BTNH, k_BSKH) -> None:
  """Raises NotImplementedError, one line, for what the kernels cannot do."""
  N, H, K = *q_BTNH.shape[2:], k_BSKH.shape[2]
  if H not in (64, 128):
    raise NotImplementedError(f"pallas_gpu: head_dim {H} is neither 64 nor 128")
  if N % K:
    raise NotImplementedError(f"pallas_gpu: {N} query heads are no multiple of {K} key heads")
  if q_BTNH.dtype != jnp.bfloat16:
    raise NotImplementedError(f"pallas_gpu: {q_BTNH.dtype} is not bfloat16")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(scale: float, interpret: Any, q_BTNH, k_BSKH, v_BSKH, plan: Plan):
  """o_BTNH and lse_BNT (natural logarithm) of padded rows."""
  o_BTNH, lse2_BNT = forward(scale, interpret, q_BTNH, k_BSKH, v_BSKH, plan)
  return o_BTNH, lse2_BNT / LOG2E


def attention_forward(scale, interpret, q_BTNH, k_BSKH, v_BSKH, plan):
  o_BTNH, lse2_BNT = named(*forward(scale, interpret, q_BTNH, k_BSKH, v_BSKH, plan))
  return (o_BTNH, lse2_BNT / LOG2E), (q_BTNH, k_BSKH, v_BSKH, plan, o_BTNH, lse2_BNT)


def attention_backward(scale, interpret, kept, cotangents):
  q_BTNH, k_BSKH, v_BSKH, plan, o_BTNH, lse2_BNT = kept
  do_BTNH, dlse_BNT = cotangents
  # d score = p (dp - sum(p dp)) + p dlse, and sum(p dp) = sum(o do).
  own_BNT = jnp.einsum("BTNH,BTNH->BNT", o_BTNH, do_BTNH, preferred_element_type=jnp.float32)
  inputs = (q_BTNH, k_BSKH, v_BSKH, do_BTNH, lse2_BNT, own_BNT - dlse_BNT)
  dq_BTNH = query_gradient(scale, interpret, *inputs, plan)
  return dq_BTNH, *key_value_gradient(scale, interpret, *inputs, plan), None


attention.defvjp(attention_forward, attention_backward)


# --- forward -----------------------------------------------------------------------------------


def forward(scale, interpret, q_BTNH, k_BSKH, v_BSKH, plan: Plan):
  """-> o_BTNH and lse_BNT, float32, in base 2."""
  B, T, N, H = q_BTNH.shape
  ring = hopper.operand(SLOTS, FORWARD_KEYS, H)
  kernel = functools.partial(
    forward_kernel, group=N // k_BSKH.shape[2], scale=scale * LOG2E, interpret=interpret
  )
  return hopper.call(
    kernel,
    "flash_forward",
    interpret,
    grid={"head": N, "block": T // QUERIES, "row": B},
    outputs=[like(q_BTNH), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
    scratch=[
      *(hopper.operand(2, ROWS, H), ring, ring, mg.SMEM((2, ROWS), jnp.float32)),
      *(hopper.barriers(2), hopper.barriers(SLOTS), hopper.barriers(SLOTS)),
      *(hopper.barriers(SLOTS, 2), hopper.barriers(SLOTS, 2), hopper.barriers(1, 2)),
    ],
    warpgroups=3,
  )(q_BTNH, k_BSKH, v_BSKH, plan.start_BT)


def forward_kernel(
  q_ref, k_ref, v_ref, start_ref, o_ref, lse_ref, q_tiles, k_ring, v_ring, lse_tiles,
  q_full, k_full, v_full, k_free, v_free, turn, *, group: int, scale: float, interpret: Any,
):  # fmt: skip
  """A block of queries of a head: scores, softmax so far, P V, over the keys that they see."""
  head, row, warpgroup = (lax.axis_index(name) for name in ("head", "row", "warpgroup"))
  first_query, behind = reversed_block(q_ref) * QUERIES, key_of_first_query(q_ref, k_ref)
  first, last = key_blocks(start_ref, row, first_query, behind, FORWARD_KEYS)

  def hand_over():
    mg.barrier_arrive(turn)
    mg.barrier_wait(turn)

  @pl.when(warpgroup < 2)
  def _():
    mg.set_max_registers(hopper.CONSUMER, action="increase")
    query = first_query + warpgroup * ROWS
    own_key, queries, q_tile = query + behind, pl.ds(query, ROWS), q_tiles.at[warpgroup]
    mg.copy_gmem_to_smem(q_ref.at[row, queries, head], q_tile, q_full.at[warpgroup])
    start_Q = hopper.load(start_ref.at[row, queries], ROW)
    last_start = start_ref[row, query + ROWS - 1]
    mg.barrier_wait(q_full.at[warpgroup])
    mg.barrier_wait(k_full.at[0])
    pl.when(warpgroup == 1)(hand_over)

    def step(i, carry):
      o_QH, largest_Q, sum_Q = carry
      slot, key = lax.rem(i - first, SLOTS), i * FORWARD_KEYS
      s_QS = hopper.product(q_tile, hopper.transposed(k_ring.at[slot]), meanwhile=hand_over)
      mg.barrier_arrive(k_free.at[slot])

      def masked():
        return jnp.where(seen(s_QS.shape, own_key, key, start_Q), s_QS, UNSEEN)

      edge = (key + FORWARD_KEYS > own_key) | (key < last_start)
      s_QS = lax.cond(edge, masked, lambda: s_QS)
      new_largest_Q = jnp.maximum(largest_Q, s_QS.max(axis=1) * scale)
      shrink_Q = jnp.exp2(largest_Q - new_largest_Q)
      p_QS = jnp.exp2(s_QS * scale - hopper.rows(new_largest_Q, s_QS.shape))
      o_QH *= hopper.rows(shrink_Q, o_QH.shape)
      sum_Q = sum_Q * shrink_Q + p_QS.sum(axis=1)
      # All of the softmax before the tensor cores are asked for again.
      carry = lax.optimization_barrier((o_QH, new_largest_Q, sum_Q, p_QS.astype(q_tile.dtype)))
      o_QH, new_largest_Q, sum_Q, p_QS = carry
      mg.barrier_arrive(turn)
      mg.barrier_wait(v_full.at[slot])
      mg.barrier_wait(turn)

      def wait_for_next_keys():
        following = lax.rem(i + 1 - first, SLOTS)
        pl.when(i + 1 < last)(lambda: mg.barrier_wait(k_full.at[following]))

      o_QH = hopper.add_product(o_QH, p_QS, v_ring.at[slot], interpret, wait_for_next_keys)
      mg.barrier_arrive(v_free.at[slot])
      return o_QH, new_largest_Q, sum_Q

    empty = (
      hopper.full((ROWS, q_tile.shape[1]), 0, MATRIX),
      hopper.full((ROWS,), LOWEST, ROW),
      hopper.full((ROWS,), 0, ROW),
    )
    o_QH, largest_Q, sum_Q = lax.fori_loop(first, last, step, empty)
    pl.when(warpgroup == 0)(hand_over)
    q_tile[...] = (o_QH * hopper.rows(1 / sum_Q, o_QH.shape)).astype(q_tile.dtype)
    lse_tiles.at[warpgroup][...] = largest_Q + jnp.log(sum_Q) * LOG2E
    mg.commit_smem()
    mg.copy_smem_to_gmem(q_tile, o_ref.at[row, queries, head])
    mg.copy_smem_to_gmem(lse_tiles.at[warpgroup], lse_ref.at[row, head, queries])
    mg.wait_smem_to_gmem(0)

  @pl.when(warpgroup == 2)
  def _():
    mg.set_max_registers(hopper.PRODUCER, action="decrease")
    produce_keys_and_values(
      k_ref, v_ref, k_ring, v_ring, k_full, v_full, k_free, v_free,
      row=row, head=lax.div(head, group), first=first, last=last,
    )  # fmt: skip


def like(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def seen(shape, own_key, key, start_Q):
  """Whether queries, the first one the token of own_key, see keys, the first of them `key`."""
  own_QS, key_QS = hopper.index(shape, 0) + own_key, hopper.index(shape, 1) + key
  return (key_QS <= own_QS) & (key_QS >= hopper.rows(start_Q, shape))


def reversed_block(q_ref):
  """Which block of queries: the last ones, which see the most, are begun first."""
  return q_ref.shape[1] // QUERIES - 1 - lax.axis_index("block")


def key_of_first_query(q_ref, k_ref) -> int:
  """Which key is that of query 0: the T queries are those of the last T of the S keys."""
  return k_ref.shape[1] - q_ref.shape[1]


def key_blocks(start_ref, row, first_query, behind: int, keys: int):
  """The blocks of `keys` keys that some query of a block sees, first <= i < last.

  behind: the key of query 0.
  """
  last = lax.div(first_query + QUERIES + behind, keys)
  return lax.div(start_ref[row, first_query], keys), last


def produce_keys_and_values(
  k_ref, v_ref, k_ring, v_ring, k_full, v_full, k_free, v_free, *, row, head, first, last
):
  keys = k_ring.shape[1]
  block = lambda ref, i: ref.at[row, pl.ds(i * keys, keys), head]  # noqa: E731
  hopper.produce(
    first, last, SLOTS,
    [
      (lambda i: [(block(k_ref, i), k_ring)], k_full, k_free),
      (lambda i: [(block(v_ref, i), v_ring)], v_full, v_free),
    ],
  )  # fmt: skip


# --- backward ----------------------------------------------------------------------------------


def query_gradient(scale, interpret, q_BTNH, k_BSKH, v_BSKH, do_BTNH, lse_BNT, offset_BNT, plan):
  """-> dq_BTNH. lse in base 2; offset: what is subtracted from dP."""
  B, T, N, H = q_BTNH.shape
  tiles, ring = hopper.operand(2, ROWS, H), hopper.operand(SLOTS, BACKWARD, H)
  return hopper.call(
    functools.partial(
      query_gradient_kernel, group=N // k_BSKH.shape[2], scale=scale, interpret=interpret
    ),
    "flash_query_gradient",
    interpret,
    grid={"head": N, "block": T // QUERIES, "row": B},
    outputs=like(q_BTNH),
    scratch=[
      *(tiles, tiles, ring, ring, hopper.barriers(2, 2)),
      *(hopper.barriers(SLOTS), hopper.barriers(SLOTS)),
      *(hopper.barriers(SLOTS, 2), hopper.barriers(SLOTS, 2)),
    ],
    warpgroups=3,
  )(q_BTNH, k_BSKH, v_BSKH, do_BTNH, lse_BNT, offset_BNT, plan.start_BT)


def query_gradient_kernel(
  q_ref, k_ref, v_ref, do_ref, lse_ref, offset_ref, start_ref, dq_ref,
  q_tiles, do_tiles, k_ring, v_ring, q_full, k_full, v_full, k_free, v_free,
  *, group: int, scale: float, interpret: Any,
):  # fmt: skip
  """A block of queries of a head: P again, dP, and dS K over the keys that they see."""
  head, row, warpgroup = (lax.axis_index(name) for name in ("head", "row", "warpgroup"))
  first_query, behind = reversed_block(q_ref) * QUERIES, key_of_first_query(q_ref, k_ref)
  first, last = key_blocks(start_ref, row, first_query, behind, BACKWARD)

  @pl.when(warpgroup < 2)
  def _():
    mg.set_max_registers(hopper.CONSUMER, action="increase")
    query = first_query + warpgroup * ROWS
    own_key, queries = query + behind, pl.ds(query, ROWS)
    q_tile, do_tile = q_tiles.at[warpgroup], do_tiles.at[warpgroup]
    mg.copy_gmem_to_smem(q_ref.at[row, queries, head], q_tile, q_full.at[warpgroup])
    mg.copy_gmem_to_smem(do_ref.at[row, queries, head], do_tile, q_full.at[warpgroup])
    lse_Q = hopper.load(lse_ref.at[row, head, queries], ROW)
    offset_Q = hopper.load(offset_ref.at[row, head, queries], ROW)
    start_Q = hopper.load(start_ref.at[row, queries], ROW)
    last_start = start_ref[row, query + ROWS - 1]
    mg.barrier_wait(q_full.at[warpgroup])

    def step(i, dq_QH):
      slot, key = lax.rem(i - first, SLOTS), i * BACKWARD
      mg.barrier_wait(k_full.at[slot])
      s_QS = hopper.product(q_tile, hopper.transposed(k_ring.at[slot]))
      p_QS = jnp.exp2(s_QS * (scale * LOG2E) - hopper.rows(lse_Q, s_QS.shape))

      def masked():
        return jnp.where(seen(p_QS.shape, own_key, key, start_Q), p_QS, 0.0)

      p_QS = lax.cond((key + BACKWARD > own_key) | (key < last_start), masked, lambda: p_QS)
      mg.barrier_wait(v_full.at[slot])
      dp_QS = hopper.product(do_tile, hopper.transposed(v_ring.at[slot]))
      mg.barrier_arrive(v_free.at[slot])
      ds_QS = (p_QS * (dp_QS - hopper.rows(offset_Q, p_QS.shape))).astype(q_tile.dtype)
      dq_QH = hopper.add_product(dq_QH, ds_QS, k_ring.at[slot], interpret)
      mg.barrier_arrive(k_free.at[slot])
      return dq_QH

    dq_QH = lax.fori_loop(first, last, step, hopper.full((ROWS, q_tile.shape[1]), 0, MATRIX))
    q_tile[...] = (dq_QH * scale).astype(q_tile.dtype)
    mg.commit_smem()
    mg.copy_smem_to_gmem(q_tile, dq_ref.at[row, queries, head])
    mg.wait_smem_to_gmem(0)

  @pl.when(warpgroup == 2)
  def _():
    mg.set_max_registers(hopper.PRODUCER, action="decrease")
    produce_keys_and_values(
      k_ref, v_ref, k_ring, v_ring, k_full, v_full, k_free, v_free,
      row=row, head=lax.div(head, group), first=first, last=last,
    )  # fmt: skip


def key_value_gradient(
  scale, interpret, q_BTNH, k_BSKH, v_BSKH, do_BTNH, lse_BNT, offset_BNT, plan
):
  """-> dk_BSKH, dv_BSKH. Arguments as of `query_gradient`."""
  (B, _, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
  tiles, ring = hopper.operand(2, ROWS, H), hopper.operand(SLOTS, BACKWARD, H)
  numbers = mg.SMEM((SLOTS, BACKWARD), jnp.float32)
  return hopper.call(
    functools.partial(key_value_gradient_kernel, group=N // K, scale=scale, interpret=interpret),
    "flash_key_value_gradient",
    interpret,
    grid={"head": K, "block": S // QUERIES, "row": B},
    outputs=[like(k_BSKH), like(v_BSKH)],
    scratch=[
      *(tiles, tiles, ring, ring, numbers, numbers, hopper.barriers(2, 2)),
      *(hopper.barriers(SLOTS, 3), hopper.barriers(SLOTS)),
      *(hopper.barriers(SLOTS, 2), hopper.barriers(SLOTS, 2)),
    ],
    warpgroups=3,
  )(q_BTNH, k_BSKH, v_BSKH, do_BTNH, lse_BNT, offset_BNT, plan.start_BT, plan.end_BS)


def key_value_gradient_kernel(
  q_ref, k_ref, v_ref, do_ref, lse_ref, offset_ref, start_ref, end_ref, dk_ref, dv_ref,
  k_tiles, v_tiles, q_ring, do_ring, lse_ring, offset_ring, kv_full, q_full, do_full, q_free,
  do_free, *, group: int, scale: float, interpret: Any,
):  # fmt: skip
  """A block of keys of a head: the transposed P and dP, P^T dO and dS^T Q over the queries of all
  heads of the group that see them."""
  head, row, warpgroup = (lax.axis_index(name) for name in ("head", "row", "warpgroup"))
  first_key = lax.axis_index("block") * QUERIES  # the first ones are seen the most
  behind = key_of_first_query(q_ref, k_ref)
  first = lax.div(lax.max(first_key - behind, 0), BACKWARD)
  last = pl.cdiv(end_ref[row, first_key + QUERIES - 1], BACKWARD)
  steps = lax.max(last - first, 0) * group

  @pl.when(warpgroup < 2)
  def _():
    mg.set_max_registers(hopper.CONSUMER, action="increase")
    key = first_key + warpgroup * ROWS
    keys, k_tile, v_tile = pl.ds(key, ROWS), k_tiles.at[warpgroup], v_tiles.at[warpgroup]
    mg.copy_gmem_to_smem(k_ref.at[row, keys, head], k_tile, kv_full.at[warpgroup])
    mg.copy_gmem_to_smem(v_ref.at[row, keys, head], v_tile, kv_full.at[warpgroup])
    mg.barrier_wait(kv_full.at[warpgroup])
    first_end = end_ref[row, key]

    def step(i, carry):
      dk_SH, dv_SH = carry
      slot, query = lax.rem(i, SLOTS), (first + lax.div(i, group)) * BACKWARD
      mg.barrier_wait(q_full.at[slot])
      s_SQ = hopper.product(k_tile, hopper.transposed(q_ring.at[slot]))
      lse_Q = hopper.load(lse_ring.at[slot], COLUMN, optimized=True)
      p_SQ = jnp.exp2(s_SQ * (scale * LOG2E) - hopper.columns(lse_Q, s_SQ.shape))

      def masked():
        end_S = hopper.load(end_ref.at[row, keys], ROW)  # rare: not worth registers all the time
        t_SQ, key_SQ = hopper.index(p_SQ.shape, 1) + query, hopper.index(p_SQ.shape, 0) + key
        seen_SQ = (key_SQ <= t_SQ + behind) & (t_SQ < hopper.rows(end_S, p_SQ.shape))
        return jnp.where(seen_SQ, p_SQ, 0.0)

      edge = (key + ROWS > query + behind) | (query + BACKWARD > first_end)
      p_SQ = lax.cond(edge, masked, lambda: p_SQ)
      p_SQ = p_SQ.astype(k_tile.dtype)  # rounded for dS too: half the registers
      mg.barrier_wait(do_full.at[slot])
      dp_SQ = hopper.product(v_tile, hopper.transposed(do_ring.at[slot]))
      dv_SH = hopper.add_product(dv_SH, p_SQ, do_ring.at[slot], interpret)
      mg.barrier_arrive(do_free.at[slot])
      offset_Q = hopper.load(offset_ring.at[slot], COLUMN, optimized=True)
      dp_SQ -= hopper.columns(offset_Q, s_SQ.shape)
      ds_SQ = (p_SQ.astype(jnp.float32) * dp_SQ).astype(k_tile.dtype)
      dk_SH = hopper.add_product(dk_SH, ds_SQ, q_ring.at[slot], interpret)
      mg.commit_smem()  # the plain reads of lse and offset, before they are copied over
      mg.barrier_arrive(q_free.at[slot])
      return dk_SH, dv_SH

    empty = hopper.full((ROWS, k_tile.shape[1]), 0, MATRIX)
    dk_SH, dv_SH = lax.fori_loop(0, steps, step, (empty, empty))
    k_tile[...] = (dk_SH * scale).astype(k_tile.dtype)
    v_tile[...] = dv_SH.astype(v_tile.dtype)
    mg.commit_smem()
    mg.copy_smem_to_gmem(k_tile, dk_ref.at[row, keys, head])
    mg.copy_smem_to_gmem(v_tile, dv_ref.at[row, keys, head])
    mg.wait_smem_to_gmem(0)

  @pl.when(warpgroup == 2)
  def _():
    mg.set_max_registers(hopper.PRODUCER, action="decrease")

    def at(i):
      query_head = head * group + lax.rem(i, group)
      return query_head, pl.ds((first + lax.div(i, group)) * BACKWARD, BACKWARD)

    def with_numbers(i):
      query_head, queries = at(i)
      numbers = (row, query_head, queries)
      return [
        (q_ref.at[row, queries, query_head], q_ring),
        (lse_ref.at[numbers], lse_ring),
        (offset_ref.at[numbers], offset_ring),
      ]

    def of_output(i):
      query_head, queries = at(i)
      return [(do_ref.at[row, queries, query_head], do_ring)]

    streams = [(with_numbers, q_full, q_free), (of_output, do_full, do_free)]
    hopper.produce(0, steps, SLOTS, streams)
