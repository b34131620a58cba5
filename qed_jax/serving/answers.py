"""What clients read: chats and completions in OpenAI's shapes, whole and as chunks of a stream."""

import dataclasses
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

from qed_jax.serving.choice import Choice, Delta, Logprob
from qed_jax.serving.vocabulary import INCOMPLETE, Vocabulary

LEAST = -9999.0  # JSON has no -Infinity; OpenAI sends this for what cannot be sampled


@dataclasses.dataclass(frozen=True)
class Answers:
  """What both endpoints have in common. model: its name here.

  PREFIX, WHOLE, CHUNK: of the endpoint's ids, and what it calls an answer and a chunk of one.
  """

  PREFIX: ClassVar[str]
  WHOLE: ClassVar[str]
  CHUNK: ClassVar[str]

  model: str
  vocabulary: Vocabulary
  usage_in_chunks: bool
  id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))

  def usage(self, prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens read once a prompt, written by all choices."""
    completion_tokens = sum(choice.tokens for choice in choices)
    return {
      "prompt_tokens": prompt_tokens,
      "completion_tokens": completion_tokens,
      "total_tokens": prompt_tokens + completion_tokens,
      "completion_tokens_details": {
        "reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)
      },
    }

  def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
    """The chunk that stream_options.include_usage asks for."""
    return {**self._envelope(stream=True), "choices": [], "usage": usage}

  def _envelope(self, stream: bool) -> dict[str, Any]:
    kind, id_ = self.CHUNK if stream else self.WHOLE, f"{self.PREFIX}-{self.id}"
    return {"id": id_, "object": kind, "created": self.created, "model": self.model}

  def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
    usage = {"usage": None} if self.usage_in_chunks else {}
    return {**self._envelope(stream=True), "choices": [choice], **usage}


class ChatAnswers(Answers):
  """/v1/chat/completions. Reasoning goes to `reasoning_content`, as vLLM and others name it."""

  PREFIX, WHOLE, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"

  def whole(
    self, choices: Sequence[Choice], deltas: Sequence[Delta], usage: dict[str, Any]
  ) -> dict[str, Any]:
    """The answer at once. content is null when the thought never ended."""
    shown = []
    for index, (choice, delta) in enumerate(zip(choices, deltas, strict=True)):
      content = delta.text if choice.thought_ended else None
      message = {"role": "assistant", "content": content, "refusal": None}
      if choice.thinking:
        message["reasoning_content"] = delta.reasoning
      logprobs = self._logprobs(delta.logprobs) if choice.alternatives is not None else None
      shown.append({
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
      })  # fmt: skip
    return {**self._envelope(stream=False), "choices": shown, "usage": usage}

  def first(self, index: int) -> list[dict[str, Any]]:
    """What a choice opens with."""
    return [self._delta(index, {"role": "assistant", "content": ""})]

  def parts(self, index: int, delta: Delta) -> list[dict[str, Any]]:
    """Chunks of what is new, reasoning before text."""
    fields = [("reasoning_content", delta.reasoning), ("content", delta.text)]
    chunks = [self._delta(index, {name: text}) for name, text in fields if text]
    if delta.logprobs:
      chunks = chunks or [self._delta(index, {})]
      chunks[-1]["choices"][0]["logprobs"] = self._logprobs(delta.logprobs)
    return chunks

  def last(self, index: int, choice: Choice) -> dict[str, Any]:
    """The end of a choice."""
    return self._delta(index, {}, choice.finish_reason)

  def _delta(self, index: int, delta: dict[str, Any], reason: str | None = None):
    return self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": reason})

  def _logprobs(self, logprobs: Sequence[Logprob]) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
      data = self.vocabulary.bytes(token)
      return {
        "token": self.vocabulary.name(token),
        "logprob": finite(logprob),
        "bytes": list(data),
      }

    content = [
      {**one(x.token, x.logprob), "top_logprobs": [one(*pair) for pair in x.top]} for x in logprobs
    ]
    return {"content": content, "refusal": None}


class CompletionAnswers(Answers):
  """/v1/completions. The text is as the model wrote it, think tags and all."""

  PREFIX, WHOLE, CHUNK = "cmpl", "text_completion", "text_completion"

  def whole(
    self, choices: Sequence[Choice], deltas: Sequence[Delta], usage: dict[str, Any]
  ) -> dict[str, Any]:
    """The answer at once."""
    shown = []
    for index, (choice, delta) in enumerate(zip(choices, deltas, strict=True)):
      part = self._part(index, delta, choice.finish_reason)
      if choice.alternatives is not None:
        part["logprobs"] = self._logprobs(delta.logprobs)
      shown.append(part)
    return {**self._envelope(stream=False), "choices": shown, "usage": usage}

  def first(self, index: int) -> list[dict[str, Any]]:
    """Completions open with their text."""
    return []

  def parts(self, index: int, delta: Delta) -> list[dict[str, Any]]:
    """The chunk of what is new."""
    return [self._chunk(self._part(index, delta, None))] if delta else []

  def last(self, index: int, choice: Choice) -> dict[str, Any]:
    """The end of a choice."""
    return self._chunk(self._part(index, Delta(), choice.finish_reason))

  def _part(self, index: int, delta: Delta, reason: str | None) -> dict[str, Any]:
    logprobs = self._logprobs(delta.logprobs) if delta.logprobs else None
    return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": reason}

  def _logprobs(self, logprobs: Sequence[Logprob]) -> dict[str, Any]:
    def top(entry: Logprob) -> dict[str, float]:
      pairs = dict([*entry.top, (entry.token, entry.logprob)])
      return {self._key(token): finite(logprob) for token, logprob in pairs.items()}

    return {
      "tokens": [self._key(x.token) for x in logprobs],
      "token_logprobs": [finite(x.logprob) for x in logprobs],
      "top_logprobs": [top(x) for x in logprobs] if any(x.top for x in logprobs) else None,
      "text_offset": [x.start for x in logprobs],
    }

  def _key(self, token: int) -> str:
    """Parts of characters by their bytes, so that two of them are not one key."""
    name = self.vocabulary.name(token)
    if INCOMPLETE not in name:
      return name
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.vocabulary.bytes(token))


def finite(logprob: float) -> float:
  """A log-probability that JSON can hold."""
  return max(logprob, LEAST) if math.isfinite(logprob) else LEAST


def total(deltas: Sequence[Delta]) -> Delta:
  """The sum of what came."""
  return Delta(
    "".join(d.reasoning for d in deltas),
    "".join(d.text for d in deltas),
    tuple(x for d in deltas for x in d.logprobs),
  )
