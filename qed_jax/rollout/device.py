"""The programs of sampler.py on one set of devices: dispatched in order, without waiting."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from qed_jax import sharding
from qed_jax.model.qwen3 import Qwen3Config
from qed_jax.rollout import sampler, sampling
from qed_jax.rollout.requests import Running

SMALLEST_WIDTH = 8  # pages of a table, where max_length asks for as many


@dataclasses.dataclass(frozen=True)
class Shapes:
  """The static shapes of a replica.

  slots: attempts that run at once. max_length: prompt + new tokens of an attempt. page: tokens of a
  page. pages: how many, 0 for as many as the slots can need. chunk: most tokens a slot samples per
  host call. prefill_rows, prefill_tokens: one prefill computes up to rows pieces of so many tokens.
  kv_dtype: of the pages; "" for the compute dtype, "int8" for a byte and a scale a head.
  """

  slots: int
  max_length: int
  page: int
  pages: int
  chunk: int
  prefill_rows: int
  prefill_tokens: int
  kv_dtype: str

  def pages_for(self, tokens: int) -> int:
    return -(-tokens // self.page)

  @property
  def pool(self) -> int:
    """Pages on the device, nobody's among them."""
    # One attempt of the largest length must always fit, and the page that it copies from.
    longest = self.pages_for(self.max_length)
    return 1 + max(longest + 1, self.pages or self.slots * longest)

  @property
  def widths(self) -> tuple[int, ...]:
    """Pages of a table, ascending: powers of two, so that few programs serve all lengths."""
    longest = self.pages_for(self.max_length)
    smallest = min(longest, max(self.pages_for(2 * self.chunk), SMALLEST_WIDTH))
    widths = [smallest]
    while widths[-1] < longest:
      widths.append(min(2 * widths[-1], longest))
    return tuple(widths)

  def width(self, pages: int) -> int:
    return next(w for w in self.widths if pages <= w)


