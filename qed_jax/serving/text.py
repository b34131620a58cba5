"""Tokens to text as they come: whole characters, stop strings, and where the reasoning ends.

Each part takes what is new and gives what is certain; what may still change, or be the start of a
marker, is held back. However a stream is cut into pieces, the sum of what comes out is the same.
"""

from collections.abc import Sequence

from qed_jax.serving.vocabulary import INCOMPLETE, Vocabulary

END_THINK = "</think>"
WINDOW = 16  # tokens without a clean end before the window is cut
KEPT = 4  # tokens with a text, so at least four bytes: the longest unfinished character has three


class Detokenizer:
  """Token ids to text, equal in sum to the tokenizer's decode of all of them.

  A character of several bytes may be spread over tokens; decode shows the unfinished one as a
  single U+FFFD at the very end, and nothing before it can change any more.
  """

  def __init__(self, vocabulary: Vocabulary):
    self._vocabulary = vocabulary
    self.unfinished = 0  # characters held back: 0 or 1
    self._window: list[int] = []  # the last tokens that have a text
    self._given = 0  # characters of the window's text that were given out

  def push(self, token: int) -> str:
    """What the token adds to the text."""
    alone = self._vocabulary.text(token)
    if not alone:
      return ""
    self._window.append(token)
    text = self._vocabulary.decode(self._window)
    self.unfinished = int(text.endswith(INCOMPLETE))
    end = len(text) - self.unfinished
    new = text[self._given : end]
    if not self.unfinished:
      self._window, self._given = [token], len(alone)
    else:
      self._given = end
      if len(self._window) > WINDOW:
        self._window = self._window[-KEPT:]
        self._given = len(self._vocabulary.decode(self._window)) - self.unfinished
    return new

  def end(self) -> str:
    """The character that was never finished, as decode shows it."""
    rest = self._vocabulary.decode(self._window)[self._given :]
    self._given += len(rest)
    self.unfinished = 0
    return rest


def held(text: str, markers: Sequence[str]) -> int:
  """Length of the longest end of `text` that may be the start of a marker."""
  longest = max(map(len, markers), default=1) - 1
  for start in range(max(0, len(text) - longest), len(text)):
    if any(marker.startswith(text[start:]) for marker in markers):
      return len(text) - start
  return 0


class StopStrings:
  """Ends a text before the stop string that is complete first; of two at once, the longer."""

  def __init__(self, stops: Sequence[str]):
    self._stops, self._held = tuple(stops), ""
    self.found = False

  def push(self, text: str) -> str:
    """What can no longer be part of a stop string; after `found` nothing more."""
    if self.found or not self._stops:
      return "" if self.found else text
    text = self._held + text
    starts = [(text.find(stop), len(stop)) for stop in self._stops]
    ends = [(start + length, start) for start, length in starts if start >= 0]
    if ends:
      self.found, self._held = True, ""
      return text[: min(ends)[1]]
    kept = held(text, self._stops)
    self._held = text[len(text) - kept :]
    return text[: len(text) - kept]

  def end(self) -> str:
    """What was held back in vain."""
    rest, self._held = self._held, ""
    return rest


class Reasoning:
  """Splits a text at its first </think>: (reasoning, answer), the delimiter in neither.

  inside: whether the text begins in a think block, which the prompt opened.
  """

  def __init__(self, inside: bool):
    self.inside, self._held = inside, ""

  @property
  def waiting(self) -> int:
    """Characters held back."""
    return len(self._held)

  def push(self, text: str) -> tuple[str, str]:
    """What is certain of the two parts."""
    if not self.inside:
      return "", text
    text = self._held + text
    reasoning, found, answer = text.partition(END_THINK)
    if found:
      self.inside, self._held = False, ""
      return reasoning, answer
    kept = held(text, (END_THINK,))
    self._held = text[len(text) - kept :]
    return text[: len(text) - kept], ""

  def end(self) -> str:
    """What was held back in vain: reasoning, since the text ended inside."""
    rest, self._held = self._held, ""
    return rest
