"""A chat that asks nothing twice: what was paid is on disk and answered from there ever after.

`HttpChat` has such a cache of its own; this one is for chats that have none, the in-process engine
first of all. A run that was stopped is started again and gets its old answers.
"""

import asyncio
import hashlib
import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from qed_jax.records import Completion, Usage
from qed_jax.replies import Reply, ReplyCache


class Journal:
  """Wraps `chat`. Two who ask the same at once pay once; failures are not kept.

  path: of a local JSONL file that is appended to, each answer with an fsync before it is handed
  on; a line torn by a kill is passed over. model: says whose answers these are, because one file
  may hold those of several models. paid: how many calls went to `chat`.

  A completion holds text, finish_reason and usage, and no arrays, whether it was paid or found:
  nothing may depend on which. One that was found has usage.calls = 0, its tokens and its seconds.
  """

  def __init__(self, chat: Any, path: str, model: str):
    self.paid = 0
    self._chat, self._model = chat, model
    self._cache = ReplyCache(path)
    self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

  async def __call__(
    self, messages: Sequence[Mapping[str, str]], *, seed: int, n: int = 1, **how: Any
  ) -> list[Completion]:
    """n completions under a seed; if one of them is missing in the file all n are asked for."""
    keys = [self._key(messages, seed, sample, how) for sample in range(n)]
    lock = self._locks.setdefault(keys[0], asyncio.Lock())
    async with lock:
      found = [await self._cache.find(key) for key in keys]
      if all(reply is not None for reply in found):
        return [_completion(reply, 0) for reply in found]
      self.paid += 1
      completions = await self._chat(messages, seed=seed, n=n, **how)
      replies = [_reply(completion) for completion in completions]
      kept = (self._cache.keep(*pair) for pair in zip(keys, replies, strict=True))
      await asyncio.shield(asyncio.gather(*kept))  # it has been paid, whoever has given up waiting
    pairs = zip(replies, completions, strict=True)
    return [_completion(reply, completion.usage.calls) for reply, completion in pairs]

  async def close(self) -> None:
    """Closes the file."""
    self._cache.close()

  def _key(self, messages, seed: int, sample: int, how: Mapping[str, Any]) -> str:
    asked = [self._model, [dict(message) for message in messages], seed, sample, how]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _reply(completion: Completion) -> Reply:
  usage = completion.usage
  counts = usage.input_tokens, usage.output_tokens, usage.seconds
  return Reply("", completion.text, completion.finish_reason, *counts)


def _completion(reply: Reply, calls: int) -> Completion:
  usage = Usage(reply.input_tokens, reply.output_tokens, reply.seconds, calls)
  return Completion(text=reply.content, finish_reason=reply.finish_reason, usage=usage)
