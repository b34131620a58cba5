"""Faults of an endpoint: outlived when they pass, one clear error when they last, never a hang."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading

import pytest
from fake_endpoint import (
  ASK,
  KEY,
  Handler,
  Time,
  call,
  client,
  error,
  fails,
  responded,
  said,
  serve,
)

from qed_jax.chat import ChatError


def test_retry_after_is_obeyed_by_every_call():
  """While one call is told to wait, no other is sent either."""
  times = Time()

  def script(number, request):
    request["time"] = times.now
    return error(429, headers={"Retry-After": "17"}) if number == 0 else said("a")

  async def run(chat):
    first = asyncio.create_task(chat(ASK, max_tokens=9, temperature=1.0))
    while not times.sleeps:
      await asyncio.sleep(0.001)
    times.now = 0.0  # the first sleeper has moved the clock; for the second it is still early
    chat_two = asyncio.create_task(chat(ASK, max_tokens=9, temperature=0.0))
    [one], [two] = await first, await chat_two
    await chat.close()
    return one, two

  with serve(script) as server:
    one, two = asyncio.run(run(client(server, times=times)))
  assert one.text == two.text == "a" and one.usage.calls == 2
  assert [r["time"] >= 17 for r in server.requests] == [False, True, True]
  assert 17 in times.sleeps


def test_retry_after_as_a_date_and_past_the_deadline():
  times = Time()
  date = {"Retry-After": "Fri, 01 Jan 2999 00:00:00 GMT"}
  with serve(lambda i, r: error(503, headers=date)) as server:
    message = fails(client(server, times=times))
    assert "HTTP 503" in message and "deadline" in message
    assert len(server.requests) == 1 and not times.sleeps


@pytest.mark.parametrize("header", ["nonsense", "-5", "nan", "inf", "0", ""])
def test_useless_retry_after_falls_back_to_the_back_off(header):
  times = Time()
  script = lambda i, r: said("a") if i else error(429, headers={"Retry-After": header})  # noqa: E731
  with serve(script) as server:
    call(client(server, times=times))
  assert len(times.sleeps) == 1 and 0.5 <= times.sleeps[0] <= 1.0


def test_back_off_grows_and_gives_up_with_the_cause():
  times = Time()
  with serve(lambda i, r: error(500, "out of memory")) as server:
    message = fails(client(server, times=times, attempts=9))
    assert len(server.requests) == 9
  assert "HTTP 500: out of memory" in message and "m at 127.0.0.1" in message
  assert [round(2**k * 0.5, 1) <= s <= 2**k for k, s in enumerate(times.sleeps[:6])] == [True] * 6
  assert all(30 <= s <= 60 for s in times.sleeps[6:])


def cut(status=200):
  body = json.dumps(said("a")[1]).encode()
  return status, body[: len(body) // 2], {}, len(body)


FAULTS = {
  "500": error(500),
  "503": error(503),
  "408": error(408),
  "429": error(429),
  "html": (200, b"<html>gateway</html>", {"Content-Type": "text/html"}),
  "empty": (200, b""),
  "not utf-8": (200, b"\xff\xfe\x00{"),
  "cut": cut(),
  "half json": (200, b'{"choices": [{"mess'),
  "null": (200, None),
  "list": (200, []),
  "deep": (200, b"[" * 100_000),
  "error with 200": (200, {"error": {"message": "overloaded"}}),
  "no choices": (200, {"choices": []}),
  "no message": (200, {"choices": [{"finish_reason": "stop"}]}),
  "number for text": (200, {"choices": [{"message": {"content": 3}}]}),
  "tool call": said(None, "tool_calls"),
  "withheld": said("", "content_filter"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_fault_is_outlived_and_lasting_fault_is_one_error(fault):
  with serve(lambda i, r: FAULTS[fault] if i < 2 else said("a")) as server:
    [completion] = call(client(server))
  assert completion.text == "a" and completion.usage.calls == len(server.requests) == 3
  with serve(lambda i, r: FAULTS[fault]) as server:
    message = fails(client(server))
  assert "gave up after 4 requests" in message and len(server.requests) == 4


RESPONSES_FAULTS = [
  (200, {"output": 3, "status": "completed"}),
  (200, {"output": [], "status": "failed"}),
  (200, {"output": [], "status": "incomplete", "incomplete_details": {"reason": "content_filter"}}),
  (200, {"output": [], "status": "incomplete", "incomplete_details": None}),
  said("a"),
]


@pytest.mark.parametrize("fault", RESPONSES_FAULTS)
def test_responses_that_did_not_finish_are_faults(fault):
  with serve(lambda i, r: fault if i == 0 else responded("a")) as server:
    [completion] = call(client(server, endpoint={"api": "responses"}))
  assert completion.text == "a" and len(server.requests) == 2


@pytest.mark.parametrize(
  "status, hint", [(400, "no"), (401, "JUDGE_KEY"), (404, "model"), (422, "")]
)
def test_request_that_cannot_succeed_is_sent_once(status, hint, monkeypatch):
  monkeypatch.setenv("JUDGE_KEY", KEY)
  with serve(lambda i, r: error(status)) as server:
    message = fails(client(server, endpoint={"key_env": "JUDGE_KEY"}))
    assert len(server.requests) == 1
  assert f"HTTP {status}" in message and hint in message


def test_empty_purse_is_not_retried():
  """OpenAI answers 429 for this too, and no waiting helps."""
  with serve(lambda i, r: error(429, code="insufficient_quota")) as server:
    fails(client(server))
    assert len(server.requests) == 1


def test_refused_connection_is_retried_then_named():
  times = Time()
  with serve(lambda i, r: said("a")) as server, socket.socket() as free:
    free.bind(("127.0.0.1", 0))  # and nobody listens
    port = free.getsockname()[1]
    message = fails(client(f"http://127.0.0.1:{port}/v1", times=times))
    assert not server.requests
  assert "no connection" in message and len(times.sleeps) == 3


def test_hanging_server_costs_the_timeout_and_the_healthy_go_on():
  """Twenty calls hang; those beside them are answered; nothing is left behind."""

  def script(number, request):
    if request["body"]["temperature"] == 1.0:
      server.ended.wait(60)
    return said("a")

  async def run(chat):
    hung = [
      asyncio.create_task(chat(ASK, max_tokens=9, temperature=1.0, seed=i)) for i in range(20)
    ]
    await asyncio.sleep(0)
    healthy = await asyncio.gather(
      *(chat(ASK, max_tokens=9, temperature=0.0, seed=i) for i in range(5))
    )
    assert not any(task.done() for task in hung)
    results = await asyncio.gather(*hung, return_exceptions=True)
    await chat.close()
    await asyncio.sleep(0)
    return healthy, results, asyncio.all_tasks()

  with serve(script) as server:
    chat = client(server, timeout=5, attempts=1, concurrency=32)
    healthy, results, tasks = asyncio.run(run(chat))
  assert [c.text for [c] in healthy] == ["a"] * 5
  assert all(isinstance(r, ChatError) and "no answer in 5 s" in str(r) for r in results)
  assert len(tasks) == 1


STOPPED = """
import asyncio, sys
from qed_jax.chat import Endpoint, HttpChat
chat = HttpChat(Endpoint(sys.argv[1], "m"), concurrency=4, timeout=60, deadline=60, attempts=1)
asyncio.run(chat.check())
try:
  asyncio.run(chat.check())
