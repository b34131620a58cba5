"""Continuous batching over fixed slots: attempts wait, run and finish; tokens only, no text.

The token at a position of an attempt depends on (parameters, prompt, seed, attempt, position)
alone: not on its slot, on its neighbours or on the order of arrival. Every token carries the
version of the policy that sampled it; `set_params` may come between any two steps.
"""

import asyncio
import collections
import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from qed_jax import sharding
from qed_jax.model.qwen3 import Qwen3Config
from qed_jax.records import Completion, Usage
from qed_jax.rollout import sampler, sampling, weights


class RequestError(ValueError):
  """A request that the engine cannot serve; the others go on."""


@dataclasses.dataclass(frozen=True)
class Request:
  """One attempt at a prompt.

  prompt_tokens: ids. seed, attempt: with the prompt they name the random numbers; attempts of a
  group share the seed and count 0, 1, ... max_tokens: at most this many new tokens.
  temperature: 0 is greedy. top_p: 1 is off. top_k: 0 is off.
  """

  prompt_tokens: Sequence[int]
  seed: int
  attempt: int
  max_tokens: int
  temperature: float
  top_p: float = 1.0
  top_k: int = 0


@dataclasses.dataclass
class Running:
  """An attempt in the engine, and what it has sampled so far, a piece a step."""

  ticket: int
  request: Request
  submitted: float
  tokens: list = dataclasses.field(default_factory=list)
  logprobs: list = dataclasses.field(default_factory=list)
  versions: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Counters:
  """Sums since the engine was made. Busy share = sampled_tokens / slot_steps."""

  prefilled_tokens: int = 0
  sampled_tokens: int = 0
  decode_steps: int = 0
  slot_steps: int = 0


def buckets(smallest: int, largest: int) -> tuple[int, ...]:
  """Powers of two from `smallest` up, the last at least `largest`."""
  top = max(0, math.ceil(math.log2(largest / smallest)))
  return tuple(smallest * 2**i for i in range(top + 1))


