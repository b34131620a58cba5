"""The engine over its slots: what it returns depends on the request alone, and nothing is lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import (
  CROWDED,
  SHAPES,
  STOP,
  VOCAB,
  assert_nothing_is_left,
  drain,
  make_engine,
  ragged_requests,
  same,
)

from qed_jax.model import qwen3
from qed_jax.records import Batch
from qed_jax.rollout import sampling
from qed_jax.rollout.requests import Request, RequestError

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def engine(tiny):
  """One for the tests that leave it as they found it."""
  return make_engine(tiny)


# --- what comes out


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


# How a request asks for it, and sampling.Controls of the same.
ASKED = {
  "nothing": ({}, {}),
  "greedy": ({"temperature": 0.0}, {"temperature_B": 0.0}),
  "temperature": ({"temperature": 0.6}, {"temperature_B": 0.6}),
  "top_k": ({"top_k": 4}, {"top_k_B": 4}),
  "top_p": ({"top_p": 0.5}, {"top_p_B": 0.5}),
  "min_p": ({"min_p": 0.4}, {"min_p_B": 0.4}),
  "repetition": ({"repetition_penalty": 9.0}, {"repetition_B": 9.0}),
  "presence": ({"presence_penalty": 3.0}, {"presence_B": 3.0}),
  "frequency": ({"frequency_penalty": -2.0}, {"frequency_B": -2.0}),
  "bias": ({"logit_bias": ((7, 3.0), (8, -INF))}, {"biased_B": True}),
  "seed and attempt": ({"seed": 2**32 + 9, "attempt": 77}, {}),
  "truncated": ({"top_k": 9, "top_p": 0.7, "temperature": 1.3, "min_p": 0.05},
                {"top_k_B": 9, "top_p_B": 0.7, "temperature_B": 1.3, "min_p_B": 0.05}),
}  # fmt: skip


@pytest.mark.parametrize("truncated_logp", [False, True], ids=["full", "truncated"])
def test_what_is_asked_for_is_what_is_sampled(tiny, truncated_logp):
  """Token by token: the whole text run again without a cache, and the sampler on its last logits,
  told directly. Every attempt, in a batch where each asks for something else."""
  config, params = tiny
  requests = [
    dataclasses.replace(Request((5, 9, 2, 9), 3, 4, 12, 1.0), **asked)
    for asked, _ in ASKED.values()
  ]
  engine = make_engine(tiny, stop_ids=(), truncated_logp=truncated_logp)
  completions = engine.generate(requests)
  rows = len(requests)
  controls = sampling.neutral(rows)
  for i, (_, values) in enumerate(ASKED.values()):
    for name, value in values.items():
      getattr(controls, name)[i] = value
  bias_BV = np.zeros((rows, VOCAB), np.float32)
  bias_BV[list(ASKED).index("bias"), [7, 8]] = 3.0, -np.inf
  words = [
    np.array(x, np.uint32)
    for x in zip(
      *((r.seed % 2**32, sampling.prompt_id(r.prompt_tokens), r.attempt) for r in requests),
      strict=True,
    )
  ]
  key_B = sampling.attempt_keys(*words)

  @jax.jit
  def draw(tokens_BT, n, counts_BV):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    x_BTD = qwen3.hidden(config, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    logits_BV = qwen3.logits(config, params, x_BTD[:, n - 1])
    history = sampling.History(counts_BV, jnp.asarray(bias_BV))
    at_B = jnp.full(rows, n, jnp.int32)
    return sampling.sample(logits_BV, key_B, at_B, controls, history, truncated_logp)

  tokens_BT = np.zeros((rows, 16), np.int32)
  tokens_BT[:, :4] = requests[0].prompt_tokens
  counts_BV = np.zeros((rows, VOCAB), np.int32)
  counts_BV[:, [5, 9, 2]] = sampling.PROMPT
  for n in range(4, 16):
    drawn = draw(tokens_BT, n, counts_BV)
    tokens_BT[:, n] = drawn.token_B
    counts_BV[np.arange(rows), tokens_BT[:, n]] += 1
    np.testing.assert_array_equal([c.tokens[n - 4] for c in completions], drawn.token_B)
    found_B = [c.logprobs[n - 4] for c in completions]
    np.testing.assert_allclose(found_B, drawn.logp_B, atol=1e-5)
  assert len({tuple(c.tokens.tolist()) for c in completions}) == rows


def test_any_stop_id_ends_an_attempt(tiny):
  """The engine's own and the request's: up to and with the first one, as without stopping."""
  free, engine = make_engine(tiny, stop_ids=()), make_engine(tiny, stop_ids=(STOP, 20))
  requests = ragged_requests(12, seed=8, max_tokens=20, temperature=1.0)
  asked = [
    dataclasses.replace(r, stop_ids=((), (9, 10), (33,))[i % 3]) for i, r in enumerate(requests)
  ]
  ends = []
  for request, whole, cut in zip(
    asked, free.generate(requests), engine.generate(asked), strict=True
  ):
    stops = (STOP, 20, *request.stop_ids)
    n = next((i + 1 for i, t in enumerate(whole.tokens) if t in stops), len(whole.tokens))
    assert cut.tokens.tolist() == whole.tokens[:n].tolist()
    np.testing.assert_array_equal(cut.logprobs, whole.logprobs[:n])
    assert cut.finish_reason == ("stop" if cut.tokens[-1] in stops else "length")
    ends.append(int(cut.tokens[-1]))
  assert {STOP, 20} & set(ends) and {9, 10, 33} & set(ends)


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


def test_log_probs_of_the_engine_equal_score(tiny):
  """From queue to Completion: what RL trains on is what the trainer computes."""
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


def test_pieces_join_to_the_completion(tiny):
  """on_piece hears every token once and in order, when it is read, from preempted attempts too."""
  engine, heard = make_engine(tiny, **CROWDED), {}
  requests = ragged_requests(9, seed=1, max_tokens=20, top_logprobs=3)
  for i, request in enumerate(requests):
    heard[engine.submit(request, lambda piece, i=i: heard[i + 1].append(piece))] = []
  results = drain(engine)
  assert engine.counters.preemptions > 0
  assert max(len(pieces) for pieces in heard.values()) > 2
  for ticket, completion in results.items():
    pieces = heard[ticket]
    assert all(1 <= len(piece.tokens) <= SHAPES.chunk for piece in pieces)
    for name in ("tokens", "logprobs", "versions", "top_tokens", "top_logprobs"):
      joined = np.concatenate([getattr(piece, name) for piece in pieces])
      np.testing.assert_array_equal(joined, getattr(completion, name), err_msg=name)
    assert completion.top_tokens.shape == completion.top_logprobs.shape
    assert completion.top_tokens.shape == (len(completion.tokens), 3)
    assert np.all(np.diff(completion.top_logprobs, axis=1) <= 0)
  greedy = [results[t] for t, r in zip(sorted(results), requests, strict=True) if not r.temperature]
  assert greedy
  for completion in greedy:
    np.testing.assert_array_equal(completion.tokens, completion.top_tokens[:, 0])
    np.testing.assert_allclose(completion.logprobs, completion.top_logprobs[:, 0], atol=1e-6)


# --- bad input


BAD = {
  "the prompt is empty": {"prompt_tokens": ()},
  "the prompt has 40 tokens, this engine takes 39": {"prompt_tokens": (1,) * 40},
  "prompt token 64 is not in the vocabulary of 64": {"prompt_tokens": (1, 64)},
  "prompt token -1 is not in the vocabulary": {"prompt_tokens": (-1, 2)},
  "max_tokens is 0: it must be at least 1": {"max_tokens": 0},
  "temperature is nan": {"temperature": NAN},
  "temperature is -1": {"temperature": -1},
  "temperature is inf": {"temperature": INF},
  "top_p is 0": {"top_p": 0},
  "top_p is 1.5": {"top_p": 1.5},
  "top_p is nan": {"top_p": NAN},
  "top_k is 1000": {"top_k": 1000},
  "top_k is -1": {"top_k": -1},
  "min_p is 1.1": {"min_p": 1.1},
  "min_p is nan": {"min_p": NAN},
  "repetition_penalty is 0": {"repetition_penalty": 0},
  "repetition_penalty is inf": {"repetition_penalty": INF},
  "repetition_penalty is nan": {"repetition_penalty": NAN},
  "presence_penalty is nan": {"presence_penalty": NAN},
  "frequency_penalty is -inf": {"frequency_penalty": -INF},
  "logit_bias token 64 is not in the vocabulary": {"logit_bias": ((64, 1.0),)},
  "logit_bias token -3 is not in the vocabulary": {"logit_bias": ((1, 1.0), (-3, 1.0))},
  "logit_bias of token 5 is nan": {"logit_bias": ((5, NAN),)},
  "logit_bias of token 5 is inf": {"logit_bias": ((5, INF),)},
  "stop_ids token 99 is not in the vocabulary": {"stop_ids": (99,)},
  "stop_ids has 20 tokens: at most 19": {"stop_ids": tuple(range(20))},
  "top_logprobs is 21: it must be in 0..20": {"top_logprobs": 21},
  "top_logprobs is -1": {"top_logprobs": -1},
}


def test_a_bad_request_fails_alone(engine):
  """One line for each bad request in its place; the good ones are as without them."""
  good = ragged_requests(4)
  bad = [dataclasses.replace(good[0], **change) for change in BAD.values()]
  results = engine.generate([good[0], *bad, *good[1:]])
  for message, result in zip(BAD, results[1 : 1 + len(bad)], strict=True):
    assert isinstance(result, RequestError)
    assert message in str(result)
    assert "\n" not in str(result)
  kept = [results[0], *results[1 + len(bad) :]]
  assert all(same(a, b) for a, b in zip(kept, engine.generate(good), strict=True))
  with pytest.raises(RequestError, match="max_tokens is 0"):
    engine.submit(dataclasses.replace(good[0], max_tokens=0))
  assert_nothing_is_left(engine)


def test_the_ends_of_every_range_are_served(engine):
  """The longest prompt, one token, as many stop ids and top log-probs as there may be."""
  longest = tuple(range(39))
  at_their_ends = [
    Request(longest, 0, 0, 5, 1.0),
    Request((1,), 0, 0, 1, 0.0),
    Request((1, 2), 0, 0, 3, 1.0, stop_ids=tuple(range(4, 23)), top_logprobs=20),
    Request((1, 2), -1, 2**40, 3, 1e-6, top_k=128, top_p=1.0, min_p=1.0),
    Request((1, 2), 0, 0, 3, 1.0, repetition_penalty=1e-3, presence_penalty=-2.0),
    Request((1, 2), 0, 0, 3, 1.0, logit_bias=((7, -INF), (8, 90.0))),
  ]
  results = engine.generate(at_their_ends)
  assert [len(c.tokens) for c in results[:2]] == [1, 1]
  assert results[2].top_tokens.shape == (len(results[2].tokens), 20)
  assert results[5].tokens.tolist() == [8, 8, 8]
  assert_nothing_is_left(engine)


@pytest.mark.parametrize("kv_dtype", ["", "int8"])
def test_logits_that_are_not_finite_fail_their_own_attempt(tiny_with, kv_dtype):
  """An embedding of nan: who has read that token or samples it gets one line that says where, with
  its neighbours the same to the bit; so do those who share its prefix, and the pages that it leaves
  serve others."""
  config = tiny_with(tie_word_embeddings=False)
  params = qwen3.init_params(config, jax.random.key(0), jnp.float32)
  damaged = params | {"embed_tokens": params["embed_tokens"].at[50].set(jnp.nan)}
  requests = ragged_requests(8, seed=7, logit_bias=((50, -INF),))
  requests = [
    dataclasses.replace(r, prompt_tokens=tuple(t if t != 50 else 51 for t in r.prompt_tokens))
    for r in requests
  ]
  fine, engine = (
    make_engine((config, params), kv_dtype=kv_dtype),
    make_engine((config, damaged), kv_dtype=kv_dtype),
  )
  wanted = fine.generate(requests)
  first, last, middle = (50, 1, 2, 4), (1, 2, 4, 50), tuple(range(20)) + (50,) + tuple(range(15))
  bad = [Request(prompt, 0, a, 9, 1.0) for a, prompt in enumerate((first, last, middle, middle))]
  bad.insert(2, Request(middle[:20], 0, 0, 9, 0.0, logit_bias=((50, 90.0),)))  # will sample it
  mixed = [x for pair in zip(requests, [*bad, None, None, None], strict=True) for x in pair if x]
  for _ in range(2):
    results = engine.generate(mixed)
    found = [r for r in results if isinstance(r, RequestError)]
    where = [len(first), len(last), 21, len(middle), len(middle)]
    assert [str(e) for e in found] == [
      f"the logits of token {n} are not finite: the parameters are damaged" for n in where
    ]
    kept = [r for r in results if not isinstance(r, RequestError)]
    assert all(same(a, b) for a, b in zip(kept, wanted, strict=True))
  assert_nothing_is_left(engine)
  engine.set_params(params, 2)
  assert all(same(a, b) for a, b in zip(engine.generate(requests), wanted, strict=True))
  assert not any(isinstance(r, RequestError) for r in engine.generate(mixed))


def test_stepping_without_parameters_says_so(tiny):
  """One line that names the call to make."""
  engine = make_engine(tiny, version=None)
  engine.submit(Request((1,), 0, 0, 1, 1.0))
  with pytest.raises(ValueError, match="call set_params first"):
    engine.step()
  with pytest.raises(ValueError, match="call set_params first"):
    engine.warm_up()


def test_slots_and_pages_are_multiples_of_the_replicas(tiny):
  with pytest.raises(ValueError, match="slots=3 and pages=0 must be multiples of the 2 replicas"):
    make_engine(tiny, slots=3, lanes=2)
  with pytest.raises(ValueError, match="slots=4 and pages=9 must be multiples of the 2 replicas"):
    make_engine(tiny, pages=9, lanes=2)


# --- parameters


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


def test_the_same_parameters_under_another_version_change_nothing_else(tiny):
  """A version at every step, whatever is in flight: tokens and log-probs to the bit, versions that
  never fall, each the one at whose time its token was sampled."""
  config, params = tiny
  requests = ragged_requests(9, seed=3, max_tokens=20)
  wanted = make_engine(tiny, keep_prefixes=True).generate(requests)
  engine, version = make_engine(tiny, keep_prefixes=True, version=10), 10
  tickets = [engine.submit(request) for request in requests]
  results = {}
  while engine.unfinished:
    engine.step()
    results |= dict(engine.poll())
    version += 1
    engine.set_params(params, version)
  for ticket, completion in zip(tickets, wanted, strict=True):
    assert same(results[ticket], completion)
    versions = results[ticket].versions
    assert 10 <= versions[0] and versions[-1] < version and np.all(np.diff(versions) >= 0)
    # A chunk is of one version, and a step dispatches one chunk at most.
    assert len(set(versions.tolist())) >= len(versions) / SHAPES.chunk


def test_parameters_of_another_model_are_refused(tiny, tiny_with):
  """One line that names the parameter; the old ones stay, in running attempts too."""
  config, params = tiny
  request = Request((9, 9, 9), 0, 0, 20, 1.0)
  engine = make_engine(tiny)
  [wanted] = engine.generate([request])
  wider = qwen3.init_params(tiny_with(intermediate_size=64), jax.random.key(0), jnp.float32)
  untied = qwen3.init_params(tiny_with(tie_word_embeddings=False), jax.random.key(0), jnp.float32)
  deeper = qwen3.init_params(tiny_with(num_layers=3), jax.random.key(0), jnp.float32)
  less = {name: x for name, x in params.items() if name != "norm"}
  ticket = engine.submit(request)
  engine.step()
  for other, message in (
    (wider, r"parameter layers.mlp.down_proj has the shape \(2, 32, 64\), .* needs \(2, 32, 48\)"),
    (untied, "parameter lm_head has the shape .* needs none of that name"),
    (deeper, r"parameter layers.input_layernorm has the shape \(3, 32\)"),
    (less, r"parameter norm has the shape of nothing: it is missing.* needs \(32,\)"),
  ):
    with pytest.raises(ValueError, match=message) as error:
      engine.set_params(other, 7)
    assert "\n" not in str(error.value)
  assert same(drain(engine)[ticket], wanted)
  [after] = engine.generate([request])
  assert same(after, wanted)
  assert set(after.versions.tolist()) == {1}
