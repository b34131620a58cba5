"""The chat client: what it sends and reads, what it keeps, and what it keeps to itself."""

import asyncio
import json
import subprocess
import sys
import threading

import pytest
from fake_endpoint import (
  ASK,
  KEY,
  call,
  client,
  error,
  fails,
  responded,
  said,
  serve,
)

# --- one call --------------------------------------------------------------------------------


def test_chat_completion_is_asked_and_read():
  with serve(lambda i, r: said("It holds.", reasoning="Hm.")) as server:
    [completion] = call(client(server), top_p=0.9, top_k=20, seed=3)
  assert completion.text == "Hm.</think>It holds."
  assert completion.finish_reason == "stop" and completion.tokens.size == 0
  assert (completion.usage.input_tokens, completion.usage.output_tokens) == (7, 5)
  assert completion.usage.calls == 1
  [request] = server.requests
  assert request["path"] == "/v1/chat/completions"
  assert request["body"] == {
    "model": "m",
    "messages": ASK,
    "max_tokens": 9,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 20,
    "seed": 3,
  }


def test_responses_api_is_asked_and_read():
  with serve(lambda i, r: responded("It holds.", reasoning="Hm.")) as server:
    [completion] = call(client(server, endpoint={"api": "responses"}), seed=3)
  assert completion.text == "Hm.</think>It holds."
  assert (completion.usage.input_tokens, completion.usage.output_tokens) == (7, 5)
  [request] = server.requests
  assert request["path"] == "/v1/responses"
  body = {"model": "m", "input": ASK, "max_output_tokens": 9, "temperature": 0.5, "top_p": 1.0}
  assert request["body"] == body


def test_endpoint_says_how_it_is_asked():
  endpoint = {
    "max_tokens_field": "max_completion_tokens",
    "omit": ("temperature", "seed"),
    "understands_thinking": True,
    "extra_body": {"reasoning_effort": "medium"},
  }
  with serve(lambda i, r: said("a")) as server:
    call(client(server, endpoint=endpoint), seed=3, thinking=False)
  assert server.requests[0]["body"] == {
    "model": "m",
    "messages": ASK,
    "max_completion_tokens": 9,
    "top_p": 1.0,
    "chat_template_kwargs": {"enable_thinking": False},
    "reasoning_effort": "medium",
  }


TEXTS = [
  (said("a", reasoning="r"), {}, True, "r</think>a", "stop"),
  (said("a", reasoning="r"), {}, False, "a", "stop"),
  (said(None, "length", reasoning="r"), {}, True, "r", "length"),
  (said("a", "length", reasoning="r"), {}, True, "r</think>a", "length"),
  (said("r</think>a"), {}, True, "r</think>a", "stop"),
  (said("<think>\nr</think>a"), {}, True, "\nr</think>a", "stop"),
  (said("a"), {}, True, "a", "stop"),
  (said("a"), {"hides_thinking": True}, True, "</think>a", "stop"),
  (said("", "length"), {"hides_thinking": True}, True, "", "length"),
  (said("a", finish=None), {}, True, "a", "stop"),
  (responded("a", "incomplete", why="max_output_tokens"), {"api": "responses"}, 1, "a", "length"),
]


@pytest.mark.parametrize("reply, endpoint, thinking, text, finish", TEXTS)
def test_reasoning_is_folded_back(reply, endpoint, thinking, text, finish):
  """The text is "reasoning</think>answer"; a thought that was cut has no delimiter."""
  with serve(lambda i, r: reply) as server:
    [completion] = call(client(server, endpoint=endpoint), thinking=bool(thinking))
  assert (completion.text, completion.finish_reason) == (text, finish)


def test_samples_are_separate_requests_with_their_own_seeds():
  with serve(lambda i, r: said(str(r["body"]["seed"]))) as server:
    completions = call(client(server), n=3, seed=11)
  assert len({c.text for c in completions}) == 3 and completions[0].text == "11"
  assert sorted(c.text for c in completions) == sorted(
    str(r["body"]["seed"]) for r in server.requests
  )


def test_missing_usage_is_estimated_so_that_a_budget_holds():
  with serve(lambda i, r: said("x" * 400, usage=None)) as server:
    [completion] = call(client(server))
  assert (completion.usage.input_tokens, completion.usage.output_tokens) == (2, 100)


def test_client_serves_one_event_loop_after_another():
  with serve(lambda i, r: said("a")) as server:
    chat = client(server)
    for _ in range(2):
      [completion] = asyncio.run(chat(ASK, max_tokens=9, temperature=1.0))
      assert completion.text == "a"


# --- the cache -------------------------------------------------------------------------------


def test_same_request_is_paid_once_even_at_once_and_after_a_restart(tmp_path):
  async def run(chat):
    asks = [chat(ASK, max_tokens=9, temperature=1.0, n=2, seed=5) for _ in range(4)]
    results = await asyncio.gather(*asks)
    await chat.close()
    return results

  with serve(lambda i, r: said(str(i), reasoning="r")) as server:
    texts = []
    for _ in range(2):
      chat = client(server, cache=tmp_path / "deep" / "cache.jsonl")
      results = asyncio.run(run(chat))
      texts += [[c.text for c in result] for result in results]
    assert len(server.requests) == 2
  assert all(text == texts[0] for text in texts) and len(set(texts[0])) == 2
  assert chat.stats["cache_hits"] == 8 and chat.stats["tokens"] == 0
  assert results[0][0].usage.calls == 0 and results[0][0].usage.output_tokens == 5