class Engine:
  """Slots, the queue in front of them, and the parameters that decode.

  config: model and compute dtype. mesh: devices of this engine, on this host. slots: attempts that
  run at once. max_length: prompt + new tokens of an attempt. chunk: most tokens a slot samples per
  host call. prefill_buckets: padded prompt lengths, ascending. prefill_rows: prompts per prefill.
  stop_ids: tokens that end an attempt. truncated_logp: log-probs on the support that top-k and
  top-p leave instead of the full vocabulary.
  """

  def __init__(
    self,
    config: Qwen3Config,
    *,
    mesh,
    slots: int,
    max_length: int,
    chunk: int,
    prefill_buckets: Sequence[int],
    prefill_rows: int,
    stop_ids: Sequence[int],
    truncated_logp: bool,
  ):
    self.config, self.mesh, self.slots, self.max_length = config, mesh, slots, max_length
    self.chunk, self.stop_ids, self.truncated_logp = chunk, tuple(stop_ids), truncated_logp
    self.prefill_buckets, self.prefill_rows = tuple(prefill_buckets), prefill_rows
    self.counters = Counters()
    self._params, self._version = None, 0
    self._state = sampler.create_state(config, slots, max_length, mesh)
    self._waiting: collections.deque[Running] = collections.deque()
    self._running: dict[int, Running] = {}  # by slot
    self._finished: list[tuple[int, Completion]] = []
    self._tickets = 0

  def set_params(self, params: dict, version: int) -> None:
    """New parameters in the trainer's pytree, from the next step on; running attempts go on.

    Leaves already in the compute dtype and layout are used as they are: a train step that donates
    them must be followed by set_params before the next step here.
    """
    self._params = weights.sampler_params(self.config, params, self.mesh)
    self._version = version

  def warm_up(self) -> None:
    """Compiles every program that requests can need; without it the first ones wait for that."""
    self._need_params()
    with jax.set_mesh(self.mesh):
      for bucket in self.prefill_buckets:
        tokens_PT = self._place(np.zeros((self.prefill_rows, bucket), np.int32))
        prefilled = sampler.prefill(self.config, self._params, tokens_PT)
        nothing = self._place(self._attempts([], []))
        self._state = sampler.admit(self._state, *prefilled, nothing)
      self._decode()

  def submit(self, request: Request) -> int:
    """Queues an attempt -> its ticket. Raises RequestError, one line, when it cannot serve it."""
    self._check(request)
    self._tickets += 1
    self._waiting.append(Running(self._tickets, request, time.monotonic()))
    return self._tickets

  @property
  def unfinished(self) -> int:
    """Attempts waiting or running."""
    return len(self._waiting) + len(self._running)

  def poll(self) -> list[tuple[int, Completion]]:
    """Takes what has finished: (ticket, Completion with an empty text)."""
    finished, self._finished = self._finished, []
    return finished

  def step(self) -> None:
    """Fills free slots from the queue, then samples up to `chunk` tokens in every busy slot."""
    self._need_params()
    with jax.set_mesh(self.mesh):
      self._admit()
      if self._running:
        self._decode()

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
      for ticket, completion in self.poll():
        results[index[ticket]] = completion
        finished += 1
      if progress is not None:
        progress(finished, self.counters.sampled_tokens - before)
    return results

  def _need_params(self) -> None:
    if self._params is None:
      raise ValueError("the engine has no parameters: call set_params first")

  def _check(self, request: Request) -> None:
    n, vocab = len(request.prompt_tokens), self.config.vocab_size
    longest = min(self.max_length - 1, self.prefill_buckets[-1] + 1)
    if n == 0:
      raise RequestError("the prompt is empty: it needs at least one token")
    if n > longest:
      raise RequestError(
        f"the prompt has {n} tokens, this engine takes {longest}: raise max_length "
        f"({self.max_length}) or prefill_buckets (up to {self.prefill_buckets[-1]})"
      )
    low, high = min(request.prompt_tokens), max(request.prompt_tokens)
    if low < 0 or high >= vocab:
      bad = low if low < 0 else high
      raise RequestError(f"prompt token {bad} is not in the vocabulary of {vocab}")
    if request.max_tokens < 1:
      raise RequestError(f"max_tokens is {request.max_tokens}: it must be at least 1")
    if not 0 <= request.temperature < math.inf:
      raise RequestError(f"temperature is {request.temperature}: it must be finite and >= 0")
    if not 0 < request.top_p <= 1:
      raise RequestError(f"top_p is {request.top_p}: it must be in (0, 1]")
    if not 0 <= request.top_k <= sampling.MAX_TOP_K:
      raise RequestError(f"top_k is {request.top_k}: it must be in 0..{sampling.MAX_TOP_K}")

  def _bucket(self, running: Running) -> int:
    n = len(running.request.prompt_tokens) - 1
    return next(b for b in self.prefill_buckets if n <= b)

  def _admit(self) -> None:
    """Prefills the queue's head into the free slots, one compiled shape a bucket.

    The bucket depends on the prompt alone, so that the co-batch cannot change a bit.
    """
    free = [s for s in range(self.slots) if s not in self._running]
    taken = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
    # Attempts of one prompt, whole groups of them, share a row of the prefill.
    by_prompt: dict[tuple, list[Running]] = {}
    for running in taken:
      by_prompt.setdefault(tuple(map(int, running.request.prompt_tokens)), []).append(running)
    by_bucket: dict[int, list[tuple]] = {}
    for prompt, attempts in by_prompt.items():
      by_bucket.setdefault(self._bucket(attempts[0]), []).append(prompt)
    for bucket, prompts in by_bucket.items():
      for i in range(0, len(prompts), self.prefill_rows):
        rows = prompts[i : i + self.prefill_rows]
        self._prefill(bucket, rows, [by_prompt[p] for p in rows], free)

  def _prefill(self, bucket: int, prompts, groups, free: list[int]) -> None:
    tokens_PT = np.zeros((self.prefill_rows, bucket), np.int32)
    for row, prompt in enumerate(prompts):
      tokens_PT[row, : len(prompt) - 1] = prompt[:-1]
    self.counters.prefilled_tokens += sum(len(p) - 1 for p in prompts)
    k_LPTKH, v_LPTKH = sampler.prefill(self.config, self._params, self._place(tokens_PT))
    starts = [(row, running) for row, group in enumerate(groups) for running in group]
    for i in range(0, len(starts), self.prefill_rows):
      attempts = self._attempts(starts[i : i + self.prefill_rows], free)
      self._state = sampler.admit(self._state, k_LPTKH, v_LPTKH, self._place(attempts))

  def _attempts(self, starts: list[tuple[int, Running]], free: list[int]) -> sampler.Attempts:
    rows = self.prefill_rows
    ints = lambda fill: np.full(rows, fill, np.int32)  # noqa: E731
    words = lambda: np.zeros(rows, np.uint32)  # noqa: E731
    controls = sampling.Controls(np.zeros(rows, np.float32), ints(0), np.ones(rows, np.float32))
    a = sampler.Attempts(
      ints(self.slots), ints(0), ints(0), ints(0), ints(0), words(), words(), words(), controls
    )
    for i, (row, running) in enumerate(starts):
      request, slot = running.request, free.pop(0)
      self._running[slot] = running
      n = len(request.prompt_tokens)
      a.slot_B[i], a.row_B[i] = slot, row
      a.token_B[i], a.position_B[i] = request.prompt_tokens[-1], n - 1
      a.remaining_B[i] = min(request.max_tokens, self.max_length - n)
      a.seed_B[i], a.attempt_B[i] = request.seed % 2**32, request.attempt % 2**32
      a.prompt_id_B[i] = sampling.prompt_id(request.prompt_tokens)
      controls.temperature_B[i] = request.temperature
      controls.top_k_B[i], controls.top_p_B[i] = request.top_k, request.top_p
    return a

  def _decode(self) -> None:
    # With work in the queue, come back as soon as a prefill's worth of slots is free.
    fewest = max(1, len(self._running) - self.prefill_rows + 1) if self._waiting else 1
    self._state, chunk = sampler.decode(
      self.config,
      self._params,
      self._state,
      self._place(np.int32(fewest)),
      chunk=self.chunk,
      stop_ids=self.stop_ids,
      truncated_logp=self.truncated_logp,
    )
    chunk = jax.device_get(chunk)
    self.counters.sampled_tokens += int(chunk.count_B.sum())
    self.counters.decode_steps += int(chunk.count_B.max())
    self.counters.slot_steps += int(chunk.count_B.max()) * self.slots
    for slot, running in list(self._running.items()):
      n = int(chunk.count_B[slot])
      running.tokens.append(chunk.tokens_BC[slot, :n])
      running.logprobs.append(chunk.logp_BC[slot, :n])
      running.versions.append(np.full(n, self._version, np.int32))
      if chunk.remaining_B[slot] == 0:
        del self._running[slot]
        self._finished.append((running.ticket, self._completion(running)))

  def _completion(self, running: Running) -> Completion:
    tokens = np.concatenate(running.tokens)
    prompt = np.asarray(running.request.prompt_tokens, np.int32)
    return Completion(
      text="",
      tokens=tokens,
      logprobs=np.concatenate(running.logprobs),
      versions=np.concatenate(running.versions),
      prompt_tokens=prompt,
      finish_reason="stop" if tokens[-1] in self.stop_ids else "length",
      usage=Usage(len(prompt), len(tokens), time.monotonic() - running.submitted, 1),
    )

  def _place(self, tree):
    return sharding.replicate(self.mesh, tree)


