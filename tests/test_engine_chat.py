"""The engine behind the Chat protocol: turns, seeds, text, errors, and a free event loop."""

import asyncio
import time

from engines import STOP, make_engine

from qed_jax.rollout.engine_chat import EngineChat
from qed_jax.rollout.requests import RequestError


class Letters:
  """A tokenizer for the tests: an id a character, the last one says whether to think."""

  stop_ids = (STOP,)

  def chat(self, messages, thinking=True):
    text = "".join(m["content"] for m in messages)
    return [ord(c) % 60 + 4 for c in text] + [1 if thinking else 2]

  def decode(self, ids):
    return " ".join(str(i) for i in ids if i != STOP)


def ask(chat, text, **changes):
  how = {"max_tokens": 10, "temperature": 1.0} | changes
  return chat.chat([{"role": "user", "content": text}], **how)


def test_chat_serves_coroutines_that_ask_again(tiny):
  """Turns that build on one another, all problems at once: as if each had run alone."""

  async def problem(chat, i):
    first = await ask(chat, "ab"[: i % 3], n=2, seed=i)
    second = await ask(chat, first[0].text[:9], seed=i, top_k=5, thinking=False)
    return [c.text for c in first + second]

  async def together(chat):
    return await asyncio.gather(*(problem(chat, i) for i in range(7)))

  engine = make_engine(tiny)
  all_texts = asyncio.run(together(EngineChat(engine, Letters(), seed=0)))
  assert all(len(texts) == 3 for texts in all_texts)
  for i in (0, 4):
    alone = asyncio.run(problem(EngineChat(engine, Letters(), seed=0), i))
    assert alone == all_texts[i]
  assert engine.unfinished == 0


def test_chat_completion_has_text_without_the_stop_token(tiny):
  """Tokens keep the stop token, the text does not; usage counts both sides."""

  async def many(chat):
    return await ask(chat, "xyz", n=12, seed=1, max_tokens=36)

  completions = asyncio.run(many(EngineChat(make_engine(tiny), Letters(), seed=0)))
  stopped = [c for c in completions if c.finish_reason == "stop"]
  assert stopped
  for c in stopped:
    assert c.tokens[-1] == STOP
    assert c.text.split() == [str(t) for t in c.tokens[:-1]]
    assert (c.usage.input_tokens, c.usage.output_tokens, c.usage.calls) == (4, len(c.tokens), 1)


def test_chat_without_a_seed_draws_on(tiny):
  """Repeated calls with one prompt differ, and a new EngineChat repeats the same series."""

  async def series(chat):
    return [(await ask(chat, "q"))[0].tokens.tolist() for _ in range(3)]

  engine = make_engine(tiny)
  first = asyncio.run(series(EngineChat(engine, Letters(), seed=0)))
  assert len({tuple(tokens) for tokens in first}) == 3
  assert asyncio.run(series(EngineChat(engine, Letters(), seed=0))) == first
  assert asyncio.run(series(EngineChat(engine, Letters(), seed=9))) != first


def test_chat_error_is_that_of_its_caller_alone(tiny):
  """A prompt that does not fit raises in its coroutine; the other goes on."""

  async def both(chat):
    return await asyncio.gather(
      ask(chat, "z" * 50, n=3), ask(chat, "ok", seed=2), return_exceptions=True
    )

  failed, fine = asyncio.run(both(EngineChat(make_engine(tiny), Letters(), seed=0)))
  assert isinstance(failed, RequestError)
  assert "the prompt has 51 tokens" in str(failed)
  assert len(fine) == 1


def test_chat_passes_on_a_failing_step(tiny):
  """When the engine itself fails, every waiting call raises that, and none waits for ever."""
  engine = make_engine(tiny)

  def fail():
    raise RuntimeError("device lost")

  engine.step = fail

  async def both(chat):
    return await asyncio.gather(ask(chat, "a"), ask(chat, "b"), return_exceptions=True)

  results = asyncio.run(asyncio.wait_for(both(EngineChat(engine, Letters(), seed=0)), 30))
  assert [str(e) for e in results] == ["device lost", "device lost"]


def test_chat_leaves_the_event_loop_free(tiny):
  """While the engine decodes, another coroutine (a judge) runs."""
  engine = make_engine(tiny)
  ticks_during = []
  step = engine.step
  ticks = 0

  def slow_step():
    before = ticks
    time.sleep(0.05)
    step()
    ticks_during.append(ticks - before)

  engine.step = slow_step

  async def tick():
    nonlocal ticks
    while True:
      ticks += 1
      await asyncio.sleep(0.001)

  async def main(chat):
    ticking = asyncio.create_task(tick())
    await ask(chat, "a", seed=0)
    ticking.cancel()

  asyncio.run(main(EngineChat(engine, Letters(), seed=0)))
  assert max(ticks_during) > 0
