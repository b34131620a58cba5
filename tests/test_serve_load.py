"""The server under load and in trouble: many clients, hang-ups, a full queue, a broken engine."""

import asyncio
import json
import random
import time

import openai
import pytest
import scripted_server
from scripted_server import CHAT, COMPLETIONS, ask, is_error, settled
from test_tokenizer import write_bpe_folder

from qed_jax.data import tokenizer as tokenizer_lib
from qed_jax.rollout.requests import Request, RequestError

TURN = [{"role": "user", "content": "a"}]
BODY = {"messages": TURN, "max_tokens": 5}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return tokenizer_lib.load(write_bpe_folder(tmp_path_factory.mktemp("bpe")))


def endless(request):
  return [70] * 10_000


async def metric(app, name):
  _, _, content = await ask(app, "/metrics")
  lines = (line.rsplit(" ", 1) for line in content.decode().splitlines())
  return float(dict(line for line in lines if len(line) == 2)[name])


def test_200_clients_on_8_slots_get_their_own_answers(tokenizer):
  """Streamed or not, whoever shares the engine: what the engine has for the request alone."""
  app, _, engine = scripted_server.make(tokenizer, limits={"waiting": 400}, slots=8)

  async def one(client, i):
    prompt = [int(x) for x in random.Random(i).choices(range(300), k=1 + i % 50)]
    options = {"model": "tiny", "prompt": prompt, "seed": i % 7, "n": 1 + i % 3, "max_tokens": 60}
    wanted = [
      engine.offline(Request(tuple(prompt), i % 7, attempt, 60, 1.0))
      for attempt in range(1 + i % 3)
    ]
    texts, reasons = {}, {}
    if i % 2:
      async for chunk in await client.completions.create(stream=True, **options):
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    else:
      answer = await client.completions.create(**options)
      assert answer.usage.completion_tokens == sum(len(c.tokens) for c in wanted)
      texts = {c.index: c.text for c in answer.choices}
      reasons = {c.index: c.finish_reason for c in answer.choices}
    assert texts == {j: tokenizer.decode(c.tokens.tolist()) for j, c in enumerate(wanted)}
    assert reasons == {j: c.finish_reason for j, c in enumerate(wanted)}

  async def go(url):
    async with openai.AsyncOpenAI(
      base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=120
    ) as client:
      await asyncio.gather(*(one(client, i) for i in range(200)))

  with scripted_server.listening(app) as url:
    asyncio.run(go(url))
  assert engine.leaked() == {} and engine.most_running == 8
  assert engine.finished == sum(1 + i % 3 for i in range(200))


