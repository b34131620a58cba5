"""Prefill and decode on the device: pages of keys and values, slots, many tokens per host call.

An attempt enters a slot when its context is in the cache but for the last token, which is still to
be fed, so every sampled token, the first one too, comes out of the same decode loop. The parameters
are those of `weights.sampler_params`. Lengths, tables and how to sample are data; the shapes are
few: rows and tokens of a prefill, slots, chunk, and the widths of a table.
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

MAX_STOP_IDS = 20  # of the engine and of a request together
NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
  """What decoding carries: the pages, and one row a slot. Donated to every call.

  token_B: int32, the newest token, not yet in the cache. position_B: int32, its position.
  remaining_B: int32, tokens that may still be sampled; 0 marks a slot that is done or free. key_B:
  the attempt's key. stop_BS: int32, tokens that end it, padded with NO_TOKEN. controls, history:
  how to sample.
  """

  kv_cache: Any
  token_B: Any
  position_B: Any
  remaining_B: Any
  key_B: Any
  stop_BS: Any
  controls: sampling.Controls
  history: sampling.History


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attempts:
  """Attempts to start, one a row; rows to ignore have a slot past the end.

  slot_B: where it goes. token_B: last token of its context. position_B: that token's position.
  remaining_B: tokens it may sample. seed_B, prompt_id_B, attempt_B: uint32, folded into its key.
  """

  slot_B: Any
  token_B: Any
  position_B: Any
  remaining_B: Any
  seed_B: Any
  prompt_id_B: Any
  attempt_B: Any
  stop_BS: Any
  controls: sampling.Controls


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """What one decode call sampled. Slot b holds count_B[b] tokens, from column 0 on.

  tokens_BC: int32. logp_BC: float32. ended_B: bool. failed_B: bool, where it ended because its
  logits were not finite. steps: how many were run. top_tokens_BCK, top_logp_BCK: the likeliest
  tokens where a row asked for them. Nothing here is the state's too, which the next call donates.
  """

  tokens_BC: Any
  logp_BC: Any
  count_B: Any
  ended_B: Any
  failed_B: Any
  steps: Any
  top_tokens_BCK: Any
  top_logp_BCK: Any


def create_state(
  config: qwen3.Qwen3Config, slots: int, pages: int, page: int, kv_dtype: str, by_layer: bool, mesh
) -> SamplingState:
  """Free slots and zeroed pages, laid out over the mesh. by_layer: as weights.by_layer says."""
  new = functools.partial(new_state, config, slots, pages, page, kv_dtype, by_layer)
  with jax.set_mesh(mesh):
    return jax.jit(lambda: _constrain(new()))()


def new_state(
  config: qwen3.Qwen3Config, slots: int, pages: int, page: int, kv_dtype: str, by_layer: bool
) -> SamplingState:
  """The same, wherever it is made."""
  zeros_B = jnp.zeros(slots, jnp.int32)
  return SamplingState(
    kv_cache=kv.create(config, pages, page, kv_dtype, by_layer),
    token_B=zeros_B,
    position_B=zeros_B,
    remaining_B=zeros_B,
    key_B=sampling.attempt_keys(*[jnp.zeros(slots, jnp.uint32)] * 3),
    stop_BS=jnp.full((slots, MAX_STOP_IDS), NO_TOKEN, jnp.int32),
    controls=dataclasses.replace(
      jax.tree.map(jnp.asarray, sampling.neutral(slots)), temperature_B=jnp.zeros(slots)
    ),
    history=sampling.empty_history(slots, config.vocab_size),
  )


def _constrain(state: SamplingState) -> SamplingState:
  """Pins the layout, so that every call leaves the state as the next expects it."""
  by_row = dataclasses.replace(state, kv_cache=None, history=None)
  return dataclasses.replace(
    jax.tree.map(lambda x: constrain(x, "B"), by_row),
    kv_cache=_lay_out(state.kv_cache),
    history=jax.tree.map(lambda x: constrain(x, "BV"), state.history),
  )


def _lay_out(kv_cache):
  is_cache = lambda x: isinstance(x, kv.KVCache)  # noqa: E731
  return jax.tree.map(kv.lay_out, kv_cache, is_leaf=is_cache)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="kv_cache")
def prefill(config, params, kv_cache, tokens_RT, first_R, count_R, table_RP):
  """Computes count_R[r] tokens of a sequence from position first_R[r] on into its pages.

  Rows may be pieces of one sequence: every layer writes all rows before it reads.
  """
  step_1T = jnp.arange(tokens_RT.shape[1])[None]
  positions_RT = jnp.where(step_1T < count_R[:, None], first_R[:, None] + step_1T, -1)
  on_pages = kv.with_table(kv_cache, table_RP)
  _, kv_cache = qwen3.extend(*model_view(config, params), tokens_RT, positions_RT, on_pages)
  return _lay_out(kv.with_table(kv_cache, None))


@functools.partial(jax.jit, donate_argnames="kv_cache")
def copy_pages(kv_cache, source_R, target_R):
  """Copies whole pages; a target past the end is dropped."""
  is_cache = lambda x: isinstance(x, kv.KVCache)  # noqa: E731
  copied = jax.tree.map(lambda c: kv.copy(c, source_R, target_R), kv_cache, is_leaf=is_cache)
  return _lay_out(copied)


@functools.partial(jax.jit, donate_argnames="state")
def admit(state: SamplingState, attempts: Attempts) -> SamplingState:
  """Puts attempts into their slots; a row of zero `remaining_B` frees its slot."""
  key_B = sampling.attempt_keys(attempts.seed_B, attempts.prompt_id_B, attempts.attempt_B)
  put = lambda old_B, new_B: old_B.at[attempts.slot_B].set(new_B, mode="drop")  # noqa: E731
  return _constrain(
    dataclasses.replace(
      state,
      token_B=put(state.token_B, attempts.token_B),
      position_B=put(state.position_B, attempts.position_B),
      remaining_B=put(state.remaining_B, attempts.remaining_B),
      key_B=put(state.key_B, key_B),
      stop_BS=put(state.stop_BS, attempts.stop_BS),
      controls=jax.tree.map(put, state.controls, attempts.controls),
    )
  )


@functools.partial(jax.jit, donate_argnames="state")
def recall(state: SamplingState, slot, counts_V, bias_V) -> SamplingState:
  """What the penalties and the bias of a slot's attempt need (sampling.History)."""
  history = sampling.History(
    state.history.counts_BV.at[slot].set(counts_V), state.history.bias_BV.at[slot].set(bias_V)
  )
  return _constrain(dataclasses.replace(state, history=history))


