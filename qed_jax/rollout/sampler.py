"""Prefill and decode on the device: slots, prompts written into them, many tokens per host call.

An attempt starts with its prompt's keys and values in a slot and its last prompt token still to be
fed, so every sampled token, the first one too, comes out of the same decode loop. The parameters
are those of `weights.sampler_params`. All shapes are fixed: prompt buckets, rows of a prefill,
slots, cache length, chunk.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qed_jax.model import kv_cache as kv
from qed_jax.model import qwen3
from qed_jax.rollout import sampling
from qed_jax.rollout.weights import model_view
from qed_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
  """What decoding carries: one row a slot. Donated to every call.

  kv_cache: keys and values of positions below position_B. token_B: int32, the newest token, not yet
  in the cache. position_B: int32, its position. remaining_B: int32, tokens that may still be
  sampled; 0 marks a slot that is done or free. key_B: the attempt's key. controls: how to sample.
  """

  kv_cache: kv.KVCache
  token_B: Any
  position_B: Any
  remaining_B: Any
  key_B: Any
  controls: sampling.Controls


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attempts:
  """Attempts to start, one a row; rows to ignore have a slot past the end.

  slot_B: where it goes. row_B: which row of the prefill holds its prompt. token_B: last token of
  the prompt. position_B: its position. remaining_B: tokens it may sample. seed_B, prompt_id_B,
  attempt_B: uint32, folded into its key.
  """

  slot_B: Any
  row_B: Any
  token_B: Any
  position_B: Any
  remaining_B: Any
  seed_B: Any
  prompt_id_B: Any
  attempt_B: Any
  controls: sampling.Controls


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """What one decode call sampled. Slot b holds count_B[b] tokens, from column 0 on.

  tokens_BC: int32. logp_BC: float32. remaining_B: int32, 0 where the attempt ended.
  """

  tokens_BC: Any
  logp_BC: Any
  count_B: Any
  remaining_B: Any


def create_state(config: qwen3.Qwen3Config, slots: int, max_length: int, mesh) -> SamplingState:
  """Free slots with a zeroed cache, laid out over the mesh."""

  def create():
    zeros_B = jnp.zeros(slots, jnp.int32)
    return SamplingState(
      kv_cache=kv.create(config, slots, max_length, config.dtype),
      token_B=zeros_B,
      position_B=zeros_B,
      remaining_B=zeros_B,
      key_B=sampling.attempt_keys(*[jnp.zeros(slots, jnp.uint32)] * 3),
      controls=sampling.Controls(jnp.zeros(slots), zeros_B, jnp.ones(slots)),
    )

  with jax.set_mesh(mesh):
    return jax.jit(lambda: _constrain(create()))()


def _constrain(state: SamplingState) -> SamplingState:
  """Pins the layout, so that every call leaves the state as the next expects it."""
  cache = jax.tree.map(lambda x: constrain(x, "LBKSH"), state.kv_cache)
  rows = dataclasses.replace(state, kv_cache=None)
  return dataclasses.replace(jax.tree.map(lambda x: constrain(x, "B"), rows), kv_cache=cache)


@functools.partial(jax.jit, static_argnums=0)
def prefill(config, params, tokens_PT):
  """Prompts without their last token, padded on the right -> k_LPTKH, v_LPTKH."""
  return qwen3.prefill(*model_view(config, params), tokens_PT)[1:]


@functools.partial(jax.jit, donate_argnums=0)
def admit(state: SamplingState, k_LPTKH, v_LPTKH, attempts: Attempts) -> SamplingState:
  """Puts attempts into their slots; attempts at one prompt share a row of the prefill."""
  length = state.kv_cache.k_LBKSH.shape[3]
  k_LPTKH, v_LPTKH = (x[:, attempts.row_B, :length] for x in (k_LPTKH, v_LPTKH))
  key_B = sampling.attempt_keys(attempts.seed_B, attempts.prompt_id_B, attempts.attempt_B)
  put = lambda old_B, new_B: old_B.at[attempts.slot_B].set(new_B, mode="drop")  # noqa: E731
  return _constrain(
    SamplingState(
      kv_cache=kv.insert(state.kv_cache, attempts.slot_B, k_LPTKH, v_LPTKH),
      token_B=put(state.token_B, attempts.token_B),
      position_B=put(state.position_B, attempts.position_B),
      remaining_B=put(state.remaining_B, attempts.remaining_B),
      key_B=put(state.key_B, key_B),
      controls=jax.tree.map(put, state.controls, attempts.controls),
    )
  )


@functools.partial(
  jax.jit,
  static_argnames=("config", "chunk", "stop_ids", "truncated_logp"),
  donate_argnames=("state",),
)
def decode(
  config, params, state: SamplingState, fewest, *, chunk: int, stop_ids: tuple, truncated_logp: bool
) -> tuple[SamplingState, Chunk]:
  """Samples up to `chunk` tokens in every busy slot; stops early once fewer than `fewest` are busy.

  A stop token is sampled, reported and ends the attempt.
  """
  slots = state.token_B.shape[0]
  stop_S = jnp.array(stop_ids, jnp.int32)

  def busy(loop):
    step, state, *_ = loop
    return (step < chunk) & (jnp.sum(state.remaining_B > 0) >= fewest)

  def one_token(loop):
    step, state, tokens_CB, logp_CB, count_B = loop
    active_B = state.remaining_B > 0
    model = model_view(config, params)
    x_BTD, kv_cache = qwen3.decode(
      *model, state.token_B[:, None], state.position_B[:, None], state.kv_cache
    )
    logits_BV = qwen3.logits(*model, x_BTD[:, 0])
    token_B, logp_B = sampling.sample(
      logits_BV, state.key_B, state.position_B + 1, state.controls, truncated_logp
    )
    stopped_B = jnp.any(token_B[:, None] == stop_S[None], axis=1)
    left_B = jnp.where(stopped_B, 0, state.remaining_B - 1)
    state = dataclasses.replace(
      state,
      kv_cache=kv_cache,
      token_B=jnp.where(active_B, token_B, state.token_B),
      position_B=state.position_B + active_B,
      remaining_B=jnp.where(active_B, left_B, 0),
    )
    tokens_CB = jax.lax.dynamic_update_index_in_dim(tokens_CB, token_B, step, 0)
    logp_CB = jax.lax.dynamic_update_index_in_dim(logp_CB, logp_B, step, 0)
    return step + 1, _constrain(state), tokens_CB, logp_CB, count_B + active_B

  by_layer = 0 in params["layers"]
  if by_layer:
    state = dataclasses.replace(state, kv_cache=kv.split(state.kv_cache))
  tokens_CB = jnp.zeros((chunk, slots), jnp.int32)
  start = (jnp.int32(0), state, tokens_CB, jnp.zeros((chunk, slots)), jnp.zeros(slots, jnp.int32))
  _, state, tokens_CB, logp_CB, count_B = jax.lax.while_loop(busy, one_token, start)
  if by_layer:
    state = dataclasses.replace(state, kv_cache=kv.join(state.kv_cache))
  return state, Chunk(tokens_CB.T, logp_CB.T, count_B, state.remaining_B)
