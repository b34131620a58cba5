"""The engine over its slots: what it returns depends on the request alone, and nothing is lost."""

import asyncio
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qed_jax.model import qwen3
from qed_jax.rollout import sampler
from qed_jax.rollout.device import Shapes
from qed_jax.rollout.engine import Engine
from qed_jax.rollout.engine_chat import EngineChat
from qed_jax.rollout.requests import Request, RequestError
from qed_jax.sharding import make_mesh

STOP = 3


SHAPES = {
  "slots": 4,
  "max_length": 40,
  "page": 8,
  "pages": 0,
  "chunk": 8,
  "prefill_rows": 2,
  "prefill_tokens": 16,
  "kv_dtype": "",
}
OTHERS = {
  "lanes": 1,
  "prefill_budget": 64,
  "stop_ids": (STOP,),
  "truncated_logp": False,
  "keep_prefixes": False,
}


def make_engine(tiny, *, version=1, mesh=None, **changes):
  config, params = tiny
  engine = Engine(
    config,
    mesh=mesh or make_mesh(1, 1, 1, jax.devices()[:1]),
    shapes=Shapes(**{name: changes.get(name, value) for name, value in SHAPES.items()}),
    **{name: changes.get(name, value) for name, value in OTHERS.items()},
  )
  if version is not None:
    engine.set_params(params, version)
  return engine


def ragged_requests(count, seed=0, **changes):
  """Prompts of 1 to 17 tokens, limits of 1 to 20, greedy, plain, top-k and top-p rows."""
  rng = np.random.default_rng(seed)
  kinds = [(1.0, 1.0, 0), (0.0, 1.0, 0), (0.8, 1.0, 7), (1.2, 0.7, 0), (0.9, 0.8, 5)]
  requests = []
  for i in range(count):
    prompt = tuple(rng.integers(0, 64, rng.integers(1, 18)).tolist())
    temperature, top_p, top_k = kinds[i % len(kinds)]
    given = {"seed": 5, "attempt": i % 3, "max_tokens": int(rng.integers(1, 21))}
    requests.append(Request(prompt, temperature=temperature, top_p=top_p, top_k=top_k, **given))
  return [dataclasses.replace(r, **changes) for r in requests]


def same(one, other):
  """Equal tokens, finish and, bit for bit, log-probs."""
  np.testing.assert_array_equal(one.tokens, other.tokens)
  np.testing.assert_array_equal(one.logprobs, other.logprobs)
  assert one.finish_reason == other.finish_reason
  return True


def test_completions_come_in_the_order_of_requests_and_are_whole(tiny):
  """Every request its own prompt, at most its limit, a stop token only at the end, kept."""
  requests = ragged_requests(13)
  seen = []
  engine = make_engine(tiny)
  completions = engine.generate(requests, lambda *progress: seen.append(progress))
  for request, completion in zip(requests, completions, strict=True):
    assert tuple(completion.prompt_tokens.tolist()) == request.prompt_tokens
    n = len(completion.tokens)
    assert n == len(completion.logprobs) == len(completion.versions) <= request.max_tokens
    assert STOP not in completion.tokens[:-1]
    assert completion.finish_reason == ("stop" if completion.tokens[-1] == STOP else "length")
    assert completion.finish_reason == "stop" or n == request.max_tokens
    assert completion.usage.input_tokens == len(request.prompt_tokens)
    assert completion.usage.output_tokens == n
    assert completion.text == ""
  assert {c.finish_reason for c in completions} == {"stop", "length"}
  assert seen[-1] == (13, sum(len(c.tokens) for c in completions))
  assert seen == sorted(seen)
  assert engine.unfinished == 0


def test_order_and_neighbours_do_not_matter(tiny):
  """Shuffled, or one at a time: bit for bit the same, within one compiled shape."""
  requests = ragged_requests(11)
  completions = make_engine(tiny).generate(requests)
  order = np.random.default_rng(1).permutation(11)
  shuffled = make_engine(tiny).generate([requests[i] for i in order])
  assert all(same(shuffled[j], completions[i]) for j, i in enumerate(order))
  alone = make_engine(tiny)
  assert all(same(alone.generate([requests[i]])[0], completions[i]) for i in (0, 3, 7))