def test_500_clients_hang_up_and_nothing_leaks(tokenizer):
  """At a random moment, streamed or not, waiting or running: slot and pages are free again."""
  app, service, engine = scripted_server.make(
    tokenizer, script=endless, limits={"waiting": 300}, step_s=1e-3, chunk=2
  )
  draw = random.Random(0)

  async def one(url, i):
    await asyncio.sleep(draw.random() * 4)
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(BODY | {"max_tokens": 400, "stream": i % 2 == 0, "n": 1 + i % 3}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    if i % 10 == 9:  # in the middle of its request
      data = data[: draw.randrange(len(data))]
    writer.write(data)
    await writer.drain()
    await asyncio.sleep(draw.random() * 0.2)
    if i % 3:
      writer.transport.abort()
    else:
      writer.close()

  async def go(url):
    await asyncio.gather(*(one(url, i) for i in range(500)))
    assert await settled(engine) == {}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
      await client.chat.completions.create(model="tiny", **BODY)
    end = time.monotonic() + 5
    while service.driver.attempts and time.monotonic() < end:
      await asyncio.sleep(0.01)
    assert service.driver.attempts == 0

  with scripted_server.listening(app) as url:
    asyncio.run(go(url))
  assert engine.leaked() == {} and engine.aborted > 200
  assert engine.finished < 300


def test_a_slot_is_free_one_step_after_its_client_has_gone(tokenizer):
  app, _, engine = scripted_server.make(tokenizer, script=endless, slots=1, step_s=0.02, chunk=1)

  async def go():
    async with scripted_server.running(app):
      for stream in (True, False):
        gone = asyncio.Event()
        asked = asyncio.create_task(
          ask(app, CHAT, BODY | {"max_tokens": 300, "stream": stream}, hang_up=gone)
        )
        while not engine.running:
          await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        before = engine.steps
        gone.set()
        await asked
        while engine.running:
          await asyncio.sleep(0.001)
        assert engine.steps - before <= 2 and engine.leaked() == {}

  asyncio.run(go())


def test_a_stop_string_ends_the_attempt_in_the_engine(tokenizer):
  """What comes after it is never sampled, though another choice goes on."""
  script = scripted_server.says(tokenizer, "abc, stop here" + " and on" * 200, "x " * 300)
  app, _, engine = scripted_server.make(tokenizer, script=script, step_s=2e-3, chunk=2)

  async def go():
    async with scripted_server.running(app):
      for stream in (True, False):
        asked = {"prompt": "a", "max_tokens": 300, "n": 2, "stop": "stop", "stream": stream}
        status, _, content = await ask(app, COMPLETIONS, asked)
        assert status == 200
        if not stream:
          first, second = json.loads(content)["choices"]
          assert (first["text"], second["finish_reason"]) == ("abc, ", "length")

  asyncio.run(go())
  assert engine.leaked() == {} and engine.aborted == 2
  assert engine.counters.sampled_tokens < 2 * 300 + 100


def test_a_full_queue_is_429_with_retry_after(tokenizer):
  """Places are of attempts; they are free again once their attempts have ended."""
  app, service, engine = scripted_server.make(
    tokenizer, script=endless, slots=2, limits={"waiting": 14, "n": 16, "choices": 16}
  )

  async def go():
    async with scripted_server.running(app):
      gone = asyncio.Event()
      long = BODY | {"max_tokens": 400}
      held = [asyncio.create_task(ask(app, CHAT, long, hang_up=gone)) for _ in range(15)]
      while service.driver.attempts < 15:
        await asyncio.sleep(0.001)
      for body, path in [(BODY | {"n": 2}, CHAT), ({"prompt": ["a", "b"]}, COMPLETIONS)]:
        status, headers, content = await ask(app, path, body)
        assert status == 429 and is_error(429, content) and headers["retry-after"] == "5"
        assert json.loads(content)["error"]["code"] == "queue_full"
      assert (await ask(app, "/health"))[0] == 200
      gone.set()
      await asyncio.gather(*held)
      assert await settled(engine) == {}
      await asyncio.sleep(0.05)
      assert service.driver.attempts == 0
      assert (await ask(app, CHAT, BODY | {"n": 16}))[0] == 200

  asyncio.run(go())


def test_a_burst_over_the_capacity_is_answered_one_way_or_the_other(tokenizer):
  """200 at once on 2 slots and 14 places: each has an answer or a 429."""
  app, _, engine = scripted_server.make(
    tokenizer, slots=2, limits={"waiting": 14, "n": 16, "choices": 16}
  )

  async def go():
    async with scripted_server.running(app):
      answers = await asyncio.gather(*(ask(app, CHAT, BODY) for _ in range(200)))
      assert {status for status, _, _ in answers} == {200, 429}
      assert sum(status == 200 for status, _, _ in answers) >= 16

  asyncio.run(go())
  assert engine.leaked() == {}


def test_a_broken_engine_answers_everybody_and_health_says_so(tokenizer, capfd):
  """Those that run, wait and come later: 503, or an error at the end of the stream; none hangs."""
  app, service, engine = scripted_server.make(tokenizer, script=endless, slots=2, step_s=0.01)
  one_line = "the engine failed (RuntimeError: scripted failure of several lines)"

  async def go():
    async with scripted_server.running(app):
      long = BODY | {"max_tokens": 400}
      whole = [asyncio.create_task(ask(app, CHAT, long)) for _ in range(5)]
      streams = [asyncio.create_task(ask(app, CHAT, long | {"stream": True})) for _ in range(5)]
      while engine.running < 2:
        await asyncio.sleep(0.01)
      await asyncio.sleep(0.1)
      engine.fail_at = 0
      for status, _, content in await asyncio.wait_for(asyncio.gather(*whole), 5):
        assert status == 503 and is_error(503, content)
        assert json.loads(content)["error"]["message"] == one_line
      for status, _, content in await asyncio.wait_for(asyncio.gather(*streams), 5):
        *_, last, done = content.decode().removesuffix("\n\n").split("\n\n")
        assert status == 200 and done == "data: [DONE]"
        assert is_error(503, last.removeprefix("data: "))
      for body, path in [
        (BODY, CHAT),
        ({"prompt": "a"}, COMPLETIONS),
        (BODY | {"stream": True}, CHAT),
      ]:
        status, _, content = await asyncio.wait_for(ask(app, path, body), 5)
        assert status == 503 and is_error(503, content)
      status, _, content = await ask(app, "/health")
      assert status == 503 and is_error(503, content)
      assert (await ask(app, "/metrics"))[0] == 200
      assert service.driver.attempts == 0

  asyncio.run(go())
  assert "scripted failure" in capfd.readouterr().err


@pytest.mark.parametrize("method", ["submit", "abort", "poll"])
def test_an_engine_that_breaks_elsewhere_hangs_nobody_either(tokenizer, method, capfd):
  app, _, engine = scripted_server.make(tokenizer, script=endless, slots=2, step_s=0.01)

  def broken(*_, **__):
    raise MemoryError("gone")

  async def go():
    async with scripted_server.running(app):
      gone = asyncio.Event()
      long = BODY | {"max_tokens": 400}
      first = asyncio.create_task(ask(app, CHAT, long))
      second = asyncio.create_task(ask(app, CHAT, long | {"stream": True}, hang_up=gone))
      while engine.running < 2:
        await asyncio.sleep(0.01)
      setattr(engine, method, broken)
      gone.set()
      await asyncio.wait_for(asyncio.gather(second, ask(app, CHAT, long)), 5)
      status, _, content = await asyncio.wait_for(first, 5)
      assert status == 503 and is_error(503, content)
      assert (await ask(app, "/health"))[0] == 503

  asyncio.run(go())
  assert "MemoryError" in capfd.readouterr().err


def test_a_step_that_does_not_come_back_shows_in_health(tokenizer):
  app, _, _ = scripted_server.make(tokenizer, limits={"step_s": 0.1}, step_s=0.6)

  async def go():
    async with scripted_server.running(app):
      assert (await ask(app, "/health"))[0] == 200
      asked = asyncio.create_task(ask(app, CHAT, BODY | {"max_tokens": 1}))
      await asyncio.sleep(0.35)
      status, _, content = await ask(app, "/health")
      assert status == 503 and json.loads(content)["error"]["code"] == "engine_stuck"
      assert (await asked)[0] == 200
      assert (await ask(app, "/health"))[0] == 200

  asyncio.run(go())


def test_a_refusal_by_the_engine_is_a_400(tokenizer):
  """Also when it comes late, or for one of several attempts: the others are ended too."""
  app, service, engine = scripted_server.make(tokenizer, script=endless)
  submit, poll = engine.submit, engine.poll

  def refuses_the_third(request, on_piece=None):
    if request.attempt == 2:
      raise RequestError("the third is one too many")
    return submit(request, on_piece=on_piece)

  def refuses_late():
    done = poll()
    if engine.running:
      ticket = next(iter(engine._running))
      del engine._running[ticket]
      engine.finished += 1
      done.append((ticket, RequestError("no page is left")))
    return done

  async def go():
    async with scripted_server.running(app):
      engine.submit = refuses_the_third
      for stream in (True, False):
        status, _, content = await ask(app, CHAT, BODY | {"n": 4, "stream": stream})
        assert status == 400 and "one too many" in content.decode() and is_error(400, content)
      assert await settled(engine) == {}
      engine.submit, engine.poll = submit, refuses_late
      status, _, content = await ask(app, CHAT, BODY | {"max_tokens": 300})
      assert status == 400 and "no page is left" in content.decode()
      await asyncio.sleep(0.05)
      assert service.driver.attempts == 0

  asyncio.run(go())
  assert engine.leaked() == {}


def test_a_deadline_ends_a_request(tokenizer):
  app, _, engine = scripted_server.make(
    tokenizer, script=endless, limits={"deadline_s": 0.3}, step_s=0.02, chunk=1
  )

  async def go():
    async with scripted_server.running(app):
      long = BODY | {"max_tokens": 400}
      status, _, content = await ask(app, CHAT, long)
      assert status == 504 and is_error(504, content)
      status, _, content = await ask(app, CHAT, long | {"stream": True})
      *_, last, done = content.decode().removesuffix("\n\n").split("\n\n")
      assert status == 200 and is_error(504, last.removeprefix("data: "))
      assert await settled(engine) == {}

  asyncio.run(go())


def test_a_silent_stream_says_that_it_lives(tokenizer, monkeypatch):
  monkeypatch.setattr("qed_jax.serving.generation.PING_S", 0.05)
  app, _, _ = scripted_server.make(tokenizer, step_s=0.3)

  async def go(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
      raw = await client.chat.completions.with_raw_response.create(
        model="tiny", stream=True, **BODY
      )
      return [chunk async for chunk in raw.parse()], raw.http_response

  async def bytes_of():
    async with scripted_server.running(app):
      return (await ask(app, CHAT, BODY | {"stream": True}))[2]

  with scripted_server.listening(app) as url:
    chunks, _ = asyncio.run(go(url))
  assert chunks[-1].choices[0].finish_reason
  app, _, _ = scripted_server.make(tokenizer, step_s=0.3)
  assert b"\n\n: " in asyncio.run(bytes_of())


def test_the_end_of_the_server_ends_what_is_in_flight(tokenizer):
  """An engine that is put away with work in it leaves nobody waiting and nothing behind."""
  app, _, engine = scripted_server.make(tokenizer, script=endless, step_s=0.01)

  async def go():
    async with scripted_server.running(app):
      asked = [
        asyncio.create_task(ask(app, CHAT, BODY | {"max_tokens": 400, "stream": s}))
        for s in (True, False) for _ in range(6)
      ]  # fmt: skip
      while engine.running < 8:
        await asyncio.sleep(0.01)
    late = [asyncio.create_task(ask(app, CHAT, BODY | {"stream": s})) for s in (True, False)]
    for status, _, content in await asyncio.wait_for(asyncio.gather(*asked, *late), 5):
      assert b"shutting down" in content and status in (200, 503)

  asyncio.run(go())
  assert engine.leaked() == {}


def test_long_prompts_do_not_hold_up_the_others(tokenizer):
  """A prompt of a megabyte is tokenized beside the event loop: /health answers meanwhile."""
  app, _, _ = scripted_server.make(tokenizer)

  async def go():
    async with scripted_server.running(app):
      asked = asyncio.create_task(ask(app, COMPLETIONS, {"prompt": "so x " * 390_000}))
      slowest, begun = 0.0, time.monotonic()
      while not asked.done():
        start = time.monotonic()
        assert (await ask(app, "/health"))[0] == 200
        slowest = max(slowest, time.monotonic() - start)
        await asyncio.sleep(0.005)
      assert (await asked)[0] == 400
      assert slowest < (time.monotonic() - begun) / 3
      assert await metric(app, 'qed_jax_requests_total{route="/v1/completions",status="400"}') == 1

  asyncio.run(go())
