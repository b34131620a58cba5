"""A chat whose replies are streamed, so that a trace of an hour is no request of an hour's silence.

Proxies and clients drop connections that say nothing; a stream says something with every token, and
a server that hangs is seen after `idle_s` seconds without any. What had arrived when a stream broke
goes to a file of its own, to be read: it is no finished reply, and its prompt is asked again.
"""

import asyncio
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import openai

from qed_jax import replies
from qed_jax.chat import Endpoint, HttpChat

EVENT, DONE = "data:", "[DONE]"


class StreamingChat(HttpChat):
  """HttpChat over POST /chat/completions with "stream"; where that is refused, without it."""

  def __init__(self, endpoint: Endpoint, *, idle_s: float, broken: pathlib.Path, **options: Any):
    """idle_s: seconds without a token. broken: JSONL file for what had arrived of broken streams.
    options: of HttpChat; its timeout is that of a whole reply."""
    if endpoint.api != "chat":
      raise ValueError(f"api={endpoint.api!r} cannot be streamed: use 'chat', or stream=False")
    super().__init__(endpoint, **options)
    self._idle, self._broken, self._streams = idle_s, broken, True

  async def _post(self, body: dict[str, Any]) -> replies.Reply:
    if not self._streams:
      return await super()._post(body)
    self.stats["requests"] += 1
    rest = {name: value for name, value in body.items() if name != "messages"}
    rest |= {"stream": True, "stream_options": {"include_usage": True}}
    create = self._client.chat.completions.with_streaming_response.create
    text = _Text()
    try:
      async with create(
        model=body["model"], messages=body["messages"], extra_body=rest
      ) as response:
        if "text/event-stream" in response.headers.get("content-type", ""):
          await self._read(response, text)
          whole = text.body()
        else:  # the server does not stream: this is the reply as always
          whole = await response.read()
    except openai.BadRequestError as error:
      if "stream" not in str(error).lower():
        raise
      self._streams = False
      return await super()._post(body)
    except (replies.Malformed, asyncio.CancelledError) as error:
      self._keep(body, text, error)
      raise
    asked = sum(len(turn["content"]) for turn in body["messages"])
    reply = replies.read(whole, "chat", asked)
    return replies.Reply(
      self._blot(reply.reasoning), self._blot(reply.content), reply.finish_reason,
      reply.input_tokens, reply.output_tokens,
    )  # fmt: skip

  async def _read(self, response: Any, text: "_Text") -> None:
    lines = response.iter_lines()
    while True:
      try:
        async with asyncio.timeout(self._idle):
          line = await anext(lines, None)
      except Exception as error:  # the transport's own kinds, which differ between its versions
        raise replies.Malformed(f"the stream {text.told()}: {type(error).__name__}") from error
      if line is None:
        break
      if line.startswith(EVENT) and (data := line[len(EVENT) :].strip()) != DONE:
        text.add(data)
    if text.finish is None:
      raise replies.Malformed(f"the stream {text.told()} without an end")

  def _keep(self, body: Mapping[str, Any], text: "_Text", error: BaseException) -> None:
    if not (text.reasoning or text.content):
      return
    row = {"messages": body["messages"], "reasoning": "".join(text.reasoning)}
    row |= {"content": "".join(text.content), "error": f"{type(error).__name__}: {error}"}
    with self._broken.open("a") as file:
      file.write(self._blot(json.dumps(row)) + "\n")


class _Text:
  """The pieces of a streamed reply."""

  def __init__(self):
    self.reasoning: list[str] = []
    self.content: list[str] = []
    self.finish: str | None = None
    self.usage: Any = None

  def add(self, data: str) -> None:
    """One event's JSON. Raises Malformed."""
    try:
      event = json.loads(data)
    except (ValueError, RecursionError) as error:
      raise replies.Malformed(f"an event is not JSON: {data[:80]!r}") from error
    match event:
      case {"choices": []} | {"choices": None}:
        pass
      case {"choices": [{**choice}, *_]}:
        delta = choice.get("delta") or {}
        self._append(self.reasoning, delta.get("reasoning_content") or delta.get("reasoning"))
        self._append(self.content, delta.get("content"))
        self.finish = choice.get("finish_reason") or self.finish
      case _:
        raise replies.Malformed(f"an event has no choices: {data[:200]!r}")
    self.usage = event.get("usage") or self.usage

  def _append(self, pieces: list[str], piece: Any) -> None:
    if isinstance(piece, str):
      pieces.append(piece)

  def told(self) -> str:
    return f"broke off after {sum(map(len, self.reasoning + self.content))} characters"

  def body(self) -> bytes:
    """The reply as a server sends it that does not stream."""
    message = {"content": "".join(self.content), "reasoning_content": "".join(self.reasoning)}
    choice = {"message": message, "finish_reason": self.finish}
    return json.dumps({"choices": [choice], "usage": self.usage}).encode()