@pytest.mark.parametrize(
  "changes",
  [
    {"slots": 7, "chunk": 3},
    {"prefill_rows": 3},
    {"prefill_tokens": 4},
    {"page": 3},
    {"lanes": 2},
    {"pages": 9, "lanes": 1},
  ],
)
def test_other_shapes_give_the_same_tokens(tiny, changes):
  """Slots, chunk and rows of a prefill change round-off only; near-ties would be counted here."""
  requests = ragged_requests(11)
  completions = make_engine(tiny).generate(requests)
  others = make_engine(tiny, **changes).generate(requests)
  for one, other in zip(completions, others, strict=True):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_attempts_of_a_prompt_differ_and_share_its_prefill(tiny):
  """Four attempts are four texts; their prompt is computed once."""
  prompt = (4, 8, 15, 16, 23, 42)
  requests = [Request(prompt, 0, attempt, 12, 1.0) for attempt in range(4)]
  engine = make_engine(tiny)
  texts = [tuple(c.tokens.tolist()) for c in engine.generate(requests)]
  assert len(set(texts)) == 4
  assert engine.counters.prefilled_tokens == len(prompt) - 1
  assert texts == [tuple(c.tokens.tolist()) for c in engine.generate(requests)]
  changed_seed = [dataclasses.replace(r, seed=1) for r in requests]
  assert not set(texts) & {tuple(c.tokens.tolist()) for c in engine.generate(changed_seed)}


BAD = {
  "the prompt is empty": {"prompt_tokens": ()},
  "the prompt has 40 tokens, this engine takes 39": {"prompt_tokens": (1,) * 40},
  "prompt token 64 is not in the vocabulary": {"prompt_tokens": (1, 64)},
  "prompt token -1 is not in the vocabulary": {"prompt_tokens": (-1, 2)},
  "max_tokens is 0": {"max_tokens": 0},
  "temperature is nan": {"temperature": float("nan")},
  "temperature is -1": {"temperature": -1},
  "top_p is 0": {"top_p": 0},
  "top_p is 1.5": {"top_p": 1.5},
  "top_k is 1000": {"top_k": 1000},
}


def test_a_bad_request_fails_alone(tiny):
  """One line for each bad request in its place; the good ones are as without them."""
  good = ragged_requests(4)
  bad = [dataclasses.replace(good[0], **change) for change in BAD.values()]
  mixed = [good[0], *bad, *good[1:]]
  engine = make_engine(tiny)
  results = engine.generate(mixed)
  for message, result in zip(BAD, results[1 : 1 + len(bad)], strict=True):
    assert isinstance(result, RequestError)
    assert message in str(result)
    assert "\n" not in str(result)
  kept = [results[0], *results[1 + len(bad) :]]
  assert all(same(a, b) for a, b in zip(kept, engine.generate(good), strict=True))
  with pytest.raises(RequestError, match="max_tokens is 0"):
    engine.submit(dataclasses.replace(good[0], max_tokens=0))


def test_max_length_bounds_prompt_and_new_tokens(tiny):
  """A limit beyond the cache is cut to it: finish is "length", nothing is written past the end."""
  prompt = tuple(range(4, 20))
  request = Request(prompt, 0, 0, 1000, 1.0)
  completion = make_engine(tiny, stop_ids=()).generate([request])[0]
  assert len(prompt) + len(completion.tokens) == 40
  assert completion.finish_reason == "length"
  within = make_engine(tiny, stop_ids=(), max_length=64)
  longer = within.generate([dataclasses.replace(request, max_tokens=24)])[0]
  np.testing.assert_array_equal(longer.tokens, completion.tokens)


def test_new_parameters_between_steps_mark_the_tokens_they_sample(tiny):
  """Running attempts go on under the new policy, each token with its version."""
  config, params = tiny
  engine = make_engine(tiny, stop_ids=())
  ticket = engine.submit(Request((9, 9, 9), 0, 0, 20, 1.0))
  engine.step()
  other = jax.tree.map(lambda x: x * 1.5, params)
  engine.set_params(other, 2)
  while engine.unfinished:
    engine.step()
  [(finished, completion)] = engine.poll()
  assert finished == ticket
  assert completion.versions.tolist() == [1] * 8 + [2] * 12
  unchanged = make_engine(tiny, stop_ids=()).generate([Request((9, 9, 9), 0, 0, 20, 1.0)])[0]
  np.testing.assert_array_equal(unchanged.tokens[:8], completion.tokens[:8])
  assert unchanged.logprobs[8] != completion.logprobs[8]


