"""What OpenAI-compatible endpoints answer: read strictly, and kept on disk to be paid once."""

import asyncio
import collections
import dataclasses
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

END_THINK = "</think>"
# How a kept line ends; what follows the counts is short.
_COUNTS = re.compile(
  rb'"input_tokens": (\d+), "output_tokens": (\d+)[^"]*(?:"seconds"[^"]*)?\}\}\s*$'
)


class Malformed(ValueError):
  """A body that is no finished reply of the API it should be of."""


@dataclasses.dataclass(frozen=True)
class Reply:
  """finish_reason is "stop" or "length". Token counts are the server's, where it sends any.

  seconds: how long it took, where whoever keeps it says so.
  """

  reasoning: str
  content: str
  finish_reason: str
  input_tokens: int
  output_tokens: int
  seconds: float = 0.0


def read(body: bytes, api: str, asked: int) -> Reply:
  """The reply in a body of POST /chat/completions (api="chat") or /responses ("responses").

  asked: characters of the request; a quarter of them is the count of input tokens, and a quarter of
  the reply's characters that of output tokens, where the server sends none, so that a budget holds
  there too. Raises Malformed for anything that is not one finished text: errors sent with status
  200, truncated JSON, HTML, tool calls, withheld content.
  """
  try:
    payload = json.loads(body)
  except (ValueError, RecursionError) as error:
    raise Malformed(f"it is not JSON: {body[:80].decode('utf-8', 'replace')!r}") from error
  reply = (_read_chat if api == "chat" else _read_responses)(payload)
  if not isinstance(reply.reasoning, str) or not isinstance(reply.content, str):
    raise Malformed("its content is not text")
  guesses = asked // 4, (len(reply.reasoning) + len(reply.content)) // 4
  counts = reply.input_tokens, reply.output_tokens
  input_tokens, output_tokens = (
    count if type(count) is int and count >= 0 else guess
    for count, guess in zip(counts, guesses, strict=True)
  )
  return dataclasses.replace(reply, input_tokens=input_tokens, output_tokens=output_tokens)


def error(body: bytes) -> tuple[str, str]:
  """(what it says, its code) of the body that comes with an error status; a page is cut short."""
  try:
    payload = json.loads(body)
  except (ValueError, RecursionError):
    return body[:200].decode("utf-8", "replace"), ""
  match payload:
    case {"error": {**fields}} | {**fields}:
      said = fields.get("message") or fields.get("detail") or fields.get("error") or ""
      return str(said)[:1000], str(fields.get("code") or "")
  return _excerpt(payload), ""


def _read_chat(payload: Any) -> Reply:
  match payload:
    case {"choices": [{"message": {**message}, **choice}, *_]}:
      reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
      content = message.get("content") or ""
    case _:
      raise Malformed(f"it has no choices: {_excerpt(payload)}")
  finish = choice.get("finish_reason") or "stop"  # some servers leave it null
  if finish not in ("stop", "length"):
    raise Malformed(f"the server ended it with finish_reason {finish!r}")
  usage = _usage(payload)
  return Reply(reasoning, content, finish, usage("prompt_tokens"), usage("completion_tokens"))


def _read_responses(payload: Any) -> Reply:
  match payload:
    case {"output": [*items], "status": "completed"}:
      finish = "stop"
    case {
      "output": [*items],
      "status": "incomplete",
      "incomplete_details": {"reason": "max_output_tokens"},
    }:
      finish = "length"
    case _:
      raise Malformed(f"it has no finished output: {_excerpt(payload)}")
  texts = collections.defaultdict(list)
  for item in items:
    for field in ("content", "summary"):
      parts = item.get(field) if isinstance(item, dict) else None
      for part in parts if isinstance(parts, list) else ():
        match part:
          case {"type": str(kind), "text": str(text)}:
            texts[kind].append(text)
  reasoning = "".join(texts["reasoning_text"] or texts["summary_text"])
  usage = _usage(payload)
  content = "".join(texts["output_text"])
  return Reply(reasoning, content, finish, usage("input_tokens"), usage("output_tokens"))


def _usage(payload: dict[str, Any]):
  usage = payload.get("usage")
  return usage.get if isinstance(usage, dict) else dict().get


