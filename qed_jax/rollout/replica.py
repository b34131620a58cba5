"""One set of devices with its slots and pages: admission, chunked prefill, decode, preemption.

Everything is dispatched without waiting: while the device decodes a chunk the host reads the one
before it and prepares the next. The device does things in the order in which they are dispatched,
so a page may change hands as soon as its last use is dispatched. What the host does not know yet it
bounds: pages are set aside for every token that a dispatched chunk might sample.
"""

import collections
import dataclasses
from concurrent.futures import Future

import jax
import numpy as np

from qed_jax.model.qwen3 import Qwen3Config
from qed_jax.rollout.device import Device, Shapes
from qed_jax.rollout.pages import NOBODY, Match, Pages, PrefixIndex
from qed_jax.rollout.requests import Piece, RequestError, Running


@dataclasses.dataclass
class Counters:
  """Sums since the replica was made.

  Busy share = sampled_tokens / slot_steps, over the steps of the decode loops. prefilled_tokens
  were computed, shared_tokens found in the index instead; recomputed_tokens of the first are those
  of attempts that were preempted. peak_pages: most pages that attempts held at once.
  """

  prefilled_tokens: int = 0
  shared_tokens: int = 0
  recomputed_tokens: int = 0
  sampled_tokens: int = 0
  decode_steps: int = 0
  slot_steps: int = 0
  preemptions: int = 0
  copied_pages: int = 0
  evicted_pages: int = 0
  peak_pages: int = 0


@dataclasses.dataclass(frozen=True)
class InFlight:
  """A Future of a Chunk, who was in its slots, and the version that sampled it."""

  chunk: Future
  attempts: tuple[Running, ...]
  version: int