class Device:
  """The sampling state on a mesh, donated from call to call, and the parameters it samples with.

  Every method takes numpy arrays, places them and dispatches one program; only the host arrays of
  a Chunk are ever read back, by whoever asked for it. own_thread: dispatch from a thread of its
  own. What one thread dispatches, XLA's CPU client runs in that order, one after the other, even
  programs that share nothing; so lanes that are to run side by side need a thread each.
  """

  def __init__(
    self,
    config: Qwen3Config,
    mesh,
    shapes: Shapes,
    *,
    truncated_logp: bool,
    by_layer: bool,
    own_thread: bool,
  ):
    self.config, self.mesh, self.shapes = config, mesh, shapes
    self.truncated_logp, self.params = truncated_logp, None
    self._thread = ThreadPoolExecutor(1, "lane") if own_thread else None
    dtype = shapes.kv_dtype or config.dtype
    self._state = sampler.create_state(
      config, shapes.slots, shapes.pool, shapes.page, dtype, by_layer, mesh
    )

  def prefill(self, tokens_RT, first_R, count_R, table_RP) -> None:
    program = functools.partial(sampler.prefill, self.config, self.params)
    rows = (tokens_RT, first_R, count_R, table_RP)
    kv_cache = self._dispatch(program, self._state.kv_cache, rows)
    self._state = dataclasses.replace(self._state, kv_cache=kv_cache)

  def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
    """(from, to), at most prefill_rows of them."""
    R = self.shapes.prefill_rows
    source_R, target_R = np.zeros(R, np.int32), np.full(R, self.shapes.pool, np.int32)
    for i, (source, target) in enumerate(pairs):
      source_R[i], target_R[i] = source, target
    rows = (source_R, target_R)
    kv_cache = self._dispatch(sampler.copy_pages, self._state.kv_cache, rows)
    self._state = dataclasses.replace(self._state, kv_cache=kv_cache)

  def admit(self, ready: list[Running], vacated: list[int], stop_ids: tuple[int, ...]) -> None:
    """Starts attempts whose context is computed, and stops the slots of those that left."""
    V = self.config.vocab_size
    rows = attempt_rows(self.shapes.slots, ready, vacated, stop_ids)
    self._state = self._dispatch(sampler.admit, self._state, (rows,))
    for running in ready:
      if running.remembers:
        self._recall(running.slot, running.counts(V), running.bias(V))

  def decode(self, table_BP, fewest: int) -> sampler.Chunk:
    def program(state, table_BP, fewest):
      static = {"chunk": self.shapes.chunk, "truncated_logp": self.truncated_logp}
      return sampler.decode(self.config, self.params, state, table_BP, fewest, **static)

    self._state, chunk = self._dispatch(program, self._state, (table_BP, np.int32(fewest)))
    return chunk

  def warm_up(self) -> None:
    """Runs every program once on nothing: compiles what requests can need."""
    shapes, R, B = self.shapes, self.shapes.prefill_rows, self.shapes.slots
    nothing_R, V = np.zeros(R, np.int32), self.config.vocab_size
    for width in shapes.widths:
      tokens_RT = np.zeros((R, shapes.prefill_tokens), np.int32)
      self.prefill(tokens_RT, nothing_R, nothing_R, np.zeros((R, width), np.int32))
      self.decode(np.zeros((B, width), np.int32), fewest=B + 1)
    self.copy_pages([])
    self.admit([], [], ())
    self._recall(0, np.zeros(V, np.int32), np.zeros(V, np.float32))

  def _recall(self, slot: int, counts_V, bias_V) -> None:
    row = (np.int32(slot), counts_V, bias_V)
    self._state = self._dispatch(sampler.recall, self._state, row)

  def _dispatch(self, program, state, arrays: tuple):
    """program(state, *arrays), the arrays on the devices of the mesh."""

    def call():
      with jax.set_mesh(self.mesh):
        return program(state, *sharding.replicate(self.mesh, arrays))

    return call() if self._thread is None else self._thread.submit(call).result()


def attempt_rows(
  slots: int, ready: list[Running], vacated: list[int], stop_ids: tuple[int, ...]
) -> sampler.Attempts:
  """Rows for sampler.admit: attempts to start, and slots to stop."""
  ints = lambda fill: np.full(slots, fill, np.int32)  # noqa: E731
  words = lambda: np.zeros(slots, np.uint32)  # noqa: E731
  controls = sampling.neutral(slots)
  controls.temperature_B[:] = 0  # greedy slots draw no noise: what is nobody's costs nothing
  stop_BS = np.full((slots, sampler.MAX_STOP_IDS), sampler.NO_TOKEN, np.int32)
  a = sampler.Attempts(
    ints(slots), ints(0), ints(0), ints(0), words(), words(), words(), stop_BS, controls
  )
  for i, running in enumerate(ready):
    request = running.request
    a.slot_B[i] = running.slot
    a.token_B[i], a.position_B[i] = running.context[-1], running.known - 1
    a.remaining_B[i] = running.limit - running.known
    a.seed_B[i], a.attempt_B[i] = request.seed % 2**32, request.attempt % 2**32
    a.prompt_id_B[i] = running.prompt_id
    ends = (*stop_ids, *request.stop_ids)
    stop_BS[i, : len(ends)] = ends
    controls.temperature_B[i], controls.top_k_B[i] = request.temperature, request.top_k
    controls.top_p_B[i], controls.min_p_B[i] = request.top_p, request.min_p
    controls.repetition_B[i] = request.repetition_penalty
    controls.presence_B[i] = request.presence_penalty
    controls.frequency_B[i] = request.frequency_penalty
    controls.biased_B[i] = bool(request.logit_bias)
    controls.top_logprobs_B[i] = request.top_logprobs > 0
  a.slot_B[len(ready) : len(ready) + len(vacated)] = vacated
  return a