@functools.partial(
  jax.jit, static_argnames=("config", "chunk", "truncated_logp"), donate_argnames="state"
)
def decode(
  config, params, state: SamplingState, table_BP, fewest, *, chunk: int, truncated_logp: bool
) -> tuple[SamplingState, Chunk]:
  """Samples up to `chunk` tokens in every busy slot; stops early once fewer than `fewest` are busy.

  table_BP: the pages of each slot, enough for its tokens so far and `chunk` more. A stop token is
  sampled, reported and ends the attempt; logits that are not finite end it without a token.
  """
  slots = state.token_B.shape[0]
  pages = state.kv_cache
  # Pages of one layer each are those of a CPU, where it pays to lay a slot's side by side for the
  # whole chunk. Rounding twice to int8 would not be what rounding once is.
  side_by_side = isinstance(pages, list) and pages[0].k_scale_LPKS is None
  if side_by_side:
    state = dataclasses.replace(state, kv_cache=[kv.gather(c, table_BP) for c in pages])
  else:
    state = dataclasses.replace(state, kv_cache=kv.with_table(pages, table_BP))
  first_B, controls = state.position_B, state.controls
  penalised_B = (
    (controls.repetition_B != 1) | (controls.presence_B != 0) | (controls.frequency_B != 0)
  )

  def busy(loop):
    step, state, *_ = loop
    return (step < chunk) & (jnp.sum(state.remaining_B > 0) >= fewest)

  def one_token(loop):
    step, state, sampled, count_B, failed_B = loop
    active_B = state.remaining_B > 0
    model = model_view(config, params)  # here, where its transposes fold into the products
    position_B = jnp.where(active_B, state.position_B, -1)  # a slot that is done reads nothing
    x_BTD, kv_cache = qwen3.extend(
      *model, state.token_B[:, None], position_B[:, None], state.kv_cache
    )
    logits_BV = qwen3.logits(*model, x_BTD[:, 0])
    drawn = sampling.sample(
      logits_BV,
      state.key_B,
      state.position_B + 1,
      state.controls,
      state.history,
      truncated_logp,
    )
    lost_B = active_B & ~drawn.finite_B
    went_on_B = active_B & drawn.finite_B
    stopped_B = jnp.any(drawn.token_B[:, None] == state.stop_BS, axis=1)
    left_B = jnp.where(stopped_B | lost_B, 0, state.remaining_B - 1)
    state = dataclasses.replace(
      state,
      kv_cache=kv_cache,
      token_B=jnp.where(went_on_B, drawn.token_B, state.token_B),
      position_B=state.position_B + went_on_B,
      remaining_B=jnp.where(active_B, left_B, 0),
      history=sampling.remember(state.history, drawn.token_B, went_on_B & penalised_B),
    )
    news = (drawn.token_B, drawn.logp_B, drawn.top_tokens_BK, drawn.top_logp_BK)
    sampled = tuple(
      jax.lax.dynamic_update_index_in_dim(all_C, new, step, 0)
      for all_C, new in zip(sampled, news, strict=True)
    )
    return step + 1, _constrain(state), sampled, count_B + went_on_B, failed_B | lost_B

  top = min(sampling.TOP_LOGPROBS, config.vocab_size)
  sampled = (
    jnp.zeros((chunk, slots), jnp.int32),
    jnp.zeros((chunk, slots)),
    jnp.zeros((chunk, slots, top), jnp.int32),
    jnp.zeros((chunk, slots, top)),
  )
  start = (jnp.int32(0), state, sampled, jnp.zeros(slots, jnp.int32), jnp.zeros(slots, bool))
  steps, state, sampled, count_B, failed_B = jax.lax.while_loop(busy, one_token, start)
  if side_by_side:
    working = zip(pages, state.kv_cache, strict=True)
    pages = [kv.scatter(p, w, table_BP, first_B, state.position_B, chunk) for p, w in working]
    state = dataclasses.replace(state, kv_cache=pages)
  else:
    state = dataclasses.replace(state, kv_cache=kv.with_table(state.kv_cache, None))
  by_slot = (jnp.swapaxes(x, 0, 1) for x in sampled)
  tokens_BC, logp_BC, top_tokens_BCK, top_logp_BCK = by_slot
  chunk = Chunk(
    tokens_BC,
    logp_BC,
    count_B,
    state.remaining_B == 0,
    failed_B,
    steps,
    top_tokens_BCK,
    top_logp_BCK,
  )
  return state, chunk
