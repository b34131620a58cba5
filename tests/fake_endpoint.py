"""An OpenAI-compatible HTTP server for tests, that misbehaves on demand, and a client for it."""

import asyncio
import contextlib
import http.server
import json
import os
import threading
import time
from unittest import mock

import pytest

from qed_jax.chat import ChatError, Endpoint, HttpChat

ASK = [{"role": "user", "content": "Prove it."}]
KEY = "sk-secret-0123456789"


class Server(http.server.ThreadingHTTPServer):
  """Answers the i-th request as `script(i, request)` says, and keeps what it was sent."""

  daemon_threads = True
  request_queue_size = 256

  def __init__(self, script):
    super().__init__(("127.0.0.1", 0), Handler)
    self.script, self.requests, self.lock = script, [], threading.Lock()
    self.open = self.most_open = 0
    self.ended = threading.Event()

  def handle_error(self, request, client_address):
    """Clients that go away are part of the tests."""

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def do_POST(self):
    server = self.server
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    request = {"path": self.path, "body": body}
    request["headers"] = {name.lower(): value for name, value in self.headers.items()}
    request["time"] = time.monotonic()
    with server.lock:
      number = len(server.requests)
      server.requests.append(request)
      server.open += 1
      server.most_open = max(server.most_open, server.open)
    try:
      self.answer(*server.script(number, request))
    finally:
      with server.lock:
        server.open -= 1

  def answer(self, status, data, headers=None, length=None):
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    self.send_response(status)
    headers = {"Content-Type": "application/json"} | (headers or {})
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(data) if length is None else length))
    self.end_headers()
    self.wfile.write(data)
    if length is not None:
      self.close_connection = True

  def log_message(self, *arguments):
    """Quiet."""


@contextlib.contextmanager
def serve(script):
  server = Server(script)
  threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
  try:
    with mock.patch.dict(os.environ, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1"):
      yield server
  finally:
    server.ended.set()
    server.shutdown()
    server.server_close()


def said(content, finish="stop", reasoning=None, usage=(7, 5)):
  message = {"role": "assistant", "content": content}
  if reasoning is not None:
    message["reasoning_content"] = reasoning
  body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
  body["choices"] = [{"index": 0, "message": message, "finish_reason": finish}]
  if usage:
    body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
  return 200, body


def responded(content, status="completed", reasoning=None, why=None):
  output = [{"type": "message", "content": [{"type": "output_text", "text": content}]}]
  if reasoning is not None:
    part = {"type": "reasoning_text", "text": reasoning}
    output.insert(0, {"type": "reasoning", "summary": [], "content": [part]})
  body = {"id": "1", "object": "response", "status": status, "model": "m", "output": output}
  body["incomplete_details"] = {"reason": why} if why else None
  body["usage"] = {"input_tokens": 7, "output_tokens": 5}
  return 200, body


def error(status, message="no", headers=None, code=None):
  return status, {"error": {"message": message, "code": code}}, headers or {}


class Time:
  """A clock that only sleeping moves; remembers the sleeps."""

  def __init__(self):
    self.now, self.sleeps = 0.0, []

  def clock(self) -> float:
    return self.now

  async def sleep(self, seconds: float) -> None:
    self.sleeps.append(seconds)
    self.now += seconds
    await asyncio.sleep(0)


def client(server, *, cache="", times=None, endpoint=None, **options):
  options = {"concurrency": 8, "timeout": 20, "deadline": 600, "attempts": 4} | options
  times = times or Time()
  url = server if isinstance(server, str) else server.url
  place = Endpoint(base_url=url, model="m", **(endpoint or {}))
  return HttpChat(place, cache=str(cache), sleep=times.sleep, clock=times.clock, **options)


def call(chat, **options):
  """One call from outside a loop, with the client closed after it."""

  async def run():
    try:
      return await chat(ASK, **({"max_tokens": 9, "temperature": 0.5} | options))
    finally:
      await chat.close()

  return asyncio.run(run())


def fails(chat, **options) -> str:
  """The message of the ChatError: one line, without the key."""
  with pytest.raises(ChatError) as caught:
    call(chat, **options)
  message = str(caught.value)
  assert "\n" not in message and KEY not in message and len(message) < 600
  assert caught.value.__cause__ is None and caught.value.__context__ is None
  return message