@pytest.mark.parametrize(
  "other",
  [
    {"seed": 6},
    {"temperature": 0.6},
    {"max_tokens": 10},
    {"top_p": 0.9},
    {"top_k": 5},
    {"thinking": False},
  ],
)
def test_another_request_is_another_key(tmp_path, other):
  with serve(lambda i, r: said(str(i))) as server:
    chat = client(server, cache=tmp_path / "c")
    call(chat, seed=5)
    call(client(server, cache=tmp_path / "c"), **({"seed": 5} | other))
    call(client(server, cache=tmp_path / "c", endpoint={"extra_body": {"a": 1}}), seed=5)
    assert len(server.requests) == 3


def test_failed_calls_are_not_cached_and_paid_samples_are_kept(tmp_path):
  """One of three samples fails: the call fails, and asking again pays for that one only."""
  broken = [True]

  def script(number, request):
    if broken[0] and request["body"]["seed"] == 5:
      return error(400)
    return said("a")

  with serve(script) as server:
    fails(client(server, cache=tmp_path / "c"), n=3, seed=5)
    assert len(server.requests) == 3
    broken[0] = False
    assert len(call(client(server, cache=tmp_path / "c"), n=3, seed=5)) == 3
    assert len(server.requests) == 4


KILLED = """
import asyncio, sys
from qed_jax.chat import Endpoint, HttpChat
async def main():
  place = Endpoint(sys.argv[1], "m")
  chat = HttpChat(
    place, concurrency=4, timeout=60, deadline=60, attempts=1, cache=sys.argv[2]
  )
  ask = [{"role": "user", "content": "Prove it."}]
  await chat(ask, max_tokens=9, temperature=0.5, n=12, seed=0)
asyncio.run(main())
"""


def test_kill_pays_again_only_what_was_in_flight(tmp_path):
  """kill -9 after eight replies, four calls in flight: the rerun asks for the other four."""
  reached = threading.Event()

  def script(number, request):
    if number >= 8 and not reached.wait(0):
      if server.open == 4 and number == 11:
        blocked.set()
      reached.wait(60)
    return said(str(request["body"]["seed"]))

  blocked = threading.Event()
  with serve(script) as server:
    arguments = [sys.executable, "-c", KILLED, server.url, str(tmp_path / "c")]
    process = subprocess.Popen(arguments)
    assert blocked.wait(60)
    process.kill()
    process.wait()
    reached.set()
    before = len(server.requests)
    [*completions] = call(client(server, cache=tmp_path / "c"), n=12, seed=0)
    assert len(server.requests) - before == 12 - 8
  assert len({c.text for c in completions}) == 12


# --- keys and configuration ------------------------------------------------------------------


def test_key_is_sent_and_shown_nowhere(tmp_path, monkeypatch):
  """Also when the server sends it back, in an error or in a reply."""
  monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
  endpoint = {"key_env": "JUDGE_KEY"}
  cache = tmp_path / "c"
  with serve(lambda i, r: said(f"your key is {KEY}", reasoning=KEY)) as server:
    chat = client(server, cache=cache, endpoint=endpoint)
    [completion] = call(chat)
    assert server.requests[0]["headers"]["authorization"] == f"Bearer {KEY}"
  assert completion.text == "[key]</think>your key is [key]"
  assert KEY.encode() not in cache.read_bytes() and KEY not in repr(chat)
  for script in [error(401, f"wrong: {KEY}"), error(500, "x" * 190 + KEY), (200, {"no": KEY})]:
    with serve(lambda i, r, script=script: script) as server:
      message = fails(client(server, endpoint=endpoint))
    assert KEY[:8] not in message


def test_keys_of_other_services_stay_at_home(monkeypatch):
  """The openai package would send these to any server that it is pointed at."""
  for name in ("API_KEY", "ORG_ID", "PROJECT_ID", "ADMIN_KEY"):
    monkeypatch.setenv(f"OPENAI_{name}", KEY)
  with serve(lambda i, r: said("a")) as server:
    call(client(server))
    assert KEY not in json.dumps(server.requests)


WRONG = [
  ({"endpoint": {"key_env": "NO_SUCH_KEY"}}, "NO_SUCH_KEY is not set"),
  ({"endpoint": {"key_env": KEY}}, "NAME of an environment variable"),
  ({"endpoint": {"key_env": "BINARY_KEY"}}, "BINARY_KEY holds no key"),
  ({"endpoint": {"api": "chats"}}, "'chat' or 'responses'"),
  ({"server": "localhost:8000/v1"}, "http"),
  ({"server": f"http://me:{KEY}@host/v1"}, "key_env"),
  ({"server": f"https://host/v1?key={KEY}"}, "key_env"),
  ({"concurrency": 0}, "concurrency=0"),
  ({"attempts": 0}, "attempts=0"),
  ({"timeout": float("nan")}, "timeout=nan"),
  ({"deadline": -1}, "deadline=-1"),
  ({"cache": "gs://bucket/c"}, "local disk"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_wrong_configuration_is_one_line(options, message, monkeypatch):
  monkeypatch.delenv("NO_SUCH_KEY", raising=False)
  monkeypatch.setenv("BINARY_KEY", f"{KEY}\u00e9")
  options = {"server": "http://127.0.0.1:1/v1"} | options
  with pytest.raises(ValueError, match=message) as caught:
    client(options.pop("server"), **options)
  assert "\n" not in str(caught.value) and KEY not in str(caught.value)
