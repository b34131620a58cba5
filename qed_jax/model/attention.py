"""Attention behind one function each for packed rows and for the KV cache: the way to qed_kernels.

The kernels see rows and heads of one device; on a mesh they run inside shard_map, rows over `data`
and `fsdp`, heads over `tensor`. Where tokens are split over `sequence`, devices exchange what they
need (context_parallel.py). Plain XLA is otherwise left to XLA's own partitioning.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from qed_kernels import decode_attention as decode
from qed_kernels import flash_attention as flash
from qed_kernels.choice import say
from qed_kernels.dense import attend

from qed_jax import sharding
from qed_jax.model import context_parallel
from qed_jax.model import kv_cache as kv

RESIDUALS = flash.RESIDUALS  # names of what the kernels keep for their backward pass
SCORES_AT_ONCE = 2**20  # scores of a head that attention over the cache makes at once


def pack(config, segments_BT):
  """What all layers need to know of packed rows, int segments [B, T]: made once a batch.

  config: Qwen3Config; its `attention` names an implementation of qed_kernels, or is "auto". Returns
  PackedRows; where queries stay on their devices, two of them, for the pieces of each device, with
  a dimension in front that counts devices.
  """
  start_BT = flash.segment_starts(segments_BT)
  B, T = start_BT.shape
  heads = (config.num_heads, config.num_kv_heads, config.head_dim)
  own = lambda start_BT: flash.pack_starts(start_BT, T, *heads, implementation_for(config))  # noqa: E731
  if way(config, T) != "tokens":
    return own(start_BT)
  rows, tokens, _, _ = layout("BTK_", (B, T, config.num_kv_heads, 1))

  def of_device(start_BT):
    pieces = tuple(own(x + (T - end)) for x, end in context_parallel.trade(start_BT, tokens))
    return jax.tree.map(lambda x: x[None], pieces)

  return shard_map(of_device, (P(rows, tokens),), P(tokens, rows))(start_BT)


def attention(config, q_BTNH, k_BTKH, v_BTKH, rows):
  """Causal attention within segments -> o_BTNH in q's dtype; softmax in float32.

  rows: what `pack` made.
  """
  how, implementation = way(config, q_BTNH.shape[1]), implementation_for(config)

  def attend(q_BTNH, k_BTKH, v_BTKH, rows):
    return flash.flash_attention(q_BTNH, k_BTKH, v_BTKH, rows, implementation=implementation)[0]

  if how == "whole" and (rows.plan is None or not sharding.several_devices()):
    return attend(q_BTNH, k_BTKH, v_BTKH, rows)
  own = layout("B_KH" if how == "whole" else "BTKH", k_BTKH.shape)
  by_row, tokens = own[:2]
  if how == "whole":
    run, of_rows = attend, P(by_row)
  elif how == "heads":
    run, of_rows = functools.partial(context_parallel.by_heads, attend, tokens), P(by_row)
  else:
    of_rows = P(tokens, by_row)

    def run(q_BTNH, k_BTKH, v_BTKH, rows):
      rows = jax.tree.map(lambda x: x[0], rows)
      return context_parallel.by_tokens(attend, tokens, q_BTNH, k_BTKH, v_BTKH, rows)

  return shard_map(run, (own, own, own, of_rows), own)(q_BTNH, k_BTKH, v_BTKH, rows)


def way(config, T: int) -> str:
  """How rows of T tokens are attended to: "heads" or "tokens" (model/context_parallel.py), or
  "whole" where their tokens are not split over devices, or not evenly.

  Of two that are possible it is the one that moves fewer bytes.
  """
  shares = sharding.token_shares(T)
  if shares == 1:
    if sharding.several_devices() and jax.sharding.get_abstract_mesh().shape["sequence"] > 1:
      say(f"attention: mesh.sequence does not divide rows of {T} tokens: every device has all")
    return "whole"
  tensor = jax.sharding.get_abstract_mesh().shape["tensor"]
  N, K = config.num_heads // tensor, config.num_kv_heads // tensor
  possible = {"heads": K % shares == 0, "tokens": T % (2 * shares) == 0}
  if config.num_kv_heads % tensor or not any(possible.values()):
    heads = config.num_kv_heads
    say(f"attention: rows of {T} tokens with {heads} key heads do not split over this mesh")
    return "whole"
  of_head = T // shares * config.head_dim * jnp.dtype(config.dtype).itemsize
  received = context_parallel.bytes_received(N * of_head, K * of_head, shares)
  return min((name for name in received if possible[name]), key=received.get)


def layout(letters: str, shape) -> P:
  """Where an activation's dimensions lie on the mesh in use."""
  mesh = jax.sharding.get_abstract_mesh()
  return sharding.spec(sharding.ACTIVATIONS, letters, shape, mesh)


