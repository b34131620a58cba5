"""What an engine is asked for, and the bookkeeping of an attempt while it waits and runs."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from qed_jax.chat import ChatError
from qed_jax.records import Completion, Usage
from qed_jax.rollout import sampler, sampling


class RequestError(ChatError, ValueError):
  """A request that the engine cannot serve; the others go on."""


@dataclasses.dataclass(frozen=True)
class Request:
  """One attempt at a prompt.

  prompt_tokens: ids. seed, attempt: with the prompt they name the random numbers; attempts of a
  group share the seed and count 0, 1, ... max_tokens: at most this many new tokens. temperature: 0
  is greedy. top_p: 1 is off. top_k, min_p: 0 is off. repetition_penalty: 1 is off, of prompt and
  completion. presence_penalty, frequency_penalty: 0 is off, of the completion. logit_bias: (token,
  bias) pairs. stop_ids: tokens that end it beside the engine's. top_logprobs: likeliest tokens to
  report at each position.
  """

  prompt_tokens: Sequence[int]
  seed: int
  attempt: int
  max_tokens: int
  temperature: float
  top_p: float = 1.0
  top_k: int = 0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: tuple[tuple[int, float], ...] = ()
  stop_ids: tuple[int, ...] = ()
  top_logprobs: int = 0


@dataclasses.dataclass(frozen=True)
class Piece:
  """Tokens that an attempt has sampled since the last piece, as in Completion."""

  tokens: np.ndarray
  logprobs: np.ndarray
  versions: np.ndarray
  top_tokens: np.ndarray
  top_logprobs: np.ndarray


def check(request: Request, *, vocab_size: int, max_length: int, stop_ids: tuple) -> None:
  """Raises RequestError, one line, for a request that cannot be served."""
  r, n = request, len(request.prompt_tokens)
  if n == 0:
    raise RequestError("the prompt is empty: it needs at least one token")
  if n > max_length - 1:
    raise RequestError(
      f"the prompt has {n} tokens, this engine takes {max_length - 1}: raise max_length "
      f"({max_length})"
    )
  _in_vocabulary("prompt token", r.prompt_tokens, vocab_size)
  if r.max_tokens < 1:
    raise RequestError(f"max_tokens is {r.max_tokens}: it must be at least 1")
  if not 0 <= r.temperature < math.inf:
    raise RequestError(f"temperature is {r.temperature}: it must be finite and >= 0")
  if not 0 < r.top_p <= 1:
    raise RequestError(f"top_p is {r.top_p}: it must be in (0, 1]")
  if not 0 <= r.top_k <= sampling.MAX_TOP_K:
    raise RequestError(f"top_k is {r.top_k}: it must be in 0..{sampling.MAX_TOP_K}")
  if not 0 <= r.min_p <= 1:
    raise RequestError(f"min_p is {r.min_p}: it must be in [0, 1]")
  if not 0 < r.repetition_penalty < math.inf:
    raise RequestError(f"repetition_penalty is {r.repetition_penalty}: it must be > 0")
  for name in ("presence_penalty", "frequency_penalty"):
    if not math.isfinite(getattr(r, name)):
      raise RequestError(f"{name} is {getattr(r, name)}: it must be finite")
  _in_vocabulary("logit_bias token", [token for token, _ in r.logit_bias], vocab_size)
  for token, bias in r.logit_bias:
    if math.isnan(bias) or bias == math.inf:
      raise RequestError(f"logit_bias of token {token} is {bias}: it must be a number below inf")
  _in_vocabulary("stop_ids token", r.stop_ids, vocab_size)
  if len(stop_ids) + len(r.stop_ids) > sampler.MAX_STOP_IDS:
    raise RequestError(
      f"stop_ids has {len(r.stop_ids)} tokens: at most {sampler.MAX_STOP_IDS - len(stop_ids)}"
    )
  if not 0 <= r.top_logprobs <= sampling.TOP_LOGPROBS:
    raise RequestError(
      f"top_logprobs is {r.top_logprobs}: it must be in 0..{sampling.TOP_LOGPROBS}"
    )


def _in_vocabulary(what: str, tokens: Sequence[int], vocab_size: int) -> None:
  if len(tokens):
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab_size:
      bad = low if low < 0 else high
      raise RequestError(f"{what} {bad} is not in the vocabulary of {vocab_size}")


@dataclasses.dataclass(eq=False)
class Running:
  """An attempt in the engine.

  context: prompt and what was sampled, `known` tokens of it. limit: the most it may reach. pages:
  its own and shared ones, in order. computed: tokens whose keys and values the device has, or will
  have when it comes to it. bound: an upper bound of `known` once everything dispatched is done.
  epoch: of the index when it began to be computed.
  """

  ticket: int
  request: Request
  limit: int
  on_piece: Callable[[Piece], None] | None
  submitted: float = dataclasses.field(default_factory=time.monotonic)
  slot: int = -1
  decoding: bool = False
  computed: int = 0
  bound: int = 0
  epoch: int = 0
  pages: list[int] = dataclasses.field(default_factory=list)
  pieces: list[Piece] = dataclasses.field(default_factory=list)

  def __post_init__(self):
    prompt = np.asarray(self.request.prompt_tokens, np.int32)
    self.prompt_id = sampling.prompt_id(prompt)
    self.known = len(prompt)
    self._context = np.resize(prompt, max(self.limit, self.known))

  @property
  def context(self) -> np.ndarray:
    return self._context[: self.known]

  @property
  def to_compute(self) -> np.ndarray:
    """All but the last token, which the decode loop feeds."""
    return self._context[: self.known - 1]

  @property
  def remembers(self) -> bool:
    """Whether what it samples depends on counts of tokens or on a bias."""
    r = self.request
    return bool(
      r.repetition_penalty != 1 or r.presence_penalty or r.frequency_penalty or r.logit_bias
    )

  def add(self, piece: Piece) -> None:
    n = len(piece.tokens)
    self._context[self.known : self.known + n] = piece.tokens
    self.known += n
    self.pieces.append(piece)
    if self.on_piece is not None and n:
      self.on_piece(piece)

  def counts(self, vocab_size: int) -> np.ndarray:
    """sampling.History.counts_BV of it: int32 [V]."""
    n = len(self.request.prompt_tokens)
    counts_V = np.bincount(self.context[n:], minlength=vocab_size).astype(np.int32)
    counts_V = np.minimum(counts_V, sampling.PROMPT - 1)
    counts_V[np.unique(self.context[:n])] += sampling.PROMPT
    return counts_V

  def bias(self, vocab_size: int) -> np.ndarray:
    """sampling.History.bias_BV of it: float32 [V]."""
    bias_V = np.zeros(vocab_size, np.float32)
    for token, bias in self.request.logit_bias:
      bias_V[token] = bias
    return bias_V

  def completion(self, stop_ids: tuple) -> Completion:
    def joined(field):
      return np.concatenate([getattr(piece, field) for piece in self.pieces])

    tokens, prompt = joined("tokens"), np.asarray(self.request.prompt_tokens, np.int32)
    return Completion(
      text="",
      tokens=tokens,
      logprobs=joined("logprobs"),
      versions=joined("versions"),
      prompt_tokens=prompt,
      finish_reason="stop" if tokens[-1] in (*stop_ids, *self.request.stop_ids) else "length",
      usage=Usage(len(prompt), len(tokens), time.monotonic() - self.submitted, 1),
      top_tokens=joined("top_tokens"),
      top_logprobs=joined("top_logprobs"),
    )
