"""An event loop whose clock jumps to its next timer, and an endpoint that lives in that loop.

Connections are real ones, over the loopback device; half an hour of an outage takes no time.
"""

import asyncio
import dataclasses
import json
import selectors


class Selector(selectors.DefaultSelector):
  """Where nothing happens it moves the loop's clock to the next timer instead of waiting for it."""

  now = 0.0

  def select(self, timeout=None):
    if found := super().select(0):
      return found
    if timeout is None:
      return super().select(1.0)
    if timeout > 0 and not (found := super().select(0.002)):  # what kernel or threads have in hand
      self.now += timeout
    return found


def run(main):
  """asyncio.run(main()) in virtual time, which `now()` tells."""
  selector = Selector()
  loop = asyncio.SelectorEventLoop(selector)
  loop.time = lambda: selector.now
  with asyncio.Runner(loop_factory=lambda: loop) as runner:
    return runner.run(main())


def now() -> float:
  return asyncio.get_running_loop().time()


@dataclasses.dataclass(frozen=True)
class Answer:
  """status and data (bytes, or what becomes JSON) after `seconds`; cut: only half of it comes."""

  status: int
  data: object = b""
  headers: dict = dataclasses.field(default_factory=dict)
  seconds: float = 0.0
  cut: bool = False


HANG = Answer(0)  # nothing comes


class Endpoint:
  """Answers each POST as `script(body)` says, once it listens."""

  def __init__(self, script):
    self.script, self.asked = script, []
    self._server, self._port, self._writers = None, 0, set()

  async def listen(self) -> None:
    self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, backlog=512)
    self._port = self._server.sockets[0].getsockname()[1]

  def refuse(self) -> None:
    """Nobody listens any more; who is connected is cut off."""
    self._server.close()
    for writer in self._writers:
      writer.transport.abort()

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self._port}/v1"

  async def _serve(self, reader, writer) -> None:
    self._writers.add(writer)
    try:
      going = True
      while going:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(head.split("content-length:")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.asked.append((now(), body))
        going = await self._answer(writer, self.script(body))
    except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
      pass  # the last: streams of Python 3.11 would log it
    finally:
      self._writers.discard(writer)
      writer.close()

  async def _answer(self, writer, answer: Answer) -> bool:
    if answer is HANG:
      await asyncio.Event().wait()
    await asyncio.sleep(answer.seconds)
    data = answer.data if isinstance(answer.data, bytes) else json.dumps(answer.data).encode()
    headers = {"Content-Type": "application/json", "Content-Length": len(data)} | answer.headers
    lines = [f"HTTP/1.1 {answer.status} X", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
    writer.write("\r\n".join(lines).encode() + data[: len(data) // 2 if answer.cut else None])
    await writer.drain()
    return not answer.cut
