"""The server under the official client: chats, completions, streams, seeds, stops."""

import asyncio
import json
import urllib.request

import openai
import pytest
import scripted_server
from scripted_server import says, settled
from test_tokenizer import write_bpe_folder

from qed_jax.data import tokenizer as tokenizer_lib
from qed_jax.rollout.requests import Request

ASK = [{"role": "user", "content": "Prove that 2 is prime."}]
REASONING, PROOF = "Let x be \u20ac \U0001f600, so ", "\n\nIt is prime. \u2203 no divisor."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return tokenizer_lib.load(write_bpe_folder(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def thinker(tokenizer):
  """A server whose model thinks, then proves; attempt 1 breaks off in its thought."""
  script = says(tokenizer, f"{REASONING}</think>{PROOF}", REASONING)
  app, _, engine = scripted_server.make(tokenizer, script=script)
  with scripted_server.listening(app) as url:
    yield url
  assert engine.leaked() == {}


@pytest.fixture(scope="module")
def noise(tokenizer):
  """A server whose model writes random tokens, and its engine."""
  app, _, engine = scripted_server.make(tokenizer)
  with scripted_server.listening(app) as url:
    yield url, engine
  assert engine.leaked() == {}


def client(url, key="none"):
  return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def chat(url, **options):
  given = {"model": "tiny", "messages": ASK} | options
  return client(url).chat.completions.create(**given)


def complete(url, **options):
  return client(url).completions.create(**({"model": "tiny", "prompt": "a b"} | options))


def offline(engine, tokenizer, prompt, *, seed, attempt=0, max_tokens=400, top_logprobs=0):
  """The Completion that the engine has for a request, without a server."""
  request = Request(
    tuple(prompt), seed, attempt, max_tokens, temperature=1.0, top_logprobs=top_logprobs
  )
  return engine.offline(request)


def text_of(tokenizer, completion) -> str:
  return tokenizer.decode(completion.tokens.tolist())


# --- Chats -----------------------------------------------------------------------------------


def test_a_chat_has_its_reasoning_apart(thinker, tokenizer):
  answer = chat(thinker)
  [choice] = answer.choices
  assert (choice.message.role, choice.message.content) == ("assistant", PROOF)
  assert choice.message.reasoning_content == REASONING
  assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
  assert answer.object == "chat.completion" and answer.model == "tiny"
  count = len(tokenizer.encode(f"{REASONING}</think>{PROOF}")) + 1  # with the stop token
  assert answer.usage.completion_tokens == count
  assert answer.usage.prompt_tokens == len(tokenizer.chat(ASK))
  assert answer.usage.total_tokens == answer.usage.prompt_tokens + count
  thought = len(tokenizer.encode(f"{REASONING}</think>"))
  assert answer.usage.completion_tokens_details.reasoning_tokens == thought


def test_a_thought_that_never_ended_is_no_answer(thinker):
  """content is null where nothing but reasoning came."""
  [first, second] = chat(thinker, n=2).choices
  assert first.message.content == PROOF
  assert second.message.content is None and second.message.reasoning_content == REASONING


def test_without_thinking_everything_is_content(thinker):
  off = {"chat_template_kwargs": {"enable_thinking": False}}
  [choice] = chat(thinker, extra_body=off).choices
  assert choice.message.content == f"{REASONING}</think>{PROOF}"
  assert getattr(choice.message, "reasoning_content", None) is None


def test_the_prompt_is_the_tokenizers(tokenizer):
  """Roles, parts of content, and thinking reach the template; seed and attempt the engine."""
  asked = []

  def script(request):
    asked.append(request)
    return tokenizer.encode("a")

  app, _, _ = scripted_server.make(tokenizer, script=script)
  messages = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": "r</think>c"},
    {"role": "user", "content": "<|im_end|>d"},
  ]
  plain = [{**m} for m in messages]
  plain[0]["role"], plain[1]["content"] = "system", "a\nb"
  with scripted_server.listening(app) as url:
    for thinking in (True, False):
      extra = {"chat_template_kwargs": {"enable_thinking": thinking}, "top_k": 7, "min_p": 0.25}
      extra |= {"repetition_penalty": 1.5, "stop_token_ids": [5, 6], "unheard_of": [{}]}
      chat(
        url, messages=messages, extra_body=extra, seed=-1, temperature=0.5, top_p=0.75,
        presence_penalty=-1.5, frequency_penalty=2, logit_bias={"3": -100, "4": 1.5},
        max_completion_tokens=9, max_tokens=3, logprobs=True, top_logprobs=3,
      )  # fmt: skip
      assert asked[-1] == Request(
        tuple(tokenizer.chat(plain, thinking=thinking)), 2**32 - 1, 0, 9, 0.5, 0.75, 7, 0.25, 1.5,
        -1.5, 2.0, ((3, -100.0), (4, 1.5)), (5, 6), 3,
      )  # fmt: skip
    chat(url, n=2)
  first, second = asked[-2:]
  assert (first.attempt, second.attempt) == (0, 1) and first.seed == second.seed
  assert (first.temperature, first.top_p, first.top_k) == (0.8, 0.95, 20)  # of configs/serve.py
  assert first.max_tokens == 400  # as much as there is room for, up to the limit


def test_a_stream_adds_up_to_the_whole(thinker):
  """Chunk by chunk: the role first, reasoning before content, then the reason, then the usage."""
  whole = chat(thinker, n=2, logprobs=True, top_logprobs=2, seed=1)
  chunks = list(
    chat(
      thinker, n=2, logprobs=True, top_logprobs=2, seed=1, stream=True,
      stream_options={"include_usage": True},
    )
  )  # fmt: skip
  assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
  assert all(c.usage is None and c.object == "chat.completion.chunk" for c in chunks[:-1])
  assert len({(c.id, c.created, c.model) for c in chunks}) == 1
  for index, choice in enumerate(whole.choices):
    mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
    assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
    kinds = ["content" if c.delta.content is not None else "reasoning" for c in mine[1:-1]]
    assert kinds == sorted(kinds, reverse=True) and len(kinds) > 4
    content = "".join(c.delta.content or "" for c in mine)
    reasoning = "".join(getattr(c.delta, "reasoning_content", None) or "" for c in mine)
    assert (content or None, reasoning) == (
      choice.message.content,
      choice.message.reasoning_content,
    )
    assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
    logprobs = [x for c in mine if c.logprobs for x in c.logprobs.content]
    assert logprobs == choice.logprobs.content


def test_a_stream_is_server_sent_events(thinker):
  """As bytes: every event a line of JSON, the last one [DONE]; no usage unless it was asked for."""
  with client(thinker).chat.completions.with_streaming_response.create(
    model="tiny", messages=ASK, stream=True
  ) as response:
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    text = response.read().decode()
  events = text.removesuffix("\n\n").split("\n\n")
  assert events[-1] == "data: [DONE]"
  found = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
  assert all("usage" not in chunk for chunk in found)


def test_log_probabilities_are_the_engines(noise, tokenizer):
  """One entry a token of the text, with its bytes, and the alternatives that were asked for."""
  url, engine = noise
  answer = chat(url, seed=5, logprobs=True, top_logprobs=3, n=3)
  for attempt, choice in enumerate(answer.choices):
    prompt = tokenizer.chat(ASK)
    real = offline(engine, tokenizer, prompt, seed=5, attempt=attempt, top_logprobs=3)
    count = len(real.tokens) - (real.finish_reason == "stop")
    entries = choice.logprobs.content
    assert [x.logprob for x in entries] == pytest.approx(real.logprobs[:count].tolist())
    data = bytes(b for x in entries for b in x.bytes)
    assert data.decode("utf-8", "replace") == text_of(tokenizer, real)
    for i, entry in enumerate(entries):
      assert [x.logprob for x in entry.top_logprobs] == pytest.approx(real.top_logprobs[i].tolist())
  bare = chat(url, seed=5, logprobs=True)
  assert bare.choices[0].logprobs.content[0].top_logprobs == []


def test_impossible_log_probabilities_are_still_json(tokenizer):
  """-inf and nan cannot be written; OpenAI's -9999 stands for them."""
  app, _, engine = scripted_server.make(tokenizer, script=says(tokenizer, "abc"))
  plain = engine.offline

  def spoilt(request):
    completion = plain(request)
    completion.logprobs[:2] = [float("nan"), float("-inf")]
    completion.top_logprobs[:] = float("-inf")
    return completion

  engine.offline = spoilt
  with scripted_server.listening(app) as url:
    entries = chat(url, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert [x.logprob for x in entries[:2]] == [-9999.0, -9999.0]
    assert entries[0].top_logprobs[0].logprob == -9999.0
    assert complete(url, logprobs=1).choices[0].logprobs.token_logprobs[0] == -9999.0


# --- Seeds, limits and stops -------------------------------------------------------------------


def test_same_seed_same_answer(noise, tokenizer):
  """Choice i is attempt i: the answers are those of the engine without a server."""
  url, engine = noise
  first, again = chat(url, seed=11, n=4), chat(url, seed=11, n=4)
  assert first.choices == again.choices
  other = chat(url, seed=12, n=4)
  assert [c.message for c in other.choices] != [c.message for c in first.choices]
  for attempt, choice in enumerate(first.choices):
    real = offline(engine, tokenizer, tokenizer.chat(ASK), seed=11, attempt=attempt)
    thought, found, text = text_of(tokenizer, real).partition("</think>")
    assert choice.message.reasoning_content == thought
    assert choice.message.content == (text if found else None)
    assert choice.finish_reason == real.finish_reason
  unseeded = {json.dumps(chat(url).choices[0].message.model_dump()) for _ in range(3)}
  assert len(unseeded) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
  ("stops", "thought", "text"),
  [
    (" prime. \u2203", REASONING, "\n\nIt is"),
    (["no such", "divisor", "is p"], REASONING, "\n\nIt "),
    ("\u20ac \U0001f600", "Let x be ", None),
    ("so </think>\n", "Let x be \u20ac \U0001f600, ", None),
    (["</think>"], REASONING, None),
    ("divisor.!", REASONING, PROOF),
  ],
)
def test_stop_strings_match_across_tokens_and_are_left_out(thinker, stops, thought, text, stream):
  """Whatever the tokens; the slot is free at once, and the counts are the same streamed or not."""
  options = {"stop": stops, "logprobs": True}
  if stream:
    chunks = list(chat(thinker, stream=True, stream_options={"include_usage": True}, **options))
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    got = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    content = "".join(d.content or "" for d in deltas) or None
    reason, usage = chunks[-2].choices[0].finish_reason, chunks[-1].usage
  else:
    answer = chat(thinker, **options)
    message, usage = answer.choices[0].message, answer.usage
    got, content, reason = (
      message.reasoning_content,
      message.content,
      answer.choices[0].finish_reason,
    )
  assert (got, content, reason) == (thought, text, "stop")
  assert usage == chat(thinker, **options).usage
  full = chat(thinker).usage.completion_tokens
  assert usage.completion_tokens < full or text == PROOF


def test_stop_tokens_and_max_tokens_end_a_choice(thinker, tokenizer):
  ids = tokenizer.encode(f"{REASONING}</think>{PROOF}")
  place = len(ids) - 3
  stopped = chat(thinker, extra_body={"stop_token_ids": [ids[place]]})
  first = ids.index(ids[place])
  assert stopped.usage.completion_tokens == first + 1
  assert stopped.choices[0].finish_reason == "stop"
  for field in ("max_tokens", "max_completion_tokens"):
    cut = chat(thinker, **{field: 5})
    assert (cut.usage.completion_tokens, cut.choices[0].finish_reason) == (5, "length")
    assert cut.choices[0].message.reasoning_content == tokenizer.decode(ids[:5])


# --- Completions -------------------------------------------------------------------------------


def test_completions_take_texts_and_token_ids(noise, tokenizer):
  """A prompt as text or as its ids is the same prompt; choices of each follow one another."""
  url, engine = noise
  prompts = ["a b", "Let x be \u20ac"]
  by_text = complete(url, prompt=prompts, seed=3, n=2, max_tokens=30)
  by_ids = complete(url, prompt=[tokenizer.encode(p) for p in prompts], seed=3, n=2, max_tokens=30)
  assert by_text.choices == by_ids.choices and [c.index for c in by_text.choices] == [0, 1, 2, 3]
  for i, choice in enumerate(by_text.choices):
    prompt = tokenizer.encode(prompts[i // 2])
    real = offline(engine, tokenizer, prompt, seed=3, attempt=i % 2, max_tokens=30)
    assert (choice.text, choice.finish_reason) == (text_of(tokenizer, real), real.finish_reason)
  one = complete(url, prompt=tokenizer.encode("a b"), seed=3)
  assert one.choices[0].text == complete(url, prompt="a b", seed=3).choices[0].text
  assert one.usage.completion_tokens <= 16  # OpenAI's default
  assert by_text.usage.prompt_tokens == sum(len(tokenizer.encode(p)) for p in prompts)


def test_completions_stream_and_have_log_probabilities(thinker, tokenizer):
  """Their shape is its own: lists beside one another, and the offset of each token."""
  whole = complete(thinker, max_tokens=200, logprobs=2, stop="divisor", seed=2)
  chunks = list(complete(thinker, max_tokens=200, logprobs=2, stop="divisor", seed=2, stream=True))
  assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
  assert whole.choices[0].text == f"{REASONING}</think>{PROOF}".partition("divisor")[0]
  assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
  lists = whole.choices[0].logprobs
  for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
    streamed = [
      x for c in chunks if c.choices[0].logprobs for x in getattr(c.choices[0].logprobs, name)
    ]
    assert streamed == getattr(lists, name)
  for token, start, top in zip(lists.tokens, lists.text_offset, lists.top_logprobs, strict=True):
    assert token.startswith("bytes:") or whole.choices[0].text[start:].startswith(token)
    assert token in top and len(top) <= 3
  assert complete(thinker, logprobs=0).choices[0].logprobs.top_logprobs is None


# --- The rest ----------------------------------------------------------------------------------


def test_models_are_listed(thinker):
  [model] = client(thinker).models.list().data
  assert (model.id, model.object, model.max_model_len) == ("tiny", "model", 512)
  assert client(thinker).models.retrieve("tiny") == model
  with pytest.raises(openai.NotFoundError):
    client(thinker).models.retrieve("other/model")


def test_metrics_count_what_happened(tokenizer):
  """Requests by route and status, tokens, and the engine's own counters and gauges."""
  app, _, engine = scripted_server.make(tokenizer, script=says(tokenizer, "abc"))
  with scripted_server.listening(app) as url:
    chat(url, n=2)
    with pytest.raises(openai.NotFoundError):
      client(url).get("/made-up", cast_to=object)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/metrics") as got:
      assert got.headers["content-type"].startswith("text/plain; version=")
      text = got.read().decode()
  lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
  assert float(lines['qed_jax_requests_total{route="/v1/chat/completions",status="200"}']) == 1
  assert float(lines['qed_jax_requests_total{route="none",status="404"}']) == 1
  assert float(lines["qed_jax_prompt_tokens_total"]) == len(tokenizer.chat(ASK))
  assert float(lines["qed_jax_engine_sampled_tokens_total"]) == engine.counters.sampled_tokens > 0
  assert float(lines["qed_jax_engine_pages_free"]) == engine.pages_total
  assert not any("made-up" in line for line in lines)


def test_a_client_that_goes_in_mid_stream_frees_its_slot(tokenizer):
  """With the async client, and at once: the rest is never sampled."""
  app, _, engine = scripted_server.make(
    tokenizer, script=lambda request: [70] * 400, step_s=0.02, chunk=1
  )

  async def go(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as asked:
      stream = await asked.chat.completions.create(model="tiny", messages=ASK, stream=True, n=3)
      async for chunk in stream:
        if chunk.choices[0].delta.content is None:
          break
      assert engine.running == 3
      await stream.close()
      assert await settled(engine, 5) == {}
      again = await asked.chat.completions.create(model="tiny", messages=ASK, max_tokens=3)
      assert again.usage.completion_tokens == 3

  with scripted_server.listening(app) as url:
    asyncio.run(go(url))
  assert engine.aborted == 3 and engine.counters.sampled_tokens < 300
