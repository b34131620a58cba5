"""The server on the real engine: its answers are those of the engine alone, and nothing is left."""

import asyncio
import json

import jax
import pytest
import scripted_server
from scripted_server import CHAT, COMPLETIONS, ask

from configs import serve as serve_config
from qed_jax import sharding
from qed_jax.data import tokenizer as tokenizer_lib
from qed_jax.rollout import jobs
from qed_jax.rollout.requests import Request
from qed_jax.serving import generation
from qed_jax.serving.app import create_app


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return tokenizer_lib.train_sentencepiece(
    ["a b c d : ="], tmp_path_factory.mktemp("words"), vocab_size=64, vocab_multiple=64
  )


@pytest.fixture(scope="module")
def served(tiny, tokenizer):
  """(app, engine) of a random model."""
  model, params = tiny
  config = serve_config.get_config("tiny")
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  engine = jobs.make_engine(model, mesh, config.rollout, tokenizer)
  engine.set_params(params, 0)
  return create_app(generation.service("tiny", engine, tokenizer, config), key=""), engine


def test_answers_are_those_of_the_engine(served, tokenizer):
  """Chats and completions at once, streamed and not, penalties and biases included; then half of
  the clients hang up; then everything is free."""
  app, engine = served
  kinds = [
    {},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"top_p": 0.7, "top_k": 0, "min_p": 0.02},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"9": 3, "7": -100}},
    {"stop_token_ids": [5, 11, 40]},
  ]
  asked = []
  for i in range(15):
    prompt = [8 + (i * j) % 40 for j in range(1, 3 + i)]
    body = {"prompt": prompt, "seed": i % 4, "max_tokens": 20, "n": 1 + i % 3, "logprobs": 2}
    asked.append(body | kinds[i % 5])
  requests, wanted = [], []
  for body in asked:
    for attempt in range(body["n"]):
      own = {k: v for k, v in body.items() if k in Request.__dataclass_fields__}
      own |= {"logit_bias": tuple((int(k), v) for k, v in body.get("logit_bias", {}).items())}
      own |= {"stop_ids": tuple(body.get("stop_token_ids", ())), "top_logprobs": 2}
      defaults = {"temperature": 0.8, "top_p": 0.95, "top_k": 20}
      requests.append(Request(tuple(body["prompt"]), attempt=attempt, **(defaults | own)))
  alone = iter(engine.generate(requests))
  for body in asked:
    wanted.append([next(alone) for _ in range(body["n"])])

  async def go():
    async with scripted_server.running(app):
      answers = await asyncio.gather(
        *(ask(app, COMPLETIONS, body | {"stream": i % 2 == 1}) for i, body in enumerate(asked))
      )
      gone = asyncio.Event()
      chat = {"messages": [{"role": "user", "content": "a b"}], "max_tokens": 100}
      chat["logit_bias"] = {str(token): -100 for token in tokenizer.stop_ids}
      held = [
        asyncio.create_task(ask(app, CHAT, chat | {"stream": s, "n": 3}, hang_up=gone))
        for s in (True, False) * 3
      ]
      while engine.running < engine.slots:
        await asyncio.sleep(0.01)
      gone.set()
      await asyncio.gather(*held)
      last, _, _ = await ask(app, CHAT, chat | {"max_tokens": 5})
      return answers, last

  answers, last = asyncio.run(go())
  for i, (status, _, content) in enumerate(answers):
    assert status == 200, content
    texts, counts, reasons, logprobs = {}, {}, {}, {}
    if i % 2:
      events = content.decode().split("\n\n")[:-2]
      choices = [json.loads(e.removeprefix("data: "))["choices"][0] for e in events]
    else:
      answer = json.loads(content)
      choices, counts = answer["choices"], answer["usage"]
      assert counts["completion_tokens"] == sum(len(c.tokens) for c in wanted[i])
    for choice in choices:
      place = choice["index"]
      texts[place] = texts.get(place, "") + choice["text"]
      reasons[place] = choice["finish_reason"] or reasons.get(place)
      found = choice["logprobs"] or {"token_logprobs": []}
      logprobs.setdefault(place, []).extend(found["token_logprobs"])
    for place, completion in enumerate(wanted[i]):
      tokens = completion.tokens.tolist()
      if completion.finish_reason == "stop":
        tokens = tokens[:-1]
      assert (texts[place], reasons[place]) == (tokenizer.decode(tokens), completion.finish_reason)
      shown = completion.logprobs[: len(tokens)].tolist()
      assert logprobs[place] == pytest.approx(shown, abs=1e-4)
  assert last == 200
  assert (engine.unfinished, engine.pages_free) == (0, engine.pages_total)
