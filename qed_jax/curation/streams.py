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

import aiohttp

from qed_jax import replies
from qed_jax.chat import Endpoint, HttpChat

EVENT, DONE = b"data:", b"[DONE]"


class StreamingChat(HttpChat):
  """HttpChat over POST /chat/completions with "stream"; where that is refused, without it."""

  def __init__(self, endpoint: Endpoint, *, idle_s: float, broken: pathlib.Path, **options: Any):
    """idle_s: seconds without a token. broken: JSONL file for what had arrived of broken streams.
    options: of HttpChat; its timeout is that of a whole reply."""
    if endpoint.api != "chat":
      raise ValueError(f"api={endpoint.api!r} cannot be streamed: use 'chat', or stream=False")
    super().__init__(endpoint, **options)
    self._idle, self._broken, self._streams = idle_s, broken, True

  async def _exchange(self, body: dict[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
    if not self._streams:
      return await super()._exchange(body)
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps(asked, ensure_ascii=False).encode()
    text = _Text()
    try:
      async with self._session.post(self._url, data=data, allow_redirects=False) as response:
        streamed = "text/event-stream" in response.headers.get("content-type", "")
        if response.status == 200 and streamed:
          await self._read(response.content, text)
          return response.status, response.headers, text.body()
        content = await response.read()  # a refusal, or a server that does not stream
    except (replies.Malformed, asyncio.CancelledError) as error:
      self._keep(body, text, error)
      raise
    if response.status == 400 and b"stream" in content.lower():
      self._streams = False
      self.stats["requests"] += 1
      return await super()._exchange(body)
    return response.status, response.headers, content

  async def _read(self, pieces: aiohttp.StreamReader, text: "_Text") -> None:
    rest, ended = b"", False
    while not ended:
      try:
        async with asyncio.timeout(self._idle):
          piece = await pieces.readany()
      except (aiohttp.ClientError, TimeoutError) as error:
        raise replies.Malformed(f"the stream {text.told()}: {type(error).__name__}") from error
      ended = not piece
      *lines, rest = (rest + piece + b"\n" * ended).split(b"\n")
      for line in lines:
        if line.startswith(EVENT) and (data := line[len(EVENT) :].strip()) != DONE:
          text.add(data.decode(errors="replace"))
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
