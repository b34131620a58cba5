"""Who may ask and how much: keys on every route, this machine alone without one, body limits."""

import asyncio
import base64
import json

import openai
import pytest
import scripted_server
from scripted_server import CHAT, COMPLETIONS, ask, is_error
from test_tokenizer import write_bpe_folder

from qed_jax.data import tokenizer as tokenizer_lib
from qed_jax.serving import access

KEY = "sk-serve-0123456789"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return tokenizer_lib.load(write_bpe_folder(tmp_path_factory.mktemp("bpe")))


def basic(password: str, user: str = "") -> str:
  return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


RIGHT = [f"Bearer {KEY}", f"bearer  {KEY}", basic(KEY), basic(KEY, "anyone")]
WRONG = [
  None, "", KEY, "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer {KEY} {KEY}",
  f"Bearer {KEY.upper()}", f"Token {KEY}", "Basic", "Basic !", basic(""), basic("x", KEY),
  basic(KEY + ":"), "Basic " + base64.b64encode(KEY.encode()).decode(), "Bearer \xff\xfe",
]  # fmt: skip


def routes(app):
  """(method, path) of everything there is, and of what there is not."""
  found = [(m, r.path) for r in app.routes for m in sorted(r.methods)]
  assert {p for _, p in found} >= {CHAT, COMPLETIONS, "/v1/models", "/health", "/metrics", "/"}
  found += [("GET", p) for p in ("/docs", "/redoc", "/openapi.json", "/v1", "/healthz", "/health/")]
  found += [("GET", "//health"), ("GET", "/v1/../health"), ("OPTIONS", CHAT), ("PUT", "/health/x")]
  return [(m, p.replace("{name:path}", "tiny").replace("{name}", "page.js")) for m, p in found]


def test_every_route_but_health_wants_the_key(tokenizer):
  """Without it nothing is told, not even whether there is such a route."""
  app, _, engine = scripted_server.make(tokenizer, key=KEY)

  async def go():
    async with scripted_server.running(app):
      for method, path in routes(app):
        body = json.dumps(BODY | {"prompt": "a"}).encode() if method == "POST" else None
        for given in WRONG:
          headers = {"authorization": given, "host": "example.com"}
          status, found, content = await ask(app, path, body, method=method, headers=headers)
          if path == "/health":
            assert status == 200
            continue
          assert status == 401 and is_error(401, content), (method, path, given)
          assert found["www-authenticate"].startswith("Basic ") and KEY not in content.decode()
        for given in RIGHT:
          headers = {"authorization": given, "host": "example.com"}
          status, _, _ = await ask(app, path, body, method=method, headers=headers)
          assert status in (200, 404, 405), (method, path, given)

  asyncio.run(go())
  assert engine.leaked() == {}


def test_there_is_no_route_that_changes_the_model(tokenizer):
  """Nothing but the two endpoints takes a body; no documentation pages."""
  app, _, _ = scripted_server.make(tokenizer)
  changing = {(m, r.path) for r in app.routes for m in r.methods if m not in ("GET", "HEAD")}
  assert changing == {("POST", CHAT), ("POST", COMPLETIONS)}


def test_the_official_client_is_let_in_with_the_key_alone(tokenizer):
  app, _, _ = scripted_server.make(tokenizer, key=KEY)
  with scripted_server.listening(app) as url:
    for key, fine in [(KEY, True), ("sk-other", False)]:
      client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
      if fine:
        assert client.chat.completions.create(**BODY).usage.completion_tokens > 0
      else:
        with pytest.raises(openai.AuthenticationError) as caught:
          client.chat.completions.create(**BODY)
        assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize(
  ("host", "fine"),
  [("localhost", True), ("127.0.0.1:8000", True), ("[::1]:80", True), ("LOCALHOST:1", True),
   ("evil.example", False), ("127.0.0.1.evil.example", False), ("", False), (None, False),
   ("localhost.evil.example:8000", False), ("10.0.0.1", False)],
)  # fmt: skip
def test_without_a_key_other_names_for_this_machine_are_refused(tokenizer, host, fine):
  """A page elsewhere may give 127.0.0.1 a name of its own, and read what it is told there."""
  app, _, _ = scripted_server.make(tokenizer)

  async def go():
    async with scripted_server.running(app):
      return await ask(app, "/v1/models", headers={"host": host})

  status, _, content = asyncio.run(go())
  assert status == (200 if fine else 403)
  assert fine or is_error(403, content)