def shard_map(run, in_specs, out_specs):
  """Each device runs its own part on the mesh in use."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def implementation_for(config) -> str:
  """As configured; "auto" is plain XLA where a device would have query heads without their keys.

  Raises NotImplementedError, one line, where the kernel was asked for all the same.
  """
  if not sharding.several_devices():
    return config.attention
  tensor = jax.sharding.get_abstract_mesh().shape["tensor"]
  if config.num_kv_heads % tensor == 0:
    return config.attention
  if config.attention.startswith("pallas"):
    raise NotImplementedError(
      f"{config.attention}: {config.num_kv_heads} key heads do not split over tensor={tensor}: use "
      "attention=auto or another mesh"
    )
  return "xla" if config.attention == "auto" else config.attention


def append_and_attend(config, q_BTNH, k_BTKH, v_BTKH, kv_cache: kv.KVCache, layer, positions_BT):
  """Writes new tokens to the cache and attends from each to its sequence -> (o_BTNH, kv_cache).

  A negative position is padding: written nowhere, and its output means nothing.
  """
  new = (q_BTNH, k_BTKH, v_BTKH)
  wanted = implementation_for(config)
  # One that only packed rows have, cuDNN's, leaves the cache to XLA.
  for name in decode.candidates(wanted) if wanted in ("auto", *decode.IMPLEMENTATIONS) else ():
    if name.startswith("pallas"):
      try:
        return paged_decode(name, *new, kv_cache, layer, positions_BT)
      except NotImplementedError as e:
        say(f"decode_attention: xla; {e}")
  kv_cache = kv.append(kv_cache, layer, k_BTKH, v_BTKH, positions_BT)
  return cache_attention(q_BTNH, kv_cache, layer, positions_BT), kv_cache


@functools.partial(jax.named_call, name="cache_attention")
def cache_attention(q_BTNH, kv_cache: kv.KVCache, layer, positions_BT):
  """Attention of new tokens over the cache of their sequence, their own entry included: o_BTNH.

  The pages of a sequence side by side hold its tokens by position, so a token at position p sees
  s <= p. A large block of scores, a prefill's, is made a sequence at a time.
  """
  B, T = positions_BT.shape

  def attend_all(q_BTNH, kv_cache, positions_BT):
    k_BKSH, v_BKSH = kv.read(kv_cache, layer, q_BTNH.dtype)
    key_11S = jnp.arange(k_BKSH.shape[2])[None, None]
    visible_BTS = key_11S <= positions_BT[:, :, None]
    return attend(q_BTNH, k_BKSH, v_BKSH, visible_BTS, q_BTNH.shape[-1] ** -0.5)[0]

  if kv_cache.table_BP is None or T == 1 or B * T * kv_cache.context <= SCORES_AT_ONCE:
    return attend_all(q_BTNH, kv_cache, positions_BT)

  def one(row):
    q_TNH, table_P, positions_T = row
    own = kv.with_table(kv_cache, table_P[None])
    return attend_all(q_TNH[None], own, positions_T[None])[0]

  return jax.lax.map(one, (q_BTNH, kv_cache.table_BP, positions_BT))


def paged_decode(name: str, q_BTNH, k_BTKH, v_BTKH, kv_cache: kv.KVCache, layer, positions_BT):
  """append_and_attend in a kernel, which refuses with NotImplementedError what it cannot do."""
  if kv_cache.table_BP is None:
    raise NotImplementedError(f"{name}: the cache has no table")
  tokens = decode.Tokens(*kv.stored(kv_cache, k_BTKH, v_BTKH))
  pages = decode.Cache(**{f.name: getattr(kv_cache, f.name) for f in dataclasses.fields(kv_cache)})
  arguments = (q_BTNH, tokens, pages, jnp.asarray(layer, jnp.int32), positions_BT)
  run = functools.partial(decode.decode_attention, implementation=name)
  if sharding.several_devices():
    heads = P(None, None, "tensor")
    split = lambda tree: jax.tree.map(lambda _: heads, tree)  # noqa: E731
    placed = dataclasses.replace(split(pages), table_BP=P())
    run = shard_map(run, (heads, split(tokens), placed, P(), P()), (heads, placed))
  o_BTNH, pages = run(*arguments)
  return o_BTNH, kv.KVCache(**{f.name: getattr(pages, f.name) for f in dataclasses.fields(pages)})