except ValueError as error:
  sys.exit(str(error))
"""


def test_a_program_that_stops_says_nothing_but_its_line():
  """Of connections that are still open nothing is said."""
  with serve(lambda i, r: error(401) if i else said("x")) as server:
    command = [sys.executable, "-c", STOPPED, server.url]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1, ended.stderr
  assert "HTTP 401" in ended.stderr and ended.stdout == ""


def test_trickling_server_does_not_outlive_the_timeout():
  """A byte now and then keeps a socket timeout from ever firing."""

  def script(number, request):
    return 200, b"", {}, 10_000

  class Trickle(Handler):
    def answer(self, status, data, headers=None, length=None):
      super().answer(status, data, headers, length)
      with contextlib.suppress(OSError):
        while not self.server.ended.wait(0.05):
          self.wfile.write(b" ")
          self.wfile.flush()

  with serve(script) as server:
    server.RequestHandlerClass = Trickle
    assert "no answer in 0.5 s" in fails(client(server, timeout=0.5, attempts=1))


def test_deadline_bounds_the_whole_call():
  times = Time()
  with serve(lambda i, r: error(500)) as server:
    message = fails(client(server, times=times, deadline=10, attempts=100))
  assert "deadline of 10 s" in message and "HTTP 500" in message
  assert times.now < 10


def test_concurrency_is_bounded():
  barrier = threading.Barrier(3)

  def script(number, request):
    barrier.wait(20)  # three at a time do get there
    return said("a")

  with serve(script) as server:
    completions = call(client(server, concurrency=3), n=12, seed=0)
    assert len(completions) == 12 and server.most_open == 3


def test_token_budget_stops_the_sending():
  """It is passed by what is in flight at most, and the error says what to raise."""
  with serve(lambda i, r: said("a", usage=(60, 40))) as server:
    message = fails(client(server, concurrency=2, token_budget=250), n=20)
    assert 3 <= len(server.requests) <= 4
  assert "token_budget" in message


def test_lone_surrogate_is_named_and_not_sent():
  with serve(lambda i, r: said("a")) as server:

    async def run(chat):
      try:
        await chat([{"role": "user", "content": "\ud800"}], max_tokens=9, temperature=1.0)
      finally:
        await chat.close()

    with pytest.raises(ChatError, match="surrogate"):
      asyncio.run(run(client(server)))
    assert not server.requests