class Replica:
  """Slots and pages on a mesh, and the attempts in them."""

  def __init__(
    self,
    config: Qwen3Config,
    mesh,
    shapes: Shapes,
    *,
    stop_ids: tuple[int, ...],
    truncated_logp: bool,
    by_layer: bool,
    own_thread: bool,
  ):
    self.shapes, self.stop_ids = shapes, stop_ids
    self.device = Device(
      config,
      mesh,
      shapes,
      truncated_logp=truncated_logp,
      by_layer=by_layer,
      own_thread=own_thread,
    )
    self.pages = Pages(shapes.pool)
    self.index = PrefixIndex(self.pages, shapes.page)
    self.counters = Counters()
    self.running: dict[int, Running] = {}  # by slot
    self.preempted: list[Running] = []  # to be queued again
    self._version, self._epoch = 0, 0
    self._in_flight: collections.deque[InFlight] = collections.deque()
    self._to_copy: list[tuple[int, int]] = []  # (from, to); the first is held until it is copied
    self._ended: list[tuple[Running, RequestError | None]] = []
    self._vacated: set[int] = set()  # slots that the device still believes to be busy

  # --- what the engine asks ------------------------------------------------------------------

  @property
  def free_slots(self) -> int:
    return self.shapes.slots - len(self.running)

  @property
  def held_pages(self) -> int:
    """Pages of running attempts; the rest is free or can be had from the index."""
    return len({page for running in self.running.values() for page in running.pages})

  def shared(self, running: Running) -> int:
    """Tokens of its context that the index has."""
    match = self._match(running)
    return len(match.pages) * self.shapes.page + match.rest

  def _match(self, running: Running) -> Match:
    """What of its context the index has and is worth having: a page is not copied for a few tokens
    while others of it are to be computed anyway."""
    match, page = self.index.match(running.to_compute), self.shapes.page
    whole = len(match.pages) * page + match.rest == running.known - 1
    return match if whole or 4 * match.rest >= page else Match(match.pages)

  def computing(self, running: Running) -> int:
    """Tokens of its context that are about to be computed for another attempt."""
    wanted, longest = running.to_compute, 0
    for other in self.running.values():
      if not other.decoding and other.computed < other.known - 1:
        n = min(len(wanted), other.known - 1)
        differs = np.flatnonzero(wanted[:n] != other.to_compute[:n])
        longest = max(longest, int(differs[0]) if len(differs) else n)
    return longest

  def set_params(self, params: dict, version: int, keep_prefixes: bool) -> None:
    """Parameters in the sampler's layout, from the next dispatch on."""
    self.device.params, self._version = params, version
    if not keep_prefixes:
      self.index.clear()
      self._epoch += 1

  def take(self, running: Running) -> bool:
    """Gives the attempt a slot and pages; False when there are none for it now."""
    shapes, page = self.shapes, self.shapes.page
    if not self.free_slots:
      return False
    match = self._match(running)
    borrowed = [*match.pages, *([match.partial] if match.rest else [])]
    self.pages.hold(borrowed)
    reach = min(running.known + shapes.chunk, running.limit)
    own = shapes.pages_for(reach) - len(match.pages)
    if not self._free(own):
      self.pages.release(borrowed)
      return False
    taken = self.pages.take(own)
    if match.rest:
      self._to_copy.append((match.partial, taken[0]))
    running.pages = [*match.pages, *taken]
    running.computed = len(match.pages) * page + match.rest
    running.slot = next(s for s in range(shapes.slots) if s not in self.running)
    running.decoding, running.bound, running.epoch = False, running.known, self._epoch
    self.running[running.slot] = running
    self.counters.shared_tokens += running.computed
    return True

  def drop(self, running: Running) -> None:
    """Takes an attempt out of its slot; what is in flight for it will be ignored."""
    self._leave(running)
    self._vacated.add(running.slot)

  def forget(self, ticket: int) -> None:
    """Drops the attempt if it is here, also when it is about to be queued again or reported."""
    for running in [r for r in self.running.values() if r.ticket == ticket]:
      self.drop(running)
    self.preempted = [r for r in self.preempted if r.ticket != ticket]
    self._ended = [(r, error) for r, error in self._ended if r.ticket != ticket]

  # --- what the device is asked --------------------------------------------------------------

  def prefill(self) -> int:
    """Dispatches one prefill of the oldest attempts that need one -> tokens that it computes."""
    self._copy()
    shapes, R, T = self.shapes, self.shapes.prefill_rows, self.shapes.prefill_tokens
    tokens_RT = np.zeros((R, T), np.int32)
    first_R, count_R = np.zeros(R, np.int32), np.zeros(R, np.int32)
    rows: list[Running] = []
    for running in sorted(self.running.values(), key=lambda r: r.ticket):
      while not running.decoding and running.computed < running.known - 1 and len(rows) < R:
        first, row = running.computed, len(rows)
        piece = running.to_compute[first : first + T]
        tokens_RT[row, : len(piece)], first_R[row], count_R[row] = piece, first, len(piece)
        running.computed += len(piece)
        rows.append(running)
    if not rows:
      return 0
    widest = shapes.pages_for(int((first_R + count_R).max()))
    table_RP = np.full((R, shapes.width(widest)), NOBODY, np.int32)
    for row, running in enumerate(rows):
      held = running.pages[: table_RP.shape[1]]
      table_RP[row, : len(held)] = held
      self.counters.recomputed_tokens += int(count_R[row]) if running.pieces else 0
    self.device.prefill(tokens_RT, first_R, count_R, table_RP)
    for running in dict.fromkeys(rows):
      self._remember_prefix(running, running.computed)
    self.counters.prefilled_tokens += int(count_R.sum())
    return int(count_R.sum())

  def start(self) -> None:
    """Hands attempts whose context is computed to the decode loop, and frees vacated slots."""
    self._copy()
    ready = [
      r for r in self.running.values() if not r.decoding and r.computed == r.known - 1
    ]  # fmt: skip
    vacated = sorted(self._vacated - {r.slot for r in ready})
    self._vacated.clear()
    if not ready and not vacated:
      return
    self.device.admit(ready, vacated, self.stop_ids)
    for running in ready:
      running.decoding = True

  def dispatch(self, waiting: int) -> bool:
    """Dispatches a chunk of decoding, if a slot can use it. waiting: attempts in the queue."""
    for running in sorted(self._decoding(), key=lambda r: r.ticket):
      if self.running.get(running.slot) is running:
        self._reserve(running)
    going = self._decoding()
    # Chunks stop early: one that might be done may still be at it, and keeps its pages.
    if all(running.bound == running.limit for running in going):
      return False
    shapes = self.shapes
    widest = max(shapes.pages_for(self._reach(r)) for r in going)
    table_BP = np.full((shapes.rows, shapes.width(widest)), NOBODY, np.int32)
    for running in going:
      held = running.pages[: table_BP.shape[1]]
      table_BP[running.slot, : len(held)] = held
    # With work in the queue, come back as soon as enough slots are free to be worth a prefill.
    worth = max(1, min(shapes.prefill_rows, shapes.slots // 16))
    fewest = max(1, len(going) - worth + 1) if waiting else 1
    chunk = self.device.decode(table_BP, fewest)
    for running in going:
      running.bound = self._reach(running)
    self.counters.peak_pages = max(self.counters.peak_pages, self.held_pages)
    self._in_flight.append(InFlight(chunk, tuple(going), self._version))
    return True

  def collect(self, leave: int) -> list[tuple[Running, RequestError | None]]:
    """Reads chunks in flight but for the last `leave` -> attempts that ended, and what failed."""
    self._read_all(leave)
    ended, self._ended = self._ended, []
    return ended

  # --- pages ---------------------------------------------------------------------------------

  def _reach(self, running: Running) -> int:
    """Most tokens that it can have after one more chunk."""
    return min(running.bound + self.shapes.chunk, running.limit)

  def _decoding(self) -> list[Running]:
    """Attempts that the device samples for, unless it has found their end meanwhile."""
    return [r for r in self.running.values() if r.decoding]

  def _free(self, wanted: int) -> bool:
    """Whether so many pages are free, after the index gave up what it can."""
    if self.pages.free < wanted:
      self.counters.evicted_pages += self.index.evict(wanted)
    return self.pages.free >= wanted

  def _reserve(self, running: Running) -> None:
    """Pages for one more chunk; the youngest attempts give up theirs if need be."""
    missing = self.shapes.pages_for(self._reach(running)) - len(running.pages)
    if missing > 0 and not self._free(missing):
      self._read_all(leave=0)  # what has ended holds no pages
      if self.running.get(running.slot) is not running:
        return
      missing = self.shapes.pages_for(self._reach(running)) - len(running.pages)
    while missing > 0 and not self._free(missing):
      youngest = max(self.running.values(), key=lambda r: r.ticket)
      self._preempt(youngest)
      if youngest is running:
        return
    if missing > 0:
      running.pages += self.pages.take(missing)

  def _preempt(self, running: Running) -> None:
    """Back to the queue with all that it has sampled; nothing may be in flight."""
    self.drop(running)
    running.decoding, running.computed = False, 0
    self.preempted.append(running)
    self.counters.preemptions += 1

  def _leave(self, running: Running) -> None:
    """Frees the slot; the index keeps what the pages hold for as long as they are not wanted."""
    computed = running.known - 1 if running.decoding else running.computed
    self._remember_prefix(running, computed)
    self.pages.release(running.pages)
    running.pages = []
    del self.running[running.slot]

  def _remember_prefix(self, running: Running, computed: int) -> None:
    if running.epoch == self._epoch:
      held = running.pages[: self.shapes.pages_for(computed)]
      self.index.insert(running.context[:computed], held)

  def _copy(self) -> None:
    """Dispatches the copies of partly filled pages."""
    R = self.shapes.prefill_rows
    while self._to_copy:
      now, self._to_copy = self._to_copy[:R], self._to_copy[R:]
      self.device.copy_pages(now)
      self.pages.release([source for source, _ in now])
      self.counters.copied_pages += len(now)

  # --- results -------------------------------------------------------------------------------

  def _read_all(self, leave: int) -> None:
    while len(self._in_flight) > leave:
      self._read(self._in_flight.popleft())

  def _read(self, flight: InFlight) -> None:
    chunk = flight.chunk.result()
    if not any(r.request.top_logprobs for r in flight.attempts):
      chunk = dataclasses.replace(chunk, top_tokens_BCK=None, top_logp_BCK=None)
    chunk = jax.device_get(chunk)
    counters = self.counters
    counters.decode_steps += int(chunk.steps)
    counters.slot_steps += int(chunk.steps) * self.shapes.slots
    for running in flight.attempts:
      slot = running.slot
      if self.running.get(slot) is not running:
        continue  # it left meanwhile
      n, k = int(chunk.count_B[slot]), running.request.top_logprobs
      counters.sampled_tokens += n
      tops = (
        (chunk.top_tokens_BCK[slot, :n, :k], chunk.top_logp_BCK[slot, :n, :k])
        if k
        else (np.zeros((n, 0), np.int32), np.zeros((n, 0), np.float32))
      )
      versions = np.full(n, flight.version, np.int32)
      running.add(Piece(chunk.tokens_BC[slot, :n], chunk.logp_BC[slot, :n], versions, *tops))
      if self.running.get(slot) is not running:
        continue  # its on_piece aborted it
      if chunk.ended_B[slot]:
        self._leave(running)
        error = RequestError(
          f"the logits of token {running.known} are not finite: the parameters are damaged"
        )
        self._ended.append((running, error if chunk.failed_B[slot] else None))
      else:
        ahead = sum(running in later.attempts for later in self._in_flight)
        running.bound = min(running.known + ahead * self.shapes.chunk, running.limit)
