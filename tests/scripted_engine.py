"""An engine without a model: what it samples is a function of the request, and it can misbehave.

It has the interface of rollout.engine.Engine, checks that one thread alone calls it, and knows what
has leaked.
"""

import dataclasses
import hashlib
import threading
import time

import numpy as np

from qed_jax.records import Completion
from qed_jax.rollout.requests import Piece, Request, RequestError


@dataclasses.dataclass
class Counters:
  prefilled_tokens: int = 0
  shared_tokens: int = 0
  sampled_tokens: int = 0
  decode_steps: int = 0
  slot_steps: int = 0
  preemptions: int = 0


@dataclasses.dataclass
class Attempt:
  request: Request
  on_piece: object
  answer: Completion
  given: int = 0


class ScriptedEngine:
  """script: (request) -> the token ids of its answer; random ones by default.

  slots: attempts that run at once. chunk: most tokens of a piece; how many varies. step_s: seconds
  that a step takes. fail_at: the step that raises. page: tokens of a page.
  """

  def __init__(
    self, *, vocab_size, stop_ids, slots=8, max_length=512, chunk=5, step_s=2e-4, script=None,
    fail_at=None, page=16,
  ):  # fmt: skip
    self.vocab_size, self.stop_ids, self.slots = vocab_size, tuple(stop_ids), slots
    self.max_length, self.chunk, self.step_s = max_length, chunk, step_s
    self.script, self.fail_at, self.page = script or self.random, fail_at, page
    self.counters = Counters()
    self.pages_total = slots * -(-max_length // page)
    self.steps = self.submitted = self.finished = self.aborted = 0
    self.most_running = 0
    self._waiting, self._running, self._done = {}, {}, []
    self._thread = None

  # --- The interface -----------------------------------------------------------------------------

  def submit(self, request, on_piece=None):
    self._alone()
    answer = self.offline(request)
    self.submitted += 1
    self._waiting[self.submitted] = Attempt(request, on_piece, answer)
    return self.submitted

  def abort(self, ticket):
    self._alone()
    assert (ticket in self._waiting) != (ticket in self._running), f"{ticket} is not here"
    self._waiting.pop(ticket, None)
    self._running.pop(ticket, None)
    self.aborted += 1

  def step(self):
    self._alone()
    self.steps += 1
    if self.fail_at is not None and self.steps >= self.fail_at:
      raise RuntimeError("scripted failure\nof several lines")
    time.sleep(self.step_s)
    while self._waiting and len(self._running) < self.slots:
      ticket = next(iter(self._waiting))
      self._running[ticket] = self._waiting.pop(ticket)
      self.counters.prefilled_tokens += len(self._running[ticket].request.prompt_tokens)
    self.most_running = max(self.most_running, len(self._running))
    for ticket, attempt in list(self._running.items()):
      size = 1 + (7 * ticket + self.steps) % self.chunk
      start, attempt.given = attempt.given, min(attempt.given + size, len(attempt.answer.tokens))
      self.counters.sampled_tokens += attempt.given - start
      if attempt.on_piece is not None:
        attempt.on_piece(piece(attempt.answer, slice(start, attempt.given)))
      if attempt.given == len(attempt.answer.tokens):
        del self._running[ticket]
        self.finished += 1
        self._done.append((ticket, attempt.answer))

  def poll(self):
    self._alone()
    done, self._done = self._done, []
    return done

  @property
  def waiting(self):
    return len(self._waiting)

  @property
  def running(self):
    return len(self._running)

  @property
  def unfinished(self):
    return self.waiting + self.running

  @property
  def pages_free(self):
    used = sum(-(-len(a.request.prompt_tokens) // self.page) for a in self._running.values())
    return self.pages_total - used

  # --- For tests ---------------------------------------------------------------------------------

  def offline(self, request):
    """The Completion that the request will have, from the request alone."""
    n = len(request.prompt_tokens)
    if not 0 < n < self.max_length or max(request.prompt_tokens) >= self.vocab_size:
      raise RequestError(f"a prompt of {n} tokens cannot be served")
    longest = min(request.max_tokens, self.max_length - n)
    tokens, reason = [], "length"
    for token in self.script(request):
      tokens.append(int(token))
      if token in self.stop_ids or token in request.stop_ids:
        reason = "stop"
        break
      if len(tokens) == longest:
        break
    if reason == "length" and len(tokens) < longest:  # the script is over: it stops
      tokens.append(self.stop_ids[0])
      reason = "stop"
    tokens = np.asarray(tokens, np.int32)
    draw = self.noise(request)
    k = request.top_logprobs
    top = draw.integers(0, self.vocab_size, (len(tokens), k), dtype=np.int32)
    return Completion(
      text="",
      tokens=tokens,
      logprobs=-draw.random(len(tokens), np.float32),
      versions=np.zeros(len(tokens), np.int32),
      finish_reason=reason,
      top_tokens=top,
      top_logprobs=-draw.random((len(tokens), k), np.float32),
    )

  def noise(self, request):
    """Random numbers that prompt, seed and attempt name."""
    named = repr((list(map(int, request.prompt_tokens)), request.seed, request.attempt))
    digest = hashlib.sha256(named.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))

  def random(self, request):
    """Up to 40 tokens, any of the vocabulary."""
    draw = self.noise(request)
    return draw.integers(0, self.vocab_size, int(draw.integers(1, 41)))

  def leaked(self):
    """What should be nothing once nobody asks for anything."""
    found = {
      "unfinished": self.unfinished,
      "pages": self.pages_total - self.pages_free,
      "unaccounted": self.submitted - self.finished - self.aborted,
    }
    return {name: count for name, count in found.items() if count}

  def _alone(self):
    self._thread = self._thread or threading.get_ident()
    assert threading.get_ident() == self._thread, "two threads call the engine"


def piece(answer, part):
  return Piece(
    answer.tokens[part],
    answer.logprobs[part],
    answer.versions[part],
    answer.top_tokens[part],
    answer.top_logprobs[part],
  )