class EngineChat:
  """The Chat protocol on an engine, so that scaffolds run on it unchanged.

  Calls wait together: one of them drives the engine in a thread while the event loop serves the
  others, and what they ask meanwhile joins at the next step. Without a `seed`, calls with the same
  prompt draw on: the engine's attempts are counted per prompt under the seed given here.
  """

  def __init__(self, engine: Engine, tokenizer, seed: int):
    self.engine, self.tokenizer, self.seed = engine, tokenizer, seed
    self._asked: list[tuple[Request, asyncio.Future]] = []
    self._futures: dict[int, asyncio.Future] = {}
    self._attempts: collections.Counter = collections.Counter()
    self._driver: asyncio.Task | None = None

  async def chat(
    self,
    messages: Sequence[dict],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    n: int = 1,
    seed: int | None = None,
    thinking: bool = True,
  ) -> list[Completion]:
    """n completions of one conversation. With a `seed` they are attempts 0..n-1 under it.

    Raises RequestError when the engine cannot serve the request.
    """
    prompt = tuple(self.tokenizer.chat(messages, thinking=thinking))
    first = 0
    if seed is None:
      seed, name = self.seed, sampling.prompt_id(prompt)
      first = self._attempts[name]
      self._attempts[name] += n
    futures = []
    for attempt in range(first, first + n):
      request = Request(prompt, seed, attempt, max_tokens, temperature, top_p, top_k)
      futures.append(asyncio.get_running_loop().create_future())
      self._asked.append((request, futures[-1]))
    if self._driver is None or self._driver.done():
      self._driver = asyncio.create_task(self._drive())
    return [self._with_text(c) for c in await asyncio.gather(*futures)]

  def _with_text(self, completion: Completion) -> Completion:
    return dataclasses.replace(completion, text=self.tokenizer.decode(completion.tokens.tolist()))

  async def _drive(self) -> None:
    """Steps the engine until nothing is asked of it; its failure is that of every waiting call."""
    try:
      while True:
        await self._everyone_waits()
        self._submit()
        if not self.engine.unfinished:
          return
        await asyncio.to_thread(self.engine.step)
        for ticket, completion in self.engine.poll():
          future = self._futures.pop(ticket)
          if not future.done():
            future.set_result(completion)
    except Exception as e:
      waiting = [*self._futures.values(), *(future for _, future in self._asked)]
      self._futures, self._asked = {}, []
      for future in waiting:
        if not future.done():
          future.set_exception(e)

  async def _everyone_waits(self) -> None:
    """Lets the coroutines run on until none of them asks for more."""
    asked = -1
    while asked != len(self._asked):
      asked = len(self._asked)
      await asyncio.sleep(0)
      await asyncio.sleep(0)

  def _submit(self) -> None:
    asked, self._asked = self._asked, []
    for request, future in asked:
      try:
        self._futures[self.engine.submit(request)] = future
      except RequestError as e:
        future.set_exception(e)