def _excerpt(payload: Any) -> str:
  return json.dumps(payload, ensure_ascii=False)[:2000]


def fold(reply: Reply, hides_thinking: bool) -> str:
  """The reply as the text "reasoning</think>answer"; without "</think>" if it was cut in thought.

  hides_thinking: the content never holds reasoning, so that a reply without any is all answer.
  """
  if reply.reasoning:
    cut = reply.finish_reason == "length" and not reply.content
    return reply.reasoning if cut else f"{reply.reasoning}{END_THINK}{reply.content}"
  content = reply.content
  if content.lstrip().startswith("<think>"):  # our prompts end with it: completions do not hold it
    content = content.lstrip().removeprefix("<think>")
  if hides_thinking and content and END_THINK not in content:
    return END_THINK + content
  return content


class ReplyCache:
  """Replies by key in an append-only JSONL file, each on disk (fsync) before it is handed on.

  Memory holds one offset a reply. A line torn by a kill is passed over, and its request is made
  again. Threads may share it; processes may share the file, without seeing each other's new lines.
  `find` and `keep` are for coroutines: what several keep at once is one write and one fsync.
  `spent_before`: tokens read and written of the replies that the file held when it was opened.
  """

  def __init__(self, path: str):
    if "://" in path:
      raise ValueError(f"cache={path!r}: the reply cache must be on a local disk")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    self._lock = threading.Lock()
    self._spans: dict[str, tuple[int, int]] = {}
    self._waiting: list[tuple[str, Reply, asyncio.Future[None]]] = []
    self._writer: asyncio.Task[None] | None = None
    start, read, written = 0, 0, 0
    line = b"\n"
    with open(path, "rb") as lines:
      for line in lines:
        if match := re.match(rb'\{"key": "([0-9a-f]{64})"', line):
          self._spans[match[1].decode()] = (start, len(line))
          if counts := _COUNTS.search(line[-140:]):
            read, written = read + int(counts[1]), written + int(counts[2])
        start += len(line)
    self._torn = not line.endswith(b"\n")
    self.spent_before = (read, written)

  def get(self, key: str) -> Reply | None:
    with self._lock:
      span = self._spans.get(key)
    if span is None:
      return None
    try:
      record = json.loads(os.pread(self._file, span[1], span[0]))
      return Reply(**record["reply"])
    except (ValueError, KeyError, TypeError):  # torn, or not written by us
      return None

  async def find(self, key: str) -> Reply | None:
    """`get`, with the disk read in a thread."""
    return await asyncio.to_thread(self.get, key) if key in self._spans else None

  async def keep(self, key: str, reply: Reply) -> None:
    """`add`, in a thread, together with what others keep meanwhile."""
    written = asyncio.get_running_loop().create_future()
    self._waiting.append((key, reply, written))
    if self._writer is None or self._writer.done():
      self._writer = asyncio.create_task(self._write_waiting())
    await written

  async def _write_waiting(self) -> None:
    while self._waiting:
      batch, self._waiting = self._waiting, []
      try:
        await asyncio.to_thread(self._append, [item[:2] for item in batch])
        fault = None
      except OSError as error:
        fault = error
      for _, _, written in batch:
        if not written.done():
          written.set_result(None) if fault is None else written.set_exception(fault)

  def add(self, key: str, reply: Reply) -> None:
    """Raises OSError when the disk refuses: to go on would be to pay for what is then lost."""
    self._append([(key, reply)])

  def _append(self, items: Sequence[tuple[str, Reply]]) -> None:
    lines = []
    for key, reply in items:
      record: Mapping[str, Any] = {"key": key, "reply": vars(reply)}
      lines.append(json.dumps(record).encode() + b"\n")
    data = b"".join(lines)
    with self._lock:
      data = b"\n" + data if self._torn else data
      self._torn = True
      if os.write(self._file, data) < len(data):
        raise OSError("the reply cache took only part of a line: is the disk full?")
      self._torn = False
      end = os.lseek(self._file, 0, os.SEEK_CUR)  # of this write, whoever else appends
      for (key, _), line in zip(reversed(items), reversed(lines), strict=True):
        end -= len(line)
        self._spans[key] = (end, len(line))
    os.fsync(self._file)

  def close(self) -> None:
    os.close(self._file)
