"""One attempt as a client sees it: pieces of tokens in, deltas of text out."""

import collections
import dataclasses
from collections.abc import Collection, Sequence

from qed_jax.rollout.requests import Piece
from qed_jax.serving.text import Detokenizer, Reasoning, StopStrings
from qed_jax.serving.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Logprob:
  """A sampled token: where its text starts in the completion, and the likeliest in its place."""

  token: int
  logprob: float
  start: int
  top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Delta:
  """What is new: of the reasoning, of the text, of the log-probabilities."""

  reasoning: str = ""
  text: str = ""
  logprobs: tuple[Logprob, ...] = ()

  def __bool__(self) -> bool:
    return bool(self.reasoning or self.text or self.logprobs)


class Choice:
  """The text of one attempt as it grows.

  stop_ids: tokens that end it and have no text. thinking: whether the prompt opened a think block.
  alternatives: how many to name beside each token; None for no log-probabilities. They belong to
  the tokens of the text, the stop token and what follows the start of a stop string left out, and
  come out together with their text.
  finish_reason: None until it has ended; `tokens` counts the sampled ones up to the end, the stop
  token too, and reasoning_tokens those up to </think>.
  """

  def __init__(
    self,
    vocabulary: Vocabulary,
    *,
    stop_ids: Collection[int],
    stops: Sequence[str],
    thinking: bool,
    alternatives: int | None,
  ):
    self.finish_reason: str | None = None
    self.tokens = self.reasoning_tokens = 0
    self.thinking, self.thought_ended, self.alternatives = thinking, not thinking, alternatives
    self._stop_ids = frozenset(stop_ids)
    self._detokenizer = Detokenizer(vocabulary)
    self._stops, self._reasoning = StopStrings(stops), Reasoning(thinking)
    self._seen = self._released = 0  # characters decoded, and those past the stop strings
    self._waiting: collections.deque[tuple[int, Logprob]] = collections.deque()  # (end, ...)

  def take(self, piece: Piece) -> Delta:
    """What a piece adds. What comes after the end is ignored."""
    parts = []
    for i, token in enumerate(piece.tokens.tolist()):
      if self.finish_reason:
        break
      self.tokens += 1
      self.reasoning_tokens += self._reasoning.inside
      if token in self._stop_ids:
        parts += self._close("stop")
        break
      start = self._seen
      parts.append(self._pass(self._detokenizer.push(token)))
      if self.alternatives is not None:
        end = self._seen + self._detokenizer.unfinished
        self._waiting.append((end, self._logprob(piece, i, token, start)))
      if self._stops.found:
        self.finish_reason = "stop"
        parts.append((self._reasoning.end(), ""))
    return self._delta(parts)

  def end(self, reason: str) -> Delta:
    """What was held back, once the engine says that there is no more."""
    return self._delta([] if self.finish_reason else self._close(reason))

  def _close(self, reason: str) -> list[tuple[str, str]]:
    parts = [self._pass(self._detokenizer.end())]
    if not self._stops.found:
      parts.append(self._split(self._stops.end()))
    parts.append((self._reasoning.end(), ""))
    self.finish_reason = "stop" if self._stops.found else reason
    return parts

  def _pass(self, text: str) -> tuple[str, str]:
    self._seen += len(text)
    return self._split(self._stops.push(text))

  def _split(self, text: str) -> tuple[str, str]:
    self._released += len(text)
    parts = self._reasoning.push(text)
    self.thought_ended = not self._reasoning.inside
    return parts

  def _logprob(self, piece: Piece, i: int, token: int, start: int) -> Logprob:
    k = self.alternatives
    top = zip(piece.top_tokens[i][:k].tolist(), piece.top_logprobs[i][:k].tolist(), strict=True)
    return Logprob(token, float(piece.logprobs[i]), start, tuple(top))

  def _delta(self, parts: Sequence[tuple[str, str]]) -> Delta:
    ready = []
    shown = self._released - self._reasoning.waiting
    while self._waiting and (self.finish_reason or self._waiting[0][0] <= shown):
      end, logprob = self._waiting.popleft()
      if not self._stops.found or end <= shown or logprob.start < shown:
        ready.append(logprob)
    reasoning, text = ("".join(part) for part in zip(*parts, strict=True)) if parts else ("", "")
    return Delta(reasoning, text, tuple(ready))