def test_submitted_work_is_polled_once(tiny):
  """submit, step, poll: each ticket comes back once; generate refuses to run over them."""
  engine = make_engine(tiny)
  requests = ragged_requests(6)
  tickets = [engine.submit(request) for request in requests]
  with pytest.raises(ValueError, match="6 submitted attempts are unfinished"):
    engine.generate(requests)
  got = {}
  while engine.unfinished:
    engine.step()
    got |= dict(engine.poll())
  assert sorted(got) == tickets
  assert engine.poll() == []
  expected = make_engine(tiny).generate(requests)
  assert all(same(got[t], c) for t, c in zip(tickets, expected, strict=True))


def test_stepping_without_parameters_says_so(tiny):
  """One line that names the call to make."""
  engine = make_engine(tiny, version=None)
  engine.submit(Request((1,), 0, 0, 1, 1.0))
  with pytest.raises(ValueError, match="call set_params first"):
    engine.step()


def test_no_recompilation_and_no_implicit_transfer_after_warm_up(tiny):
  """A ragged workload over every bucket compiles nothing new and moves nothing unasked."""
  engine = make_engine(tiny)
  engine.warm_up()
  programs = (
    sampler.prefill, sampler.admit, sampler.decode, sampler.copy_pages, sampler.recall,
  )  # fmt: skip
  before = [program._cache_size() for program in programs]
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
  )
  try:
    with jax.transfer_guard("disallow"):
      engine.generate(ragged_requests(17, seed=2))
      engine.generate(ragged_requests(1, seed=3))
  finally:
    jax.monitoring.clear_event_listeners()
  assert [program._cache_size() for program in programs] == before
  assert compiled == []


def test_slots_are_refilled_while_work_is_queued(tiny):
  """Twelve attempts on four slots with one straggler: far fewer steps than three static batches."""
  limits = [30, 4, 4, 4] * 1 + [4] * 8
  requests = [Request((i + 1, 2), 0, 0, n, 1.0) for i, n in enumerate(limits)]
  engine = make_engine(tiny, stop_ids=())
  completions = engine.generate(requests)
  assert [len(c.tokens) for c in completions] == limits
  assert engine.counters.sampled_tokens == sum(limits)
  assert engine.counters.decode_steps < 30 + 4 + 4


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2)])
def test_a_mesh_of_eight_gives_the_same_tokens(tiny, shape):
  """The engine over data, fsdp and tensor, refills included."""
  requests = ragged_requests(9)
  one = make_engine(tiny, slots=8).generate(requests)
  eight = make_engine(tiny, slots=8, mesh=make_mesh(*shape)).generate(requests)
  for a, b in zip(one, eight, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


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
    import time

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


def test_log_probs_of_the_engine_equal_score(tiny):
  """From queue to Completion: what RL trains on is what the trainer computes."""
  from qed_jax.records import Batch

  config, params = tiny
  requests = [
    dataclasses.replace(r, temperature=0.8, top_p=1.0, top_k=0) for r in ragged_requests(9)
  ]
  completions = make_engine(tiny).generate(requests)
  tokens_BT = np.zeros((9, 40), np.int32)
  segments_BT = np.zeros((9, 40), np.int32)
  for b, c in enumerate(completions):
    row = [*c.prompt_tokens, *c.tokens]
    tokens_BT[b, : len(row)], segments_BT[b, : len(row)] = row, 1
  positions_BT = np.broadcast_to(np.arange(40, dtype=np.int32), (9, 40))
  batch = Batch(*map(jnp.asarray, (tokens_BT, positions_BT, segments_BT)), None)
  logp_BT = np.asarray(qwen3.score(config, params, batch, 0.8, 40)[0])
  for b, c in enumerate(completions):
    m, n = len(c.prompt_tokens), len(c.tokens)
    np.testing.assert_allclose(c.logprobs, logp_BT[b, m : m + n], atol=1e-4)
