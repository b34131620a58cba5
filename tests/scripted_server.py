"""The server on a scripted engine: in this process, called as ASGI, or on a port of its own."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import uvicorn
from scripted_engine import ScriptedEngine

from configs import serve as serve_config
from qed_jax.serving import generation
from qed_jax.serving.app import create_app

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json", "host": "localhost"}


def make(tokenizer, *, key="", limits=None, name="tiny", **engine):
  """(app, service, engine) on a scripted engine."""
  config = serve_config.get_config("tiny")
  config.limits.update(max_tokens=400, prompt_tokens=400, grace_s=2.0)
  config.limits.update(limits or {})
  options = {"vocab_size": tokenizer.vocab_size, "stop_ids": tokenizer.stop_ids}
  scripted = ScriptedEngine(**(options | engine))
  service = generation.service(name, scripted, tokenizer, config)
  return create_app(service, key=key), service, scripted


def says(tokenizer, *texts):
  """A script: attempt i answers with texts[i]."""
  return lambda request: tokenizer.encode(texts[request.attempt % len(texts)])


@contextlib.contextmanager
def listening(app):
  """Runs the app on a free port of this machine -> its address, without a path."""
  listener = socket.socket()
  listener.bind(("127.0.0.1", 0))
  settings = uvicorn.Config(
    app, log_level="error", access_log=False, timeout_graceful_shutdown=2, timeout_keep_alive=60
  )
  server = uvicorn.Server(settings)
  thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
  thread.start()
  while not server.started:
    time.sleep(0.01)
  try:
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
  finally:
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@contextlib.asynccontextmanager
async def running(app):
  """The app's own start and end, for calls as ASGI."""
  async with app.router.lifespan_context(app):
    yield


async def ask(app, path, body=None, *, method=None, headers=None, parts=None, hang_up=None):
  """One request as ASGI -> (status, headers, body).

  body: bytes, or what is sent as JSON. parts: pieces of a body without a length. hang_up: an event
  at which the client goes.
  """
  data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
  pieces = parts if parts is not None else [data or b""]
  method = method or ("POST" if data is not None or parts is not None else "GET")
  given = JSON | ({} if parts is not None else {"content-length": str(len(data or b""))})
  given |= headers or {}
  scope = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "http_version": "1.1",
    "method": method,
    "path": path,
    "raw_path": path.encode("utf-8", "surrogatepass"),
    "query_string": b"",
    "root_path": "",
    "scheme": "http",
    "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items() if v is not None],
    "client": ("127.0.0.1", 1),
    "server": ("127.0.0.1", 2),
  }
  sent, queue, gone = [], list(pieces), hang_up or asyncio.Event()

  async def receive():
    if queue:
      return {"type": "http.request", "body": queue.pop(0), "more_body": bool(queue)}
    await gone.wait()
    return {"type": "http.disconnect"}

  async def send(message):
    sent.append(message)

  await app(scope, receive, send)
  start = next((m for m in sent if m["type"] == "http.response.start"), None)
  content = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
  found = {k.decode().lower(): v.decode() for k, v in (start or {"headers": []})["headers"]}
  return (start["status"] if start else None), found, content


async def settled(engine, seconds=10.0):
  """Waits until nothing is in the engine; what has leaked by then."""
  end = time.monotonic() + seconds
  while engine.leaked() and time.monotonic() < end:
    await asyncio.sleep(0.01)
  return engine.leaked()


def is_error(status, content) -> bool:
  """Whether an answer is an error of OpenAI's shape, with the type of its status."""
  error = json.loads(content)["error"]
  kind = {429: "rate_limit_error"}.get(status, "invalid_request_error")
  kind = "server_error" if status >= 500 else kind
  return (
    sorted(error) == ["code", "message", "param", "type"]
    and isinstance(error["message"], str)
    and 0 < len(error["message"]) <= 500
    and "\n" not in error["message"]
    and error["type"] == kind
    and isinstance(error["param"], str | None)
    and isinstance(error["code"], str | None)
  )
