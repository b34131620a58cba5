"""Continuous batching: a queue in front of replicas, each with its own slots and pages.

Tokens only, no text. The token at a position of an attempt depends on (parameters, prompt, seed,
attempt, position) alone: not on its slot, its neighbours, the order of arrival, preemption or how
its prompt was prefilled. Every token carries the version of the policy that sampled it;
`set_params` may come between any two steps.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

from qed_jax import sharding
from qed_jax.model.qwen3 import Qwen3Config
from qed_jax.records import Completion
from qed_jax.rollout import weights
from qed_jax.rollout.device import Shapes
from qed_jax.rollout.replica import Counters, Replica
from qed_jax.rollout.requests import Piece, Request, RequestError, Running, check

# A slot's company costs an attempt about as much time as the prefill of so many tokens does: what
# sharing a prefix must save before attempts crowd into one replica.
CROWDING_TOKENS = 16


class Engine:
  """The queue, the replicas, and the parameters that they decode with.

  config: model and compute dtype. mesh: devices of this engine, on this host; each row of its
  `tensor` axis is a replica. shapes: of the whole engine; replicas share slots and pages evenly.
  lanes: replicas on each set of devices: one on an accelerator; on a CPU, two programs keep two
  cores busier than one does. prefill_budget: most tokens computed for prompts before a chunk of
  decoding that waits for them. stop_ids: tokens that end an attempt. truncated_logp: log-probs on
  the support that top-k, top-p and min-p leave instead of the full vocabulary. keep_prefixes:
  whether what the index holds outlives the parameters that computed it.
  """

  def __init__(
    self,
    config: Qwen3Config,
    *,
    mesh,
    shapes: Shapes,
    lanes: int,
    prefill_budget: int,
    stop_ids: Sequence[int],
    truncated_logp: bool,
    keep_prefixes: bool,
  ):
    self.config, self.stop_ids = config, tuple(stop_ids)
    self.slots, self.max_length = shapes.slots, shapes.max_length
    self.prefill_budget, self.keep_prefixes = prefill_budget, keep_prefixes
    self.mesh = mesh
    meshes = sharding.replica_meshes(mesh)
    count = len(meshes) * lanes
    if shapes.slots % count or (shapes.pages % count):
      raise ValueError(
        f"slots={shapes.slots} and pages={shapes.pages} must be multiples of the {count} replicas "
        f"({len(meshes)} sets of devices x {lanes} lanes)"
      )
    share = dataclasses.replace(shapes, slots=shapes.slots // count, pages=shapes.pages // count)
    self.replicas = [
      Replica(
        config,
        replica_mesh,
        share,
        stop_ids=self.stop_ids,
        truncated_logp=truncated_logp,
        by_layer=weights.by_layer(replica_mesh),
        own_thread=lanes > 1,
      )
      for replica_mesh in meshes
      for _ in range(lanes)
    ]
    self._lanes, self._ready = lanes, False
    self._waiting: collections.deque[Running] = collections.deque()
    self._finished: list[tuple[int, Completion | RequestError]] = []
    self._tickets = 0

  def set_params(self, params: dict, version: int) -> None:
    """New parameters in the trainer's pytree, from the next step on; running attempts go on.

    Leaves already in the compute dtype and layout are used as they are: a train step that donates
    them must be followed by set_params before the next step here. Raises ValueError, and keeps the
    old ones, when paths or shapes are not those of the model.
    """
    weights.check(self.config, params)
    own = weights.sampler_params(self.config, params, self.mesh)
    for i, replica in enumerate(self.replicas):
      replica.set_params(own[i // self._lanes], version, self.keep_prefixes)
    self._ready = True

  def warm_up(self) -> None:
    """Compiles every program that requests can need; without it the first ones wait for that."""
    self._need_params()
    for replica in self.replicas:
      replica.device.warm_up()

  def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None) -> int:
    """Queues an attempt -> its ticket. Raises RequestError, one line, when it cannot serve it.

    on_piece: called from `step` with what the attempt has sampled since the last call.
    """
    check(
      request,
      vocab_size=self.config.vocab_size,
      max_length=self.max_length,
      stop_ids=self.stop_ids,
    )
    self._tickets += 1
    limit = min(len(request.prompt_tokens) + request.max_tokens, self.max_length)
    self._waiting.append(Running(self._tickets, request, limit, on_piece))
    return self._tickets

  def abort(self, ticket: int) -> None:
    """Forgets an attempt, wherever it is; its ticket is never polled. Unknown ones are ignored."""
    self._waiting = collections.deque(r for r in self._waiting if r.ticket != ticket)
    self._finished = [(t, result) for t, result in self._finished if t != ticket]
    for replica in self.replicas:
      replica.forget(ticket)

  @property
  def waiting(self) -> int:
    return len(self._waiting)

  @property
  def running(self) -> int:
    return sum(len(replica.running) for replica in self.replicas)

  @property
  def unfinished(self) -> int:
    """Attempts waiting or running."""
    return self.waiting + self.running

  @property
  def vocab_size(self) -> int:
    return self.config.vocab_size

  @property
  def pages_total(self) -> int:
    return sum(replica.pages.total for replica in self.replicas)

  @property
  def pages_free(self) -> int:
    """Pages that no running attempt holds."""
    return self.pages_total - sum(replica.held_pages for replica in self.replicas)

  @property
  def counters(self) -> Counters:
    """Sums over the replicas."""
    sums = Counters()
    for field in dataclasses.fields(Counters):
      setattr(sums, field.name, sum(getattr(r.counters, field.name) for r in self.replicas))
    return sums

  def poll(self) -> list[tuple[int, Completion | RequestError]]:
    """Takes what has finished: (ticket, Completion with an empty text, or why there is none)."""
    finished, self._finished = self._finished, []
    return finished

  def step(self) -> None:
    """Starts attempts from the queue, dispatches a chunk a replica, reads the chunk before it."""
    self._need_params()
    self._fill()
    dispatched = [replica.dispatch(self.waiting) for replica in self.replicas]
    for replica, ahead in zip(self.replicas, dispatched, strict=True):
      for running, error in replica.collect(leave=int(ahead)):
        result = error or running.completion(self.stop_ids)
        self._finished.append((running.ticket, result))
      preempted, replica.preempted = replica.preempted, []
      if preempted:
        queued = sorted([*preempted, *self._waiting], key=lambda r: r.ticket)
        self._waiting = collections.deque(queued)

  def generate(
    self,
    requests: Sequence[Request],
    progress: Callable[[int, int], None] | None = None,
  ) -> list[Completion | RequestError]:
    """Runs requests to the end -> what became of each, in their order.

    A request that cannot be served gives a RequestError in its place. progress(finished, sampled
    tokens) is called after every step. Nothing else may be in the engine.
    """
    if self.unfinished:
      raise ValueError(f"{self.unfinished} submitted attempts are unfinished: step and poll them")
    results: list = [None] * len(requests)
    index = {}
    for i, request in enumerate(requests):
      try:
        index[self.submit(request)] = i
      except RequestError as e:
        results[i] = e
    refused, before = len(requests) - len(index), self.counters.sampled_tokens
    finished = refused
    while self.unfinished:
      self.step()
      for ticket, result in self.poll():
        results[index[ticket]] = result
        finished += 1
      if progress is not None:
        progress(finished, self.counters.sampled_tokens - before)
    return results

  def _need_params(self) -> None:
    if not self._ready:
      raise ValueError("the engine has no parameters: call set_params first")

  def _fill(self) -> None:
    """Assigns the queue to free slots and computes contexts, within the budget.

    Attempts of which another one is about to compute more than half wait for it, a round or two.
    """
    decoding = any(r.decoding for replica in self.replicas for r in replica.running.values())
    computed = 0
    while True:
      assigned = self._assign()
      now = sum(replica.prefill() for replica in self.replicas)
      computed += now
      if not (assigned or now) or (decoding and computed >= self.prefill_budget):
        break
    for replica in self.replicas:
      replica.start()

  def _assign(self) -> bool:
    """Gives waiting attempts their slots, the first in the queue first -> whether any got one."""
    passed_over, assigned = [], False
    while self._waiting and len(passed_over) < self.slots:
      open_replicas = [r for r in self.replicas if r.free_slots]
      if not open_replicas:
        break
      running = self._waiting.popleft()
      shared = {id(r): r.shared(running) for r in open_replicas}
      best = max(shared.values())
      gain = max(r.computing(running) for r in open_replicas) - best
      if gain > 0 and 2 * gain >= running.known - 1 - best:
        passed_over.append(running)
        continue
      by_cost = sorted(
        open_replicas, key=lambda r: CROWDING_TOKENS * len(r.running) - shared[id(r)]
      )
      if not any(replica.take(running) for replica in by_cost):
        passed_over.append(running)
        break
      assigned = True
    self._waiting.extendleft(reversed(passed_over))
    return assigned
