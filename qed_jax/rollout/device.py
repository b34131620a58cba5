"""The programs of sampler.py on one set of devices: dispatched in order, without waiting."""

import dataclasses
import functools
from concurrent.futures import Future, ThreadPoolExecutor

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
  def rows(self) -> int:
    """Rows of the decode loop. A product with one is a vector's: four times slower on a CPU."""
    return max(2, self.slots)

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
  own, which nobody waits for. XLA's CPU client runs what one thread dispatched one after the other,
  even programs that share nothing, and small ones while the caller waits; so lanes that are to run
  side by side need a thread each. What fails there is raised by every later Chunk.
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
    self._failure: BaseException | None = None
    dtype = shapes.kv_dtype or config.dtype
    self._state = sampler.create_state(
      config, shapes.rows, shapes.pool, shapes.page, dtype, by_layer, mesh
    )

  def prefill(self, tokens_RT, first_R, count_R, table_RP) -> None:
    program = functools.partial(sampler.prefill, self.config, self.params)
    self._on_pages(program, (tokens_RT, first_R, count_R, table_RP))

  def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
    """(from, to), at most prefill_rows of them."""
    R = self.shapes.prefill_rows
    source_R, target_R = np.zeros(R, np.int32), np.full(R, self.shapes.pool, np.int32)
    for i, (source, target) in enumerate(pairs):
      source_R[i], target_R[i] = source, target
    self._on_pages(sampler.copy_pages, (source_R, target_R))

  def admit(self, ready: list[Running], vacated: list[int], stop_ids: tuple[int, ...]) -> None:
    """Starts attempts whose context is computed, and stops the slots of those that left."""
    V = self.config.vocab_size
    rows = attempt_rows(self.shapes.rows, ready, vacated, stop_ids)
    self._dispatch(lambda state, rows: (sampler.admit(state, rows), None), (rows,))
    for running in ready:
      if running.remembers:
        self._recall(running.slot, running.counts(V), running.bias(V))

  def decode(self, table_BP, fewest: int) -> Future:
    """A Future of the Chunk."""
    static = {"chunk": self.shapes.chunk, "truncated_logp": self.truncated_logp}
    program = functools.partial(sampler.decode, self.config, self.params, **static)
    return self._dispatch(program, (table_BP, np.int32(fewest)))

  def warm_up(self) -> None:
    """Runs every program once on nothing: compiles what requests can need."""
    shapes, R, B = self.shapes, self.shapes.prefill_rows, self.shapes.rows
    nothing_R, V = np.zeros(R, np.int32), self.config.vocab_size
    for width in shapes.widths:
      tokens_RT = np.zeros((R, shapes.prefill_tokens), np.int32)
      self.prefill(tokens_RT, nothing_R, nothing_R, np.zeros((R, width), np.int32))
      self.decode(np.zeros((B, width), np.int32), fewest=B + 1).result()
    self.copy_pages([])
    self._recall(0, np.zeros(V, np.int32), np.zeros(V, np.float32))
    self.admit([], [], ())

  def _recall(self, slot: int, counts_V, bias_V) -> None:
    program = lambda state, *row: (sampler.recall(state, *row), None)  # noqa: E731
    self._dispatch(program, (np.int32(slot), counts_V, bias_V))

  def _on_pages(self, program, arrays: tuple) -> None:
    def with_pages(state, *arrays):
      return dataclasses.replace(state, kv_cache=program(state.kv_cache, *arrays)), None

    self._dispatch(with_pages, arrays)

  def _dispatch(self, program, arrays: tuple) -> Future:
    """Dispatches program(state, *arrays) -> (state, result), the arrays placed on the mesh."""

    def call():
      if self._failure is not None:  # the state is not what the host believes it to be
        raise self._failure
      try:
        with jax.set_mesh(self.mesh):
          placed = sharding.replicate(self.mesh, arrays)
          self._state, result = program(self._state, *placed)
      except BaseException as e:
        self._failure = e
        raise
      return result

    if self._thread is not None:
      return self._thread.submit(call)
    done: Future = Future()
    done.set_result(call())
    return done


def attempt_rows(
  count: int, ready: list[Running], vacated: list[int], stop_ids: tuple[int, ...]
) -> sampler.Attempts:
  """`count` rows for sampler.admit: attempts to start, slots to stop, and rows that it ignores."""
  ints = lambda fill: np.full(count, fill, np.int32)  # noqa: E731
  words = lambda: np.zeros(count, np.uint32)  # noqa: E731
  controls = sampling.neutral(count)
  controls.temperature_B[:] = 0  # greedy slots draw no noise: what is nobody's costs nothing
  stop_BS = np.full((count, sampler.MAX_STOP_IDS), sampler.NO_TOKEN, np.int32)
  a = sampler.Attempts(
    ints(count), ints(0), ints(0), ints(0), words(), words(), words(), stop_BS, controls
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