def test_a_key_comes_from_the_environment_alone(monkeypatch):
  monkeypatch.setenv("SERVE_KEY", f" {KEY}\n")
  assert access.read_key("SERVE_KEY") == KEY
  monkeypatch.delenv("SERVE_KEY")
  assert access.read_key("SERVE_KEY") == ""
  for bad in (KEY, "", "a b"):
    with pytest.raises(ValueError, match="NAME of an environment variable") as caught:
      access.read_key(bad)
    assert KEY not in str(caught.value)
  monkeypatch.setenv("SERVE_KEY", "k\u00e9y")
  with pytest.raises(ValueError, match="SERVE_KEY holds no key"):
    access.read_key("SERVE_KEY")


@pytest.mark.parametrize(
  ("host", "own"),
  [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.8.8.8", True), ("0.0.0.0", False),
   ("::", False), ("10.0.0.1", False), ("example.com", False), ("", False)],
)  # fmt: skip
def test_others_are_not_let_in_without_a_key(host, own):
  access.check_address(host, KEY, "SERVE_KEY")
  if own:
    access.check_address(host, "", "SERVE_KEY")
  else:
    with pytest.raises(ValueError, match="SERVE_KEY") as caught:
      access.check_address(host, "", "SERVE_KEY")
    assert "\n" not in str(caught.value)


def test_bodies_are_limited_with_and_without_a_length(tokenizer):
  """One byte over the limit is a 413, said or counted; a body that lies about its length too."""
  limit = 1_000
  app, _, _ = scripted_server.make(tokenizer, limits={"body_bytes": limit})
  fits = json.dumps(BODY).encode()
  fits += b" " * (limit - len(fits))

  async def go():
    async with scripted_server.running(app):
      assert (await ask(app, CHAT, fits))[0] == 200
      parts = [fits[i : i + 100] for i in range(0, limit, 100)]
      assert (await ask(app, CHAT, parts=parts))[0] == 200
      lies = {"content-length": "5"}
      for status, _, content in [
        await ask(app, CHAT, fits + b" "),
        await ask(app, CHAT, parts=[*parts, b" "]),
        await ask(app, CHAT, fits + b" ", headers=lies),
        await ask(app, COMPLETIONS, parts=[b" " * 100] * 10**5),
        await ask(app, CHAT, fits, headers={"content-length": "9" * 19}),
      ]:
        assert status == 413 and is_error(413, content)

  asyncio.run(go())


def test_the_official_client_sees_the_413(tokenizer):
  """It is answered before all of it is sent, and still read."""
  app, _, _ = scripted_server.make(tokenizer)
  with scripted_server.listening(app) as url:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    for size in (2_000_001, 20_000_000):
      with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="tiny", prompt="a" * size)
      assert caught.value.status_code == 413


@pytest.mark.parametrize(
  "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", None]
)
def test_a_body_must_say_that_it_is_json(tokenizer, kind):
  """What a form or script of another site can send without being asked is none of these."""
  app, _, _ = scripted_server.make(tokenizer)

  async def go():
    return await ask(app, CHAT, BODY, headers={"content-type": kind})

  status, _, content = asyncio.run(go())
  assert status == 415 and is_error(415, content)


def test_a_body_that_does_not_come_is_not_waited_for(tokenizer):
  app, _, _ = scripted_server.make(tokenizer, limits={"body_s": 0.2})

  async def go(url):
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    answer = await asyncio.wait_for(reader.read(65536), 5)
    writer.close()
    return answer

  with scripted_server.listening(app) as url:
    assert asyncio.run(go(url)).startswith(b"HTTP/1.1 408")
