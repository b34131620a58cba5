"""10,000 requests made to break the server: no 5xx, errors in OpenAI's shape, nothing leaks."""

import asyncio
import json
import math
import random

import pytest
import scripted_server
from scripted_server import CHAT, COMPLETIONS, ask, is_error, settled
from test_tokenizer import write_bpe_folder

from qed_jax.data import tokenizer as tokenizer_lib

FIRST, COUNT, AT_ONCE = 0, 10_000, 40
FIELDS = {
  "model": ["tiny", None], "max_tokens": [1, 5], "temperature": [0, 0.5, 1e-30, 2],
  "top_p": [1, 1e-300], "top_k": [-1, 0, 20], "min_p": [0, 1], "repetition_penalty": [1, 1.2],
  "presence_penalty": [-2, 2], "frequency_penalty": [0.5],
  "logit_bias": [{}, {"5": -100}, {"0005": 1}], "seed": [0, -(2**63), 2**63 - 1], "n": [1, 3],
  "stop": ["a", ["a", "\n\n"], []], "stop_token_ids": [[], [5]], "stream": [True, False],
  "stream_options": [{"include_usage": True}, {}, None], "logprobs": [True, 3, 0, None],
  "top_logprobs": [0, 3], "chat_template_kwargs": [{"enable_thinking": False}, {}],
  "max_completion_tokens": [3], "tools": [[], None], "functions": [None],
  "response_format": [{"type": "text"}], "echo": [False], "suffix": [None, ""], "best_of": [1],
  "user": ["me"], "metadata": [{"a": "b"}],
}  # fmt: skip
MESSAGES = [
  [{"role": "user", "content": "a"}],
  [{"role": "system", "content": ""}, {"role": "user", "content": "\u20ac<|im_end|>\x00</think>"}],
  [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
  [{"role": "assistant", "content": "a</think>b"}],
]  # fmt: skip
PROMPTS = [
  "a", "\U0001f600\ufffd\ue000", ["a", "b"], [1, 2, 3], [[1], [2, 3]],
]  # fmt: skip
SCALARS = [
  None, True, False, 0, 1, -1, 2**31, 2**63, -(2**64), 10**300, 0.0, -0.0, 0.5, -1.5, 1e308, 1e-320,
  math.nan, math.inf, -math.inf, "", "a", "1", "0.5", "true", "\x00", "\ud800", "\udfff\ud800",
  "\U0001f600" * 50, "a" * 5_000, "\u202e\u0000", "<|im_start|>system\n", "{}", [], {}, [[]],
  [None], {"": {}}, [0] * 300, ["a"] * 300, {"type": "text"}, {"a": [1, {"b": None}]},
]  # fmt: skip
NOT_JSON = [
  b"", b" ", b"null", b"[]", b"1", b'"a"', b"{", b"}", b"{}}", b'{"a":1,}', b"{'a':1}",
  b"\xff\xfe{}", b"\xef\xbb\xbf{}", b'{"messages":"\xff"}', b'{"prompt":"\xed\xa0\x80"}',
  b'{"prompt":"\\ud800"}', b'{"prompt":"\\u00zz"}', b"[" * 100_000,
  b'{"a":' * 5_000 + b"1" + b"}" * 5_000, b'{"messages":' + b"[" * 150 + b"]" * 150 + b"}",
  b'{"seed":' + b"9" * 5_000 + b"}", b'{"prompt":"a","seed":' + b"9" * 400 + b"}",
  b'{"prompt":"a","temperature":1e99999}', b"\x00" * 100, b'{"prompt":"a"',
  b'{"prompt":"a"}{"prompt":"b"}', b'{"n":1,"n":2,"prompt":"a"}', "{\u00a0}".encode(),
  b'{"prompt":"a","logit_bias":{"\xc2\xb2":1}}', b'{"prompt":"a","\\ud800":1}',
]  # fmt: skip
PATHS = [
  "/", "/v1", "/v1/", "/v1/models/", "/v1/models/x/../y", "/v1/chat/completions/", "/health/x",
  "/assets/", "/assets/page.js", "/assets/../app.py", "/assets/..%2fapp.py",
  "/assets/temml.LICENSE", "/docs", "/\x00", "/v1/models/\udcff", "/\U0001f600", "//", "/metrics/",
  "/openapi.json", "/v1/responses", CHAT, COMPLETIONS,
]  # fmt: skip
HEADERS = [
  {"content-type": "text/plain"}, {"content-type": ""},
  {"content-type": "application/json; charset=utf-16"}, {"content-type": "\xff"},
  {"content-length": "-1"}, {"content-length": "x"}, {"content-length": "1e3"},
  {"content-length": "9" * 30}, {"authorization": "Basic \xff"}, {"host": "evil.example"},
  {"host": ""}, {"accept": "text/html"}, {"content-encoding": "gzip"}, {"expect": "100-continue"},
]  # fmt: skip


def value(draw, depth=0):
  """Any JSON value."""
  if depth < 3 and draw.random() < 0.2:
    return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
  if depth < 3 and draw.random() < 0.2:
    return {str(value(draw, 3))[:20]: value(draw, depth + 1) for _ in range(draw.randrange(4))}
  if draw.random() < 0.2:
    return "".join(chr(draw.randrange(0x110000)) for _ in range(draw.randrange(20)))
  return draw.choice(SCALARS)


def body(draw, path):
  """A good body with up to three fields spoilt, or something that is none; as bytes."""
  if draw.random() < 0.08:
    return draw.choice(NOT_JSON)
  names = draw.sample(sorted(FIELDS), draw.randrange(5))
  found = {name: draw.choice(FIELDS[name]) for name in names}
  found["messages" if path == CHAT else "prompt"] = draw.choice(
    MESSAGES if path == CHAT else PROMPTS
  )
  found.setdefault("max_tokens", draw.choice([1, 4]))
  for _ in range(draw.choice([0, 0, 1, 1, 2, 3])):
    place = draw.random()
    if place < 0.15 and path == CHAT:
      message = {"role": value(draw), "content": value(draw)}
      found["messages"] = [*draw.choice(MESSAGES), message]
    elif place < 0.25:
      found[str(value(draw, 3))[:30]] = value(draw)
    elif place < 0.3:
      found.pop(draw.choice(sorted(found)), None)
    else:
      found[draw.choice([*FIELDS, "messages", "prompt"])] = value(draw)
  data = json.dumps(found, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
  if draw.random() < 0.05 and data:  # a few bytes of it changed, or its end gone
    i = draw.randrange(len(data))
    data = data[:i] + draw.choice([b"", draw.randbytes(3) + data[i + 1 :]])
  return data


def check(path, status, headers, content):
  """Raises AssertionError for what a client could not make sense of."""
  assert status is not None and status < 500, content
  if status >= 400:
    assert is_error(status, content), (status, content)
  elif headers["content-type"].startswith("text/event-stream"):
    *events, done, end = content.decode().split("\n\n")
    assert done == "data: [DONE]" and end == ""
    for event in events:
      assert json.loads(event.removeprefix("data: "))["object"]
  elif path in (CHAT, COMPLETIONS):
    assert json.loads(content)["choices"]
  else:
    assert status == 200 and content


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return tokenizer_lib.load(write_bpe_folder(tmp_path_factory.mktemp("bpe")))


def test_10000_requests_break_nothing(tokenizer):
  """Types, sizes, encodings, unknown fields, paths, methods and headers; a fifth is good."""
  app, service, engine = scripted_server.make(
    tokenizer, slots=64, limits={"waiting": 2_000}, step_s=1e-4
  )
  statuses = {}

  async def one(seed):
    draw = random.Random(seed)
    path, method, headers = draw.choice([CHAT, COMPLETIONS]), "POST", {}
    data = body(draw, path)
    kind = draw.random()
    if kind < 0.03:
      path = draw.choice(PATHS)
    elif kind < 0.05:
      method = draw.choice(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "BREW", ""])
    elif kind < 0.08:
      headers = draw.choice(HEADERS)
    elif kind < 0.09:
      data = b'{"prompt":"' + b"a" * draw.choice([1_000, 50_000, 2_100_000]) + b'"}'
    parts = [data[i : i + 700] for i in range(0, len(data), 700)] if draw.random() < 0.05 else []
    try:
      status, found, content = await ask(
        app, path, data, method=method, headers=headers, parts=parts or None
      )
      if method != "HEAD":
        check(path, status, found, content)
    except Exception as error:
      raise AssertionError(f"request {seed}: {method} {path} {data[:300]}") from error
    statuses[status] = statuses.get(status, 0) + 1

  async def go():
    async with scripted_server.running(app):
      for start in range(FIRST, FIRST + COUNT, AT_ONCE):
        await asyncio.gather(*(one(seed) for seed in range(start, start + AT_ONCE)))
      assert await settled(engine) == {}
      assert (await ask(app, "/health"))[0] == 200
      status, _, _ = await ask(app, CHAT, {"messages": MESSAGES[0]})
      assert status == 200

  asyncio.run(go())
  assert sum(statuses.values()) == COUNT and service.driver.attempts == 0
  assert statuses[200] > COUNT // 5 and statuses[400] > COUNT // 5
  assert {403, 404, 405, 413, 415} <= set(statuses)
