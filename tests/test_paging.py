"""Pages behind the engine: what is shared, evicted or computed again never shows in what comes out.

Bit for bit where the compiled shapes are the same; to round-off where they differ, and exactly in
float64. Keys that were computed in a prefill and in the decode loop differ by round-off too.
"""

import dataclasses

import jax
import numpy as np
import pytest
from engines import (
  CROWDED,
  SHAPES,
  STOP,
  alone,
  assert_nothing_is_left,
  assert_pages_add_up,
  drain,
  group,
  is_near_tie,
  make_engine,
  near_ties,
  ragged_requests,
  related_requests,
  same,
  since,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax.rollout.requests import Request

RELATED = related_requests(14)
NESTED = related_requests(14, nested=True)
# Three pages and a bit.
PROMPT = tuple(np.random.default_rng(8).integers(0, 64, 27).tolist())


@pytest.fixture(scope="module")
def roomy(tiny):
  """An engine with pages for all its slots."""
  return make_engine(tiny)


@pytest.fixture(scope="module")
def crowded(tiny):
  """An engine whose attempts push one another out."""
  return make_engine(tiny, **CROWDED)


@pytest.fixture(scope="module")
def expected(roomy):
  """What becomes of RELATED, each by itself."""
  return alone(roomy, RELATED)


@pytest.fixture(scope="module")
def expected_nested(roomy):
  """What becomes of NESTED, each by itself."""
  return alone(roomy, NESTED)


# --- invariance


@st.composite
def arrivals(draw):
  """Some of fourteen requests in some order, and how many of them come before each step."""
  order = draw(st.lists(st.sampled_from(range(14)), min_size=1, unique=True))
  return order, draw(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any))


def run_as_they_come(engine, requests, order, gaps) -> dict:
  """-> {index in requests: Completion}."""
  queue, index_of, results, step = list(order), {}, {}, 0
  while queue or engine.unfinished:
    for _ in range(min(gaps[step % len(gaps)], len(queue))):
      index = queue.pop(0)
      index_of[engine.submit(requests[index])] = index
    engine.step()
    assert_pages_add_up(engine)
    results |= dict(engine.poll())
    step += 1
  assert_nothing_is_left(engine)
  assert sorted(index_of[ticket] for ticket in results) == sorted(order)
  return {index_of[ticket]: result for ticket, result in results.items()}


def ties_with(tiny, requests, results: dict, expected) -> int:
  """near_ties of what run_as_they_come returned."""
  chosen = list(results)
  wanted = [expected[i] for i in chosen]
  return near_ties(tiny, [requests[i] for i in chosen], wanted, list(results.values()))


@settings(max_examples=40, deadline=None)
@given(arrivals())
def test_arrival_company_and_sharing_do_not_show_in_a_bit(roomy, expected, arrival):
  """Any subset in any order, in any slots, sharing prefixes or not: as each one alone."""
  results = run_as_they_come(roomy, RELATED, *arrival)
  assert all(same(result, expected[i]) for i, result in results.items())


@settings(max_examples=20, deadline=None)
@given(arrivals())
def test_going_on_from_what_another_decoded_is_round_off(tiny, roomy, expected_nested, arrival):
  """A prompt that is the beginning of another: the same tokens, log-probs to 1e-5."""
  results = run_as_they_come(roomy, NESTED, *arrival)
  assert ties_with(tiny, NESTED, results, expected_nested) == 0


@settings(max_examples=20, deadline=None)
@given(arrivals(), st.booleans())
def test_pushing_one_another_out_does_not_show(
  tiny, crowded, expected, expected_nested, arrival, nested
):
  """With too few pages attempts are computed again, penalties and stop ids included: the same
  tokens, and none is lost."""
  requests, wanted = (NESTED, expected_nested) if nested else (RELATED, expected)
  results = run_as_they_come(crowded, requests, *arrival)
  assert ties_with(tiny, requests, results, wanted) == 0


def test_attempts_do_push_one_another_out(tiny, roomy, crowded):
  """Long answers in the same engine: preempted many times, each comes back to its own text, and the
  oldest attempt is never the one to go."""
  how = {"max_tokens": 24, "repetition_penalty": 1.1, "logit_bias": ((STOP, -np.inf),)}
  requests = ragged_requests(20, seed=4, **how)
  requests[::3] = [dataclasses.replace(r, stop_ids=(9, 30)) for r in requests[::3]]
  wanted, before = alone(roomy, requests), crowded.counters
  finished = []
  for request in requests:
    crowded.submit(request)
  while crowded.unfinished:
    oldest = min((r.ticket for rep in crowded.replicas for r in rep.running.values()), default=0)
    crowded.step()
    assert_pages_add_up(crowded)
    queued = [r.ticket for r in crowded._waiting]
    assert queued == sorted(queued)  # who was pushed out comes before those who came later
    finished += crowded.poll()
    running = {r.ticket for replica in crowded.replicas for r in replica.running.values()}
    assert not oldest or oldest in running | {ticket for ticket, _ in finished}
  results = [result for _, result in sorted(finished)]
  assert near_ties(tiny, requests, wanted, results) == 0
  spent = since(crowded, before)
  assert spent.preemptions > 5
  assert spent.evicted_pages > 0
  assert 0 < spent.recomputed_tokens < spent.prefilled_tokens
  assert spent.sampled_tokens == sum(len(c.tokens) for c in results)
  assert_nothing_is_left(crowded)


OTHER_SHAPES = {
  "slots and chunk": {"slots": 7, "chunk": 3},
  "rows of a prefill": {"prefill_rows": 3},
  "pieces of a prompt": {"prefill_tokens": 4, "prefill_budget": 1},
  "pages of 3": {"page": 3},
  "one page": {"page": 40},
  "lanes": {"lanes": 2},
  "few pages of 3": {"pages": 1, "page": 3, "slots": 8, "chunk": 3},
}


@pytest.mark.parametrize("changes", OTHER_SHAPES.values(), ids=OTHER_SHAPES)
def test_other_shapes_give_the_same_tokens(tiny, expected, changes):
  """Other programs round otherwise, no more: log-probs to 1e-5, and no near-tie among these."""
  engine = make_engine(tiny, **changes)
  assert near_ties(tiny, RELATED, expected, engine.generate(RELATED)) == 0
  assert (engine.counters.preemptions > 0) == ("pages" in changes)
  assert_nothing_is_left(engine)


@pytest.mark.slow
def test_other_shapes_are_exact_in_float64(tiny, monkeypatch):
  """There a near-tie would have to be one of 1e-16: the same tokens, without exception."""
  update = jax.lax.dynamic_update_index_in_dim  # x64 makes a buffer float64 that float32 goes into
  monkeypatch.setattr(
    jax.lax, "dynamic_update_index_in_dim", lambda x, new, *a: update(x, new.astype(x.dtype), *a)
  )
  with jax.enable_x64(True):
    config, params = tiny
    wide = dataclasses.replace(config, dtype="float64")
    model = wide, jax.tree.map(lambda x: x.astype("float64"), params)
    requests = NESTED + ragged_requests(14, seed=6)
    wanted = make_engine(model).generate(requests)
    for changes in (
      {"slots": 7, "chunk": 3, "prefill_tokens": 4, "prefill_budget": 1},
      {"pages": 1, "page": 3, "slots": 8, "chunk": 3},
      {"lanes": 2, "page": 40},
    ):
      engine = make_engine(model, **changes)
      assert engine.replicas[0].device._state.kv_cache[0].k_LPKSH.dtype == "float64"
      for one, other in zip(wanted, engine.generate(requests), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-6)
      assert (engine.counters.preemptions > 0) == ("pages" in changes)


def test_int8_pages_are_invariant_too(tiny):
  """Rounding depends on the token alone, so company and arrival still do not show in a bit."""
  engine = make_engine(tiny, kv_dtype="int8")
  wanted = alone(engine, RELATED)
  for seed in range(3):
    order = np.random.default_rng(seed).permutation(14).tolist()
    results = run_as_they_come(engine, RELATED, order, [3, 0, 1])
    assert all(same(result, wanted[i]) for i, result in results.items())


def test_a_near_tie_is_told_from_a_difference(tiny, roomy):
  """What excuses a difference: noise of the size of round-off draws both tokens."""
  request = Request(PROMPT, 0, 0, 4, 0.0, top_logprobs=2)
  [completion] = roomy.generate([request])
  sampled = completion.tokens.tolist()
  likeliest = completion.top_tokens[2].tolist()
  assert sampled[2] == likeliest[0]
  assert is_near_tie(tiny, request, sampled[:2], sampled[2:3])
  assert not is_near_tie(tiny, request, sampled[:2], likeliest)
  assert is_near_tie(tiny, request, sampled[:2], likeliest, round_off=0.5)
  hot = dataclasses.replace(request, temperature=1.0, repetition_penalty=1.2)
  [completion] = roomy.generate([hot])
  tokens = completion.tokens.tolist()
  assert is_near_tie(tiny, hot, tokens[:3], tokens[3:])


# --- what is shared


@pytest.mark.parametrize("prompt_length", [25, 28, 4])
def test_pages_of_a_group_are_its_prompt_and_its_answers(tiny, prompt_length):
  """P prompt and R answer pages of G attempts: P + G R, of which each attempt's first holds the end
  of the prompt, copied. The prompt is computed once."""
  G, R, page = 4, 12, 4
  engine = make_engine(tiny, page=page, stop_ids=())
  results = engine.generate(group((*PROMPT, 5)[:prompt_length], G, R))
  assert [len(c.tokens) for c in results] == [R] * G
  assert len({tuple(c.tokens.tolist()) for c in results}) == G
  whole, rest = divmod(prompt_length - 1, page)  # the last token is computed by each for itself
  own = -(-(prompt_length + R) // page) - whole
  counters = engine.counters
  assert counters.peak_pages == whole + G * own <= -(-prompt_length // page) + G * (R // page + 1)
  assert counters.prefilled_tokens == prompt_length - 1
  assert counters.shared_tokens == (G - 1) * (prompt_length - 1)
  assert counters.copied_pages == (G - 1) * (rest > 0)
  assert counters.sampled_tokens == G * R


def test_sixteen_attempts_at_a_long_prompt_take_a_tenth(tiny):
  """P = 512, G = 16: prefill work and pages more than eight times less than those of copies."""
  G, P, R, page = 16, 512, 8, 16
  prompt = np.random.default_rng(0).integers(0, 64, P).tolist()
  shapes = {"slots": G, "max_length": 528, "page": page, "prefill_rows": 1, "prefill_tokens": 128}
  engine = make_engine(tiny, stop_ids=(), **shapes)
  results = engine.generate(group(prompt, G, R))
  assert len(results) == G
  counters = engine.counters
  assert counters.prefilled_tokens == P - 1
  assert counters.prefilled_tokens * 8 < G * (P - 1)
  assert counters.peak_pages * 8 < G * -(-(P + R) // page)
  [last] = alone(engine, [group(prompt, G, R)[-1]])
  assert same(last, results[-1])


def test_an_attempt_that_runs_ahead_is_not_written_over(roomy):
  """Others join in the middle of its prompt, part from it in mid-page and write on, while it
  decodes and after: copies are theirs, its pages stay its own."""
  leader = Request(PROMPT, 1, 0, 12, 1.0)
  others = [Request((*PROMPT[:n], 60 - n, 1), 1, 0, 6, 1.0) for n in (26, 24, 13, 20, 3)]
  again = dataclasses.replace(leader, attempt=1)
  requests = [leader, *others, again]
  wanted, before = alone(roomy, requests), roomy.counters
  tickets = [roomy.submit(leader)]
  results = {}
  for request in (*others, again):
    roomy.step()
    results |= dict(roomy.poll())
    tickets.append(roomy.submit(request))
  results |= drain(roomy)
  for ticket, completion in zip(tickets, wanted, strict=True):
    assert same(results[ticket], completion)
  spent = since(roomy, before)
  assert spent.copied_pages >= 3
  assert spent.shared_tokens >= 26 + 24 + 16 + 8
  assert_nothing_is_left(roomy)


def test_a_chat_turn_goes_on_from_the_answer_before(tiny, roomy):
  """Prompt + answer + a new question: only what is new is computed, to the same answer."""
  first = Request(PROMPT[:9], 0, 0, 8, 1.0, logit_bias=((3, -np.inf),))
  [answer] = alone(roomy, [first])
  turn = Request((*first.prompt_tokens, *answer.tokens.tolist(), 1, 2, 4), 0, 0, 10, 1.0)
  before = roomy.counters
  results = roomy.generate([turn])
  spent = since(roomy, before)
  # All but the answer's last token, which was never fed, and the turn's, which decode feeds.
  assert spent.shared_tokens == 9 + 8 - 1
  assert spent.prefilled_tokens == 3
  assert near_ties(tiny, [turn], results, alone(roomy, [turn])) == 0


def test_a_page_is_not_copied_for_a_few_of_its_tokens(roomy):
  """Whole pages are shared always; of a page that is to be computed anyway, a quarter or more."""
  for common, shared in ((17, 16), (18, 18), (23, 23), (24, 24), (26, 26)):
    roomy.replicas[0].index.clear()
    roomy.generate([Request(PROMPT, 0, 0, 1, 1.0)])
    before = roomy.counters
    roomy.generate([Request((*PROMPT[:common], 63, 62, 61), 0, 0, 1, 1.0)])
    assert since(roomy, before).shared_tokens == shared


def test_an_index_dies_with_the_policy(tiny):
  """Keys of other parameters are not gone on from: neither what is in the index, nor what attempts
  that run on leave behind."""
  config, params = tiny
  other = jax.tree.map(lambda x: 1.3 * x, params)
  engine = make_engine(tiny)
  request = Request(PROMPT, 0, 0, 10, 1.0)
  engine.generate([request])
  engine.set_params(other, 2)
  assert len(engine.replicas[0].index) == 0
  before = engine.counters
  [second] = engine.generate([request])
  assert since(engine, before).shared_tokens == 0
  assert same(second, make_engine((config, other)).generate([request])[0])

  ticket = engine.submit(dataclasses.replace(request, seed=1))
  engine.step()
  engine.set_params(params, 3)
  assert drain(engine)[ticket].versions.tolist()[0] == 2
  before = engine.counters
  [third] = engine.generate([request])
  assert since(engine, before).shared_tokens == 0
  assert same(third, make_engine(tiny).generate([request])[0])
  assert_nothing_is_left(engine)


def test_an_index_outlives_the_policy_where_that_is_allowed(tiny):
  """keep_prefixes: the prompt's keys are those of the parameters before."""
  config, params = tiny
  other = jax.tree.map(lambda x: 1.3 * x, params)
  engine = make_engine(tiny, keep_prefixes=True)
  request = Request(PROMPT, 0, 0, 10, 1.0)
  engine.generate([request])
  engine.set_params(other, 2)
  before = engine.counters
  [stale] = engine.generate([request])
  assert since(engine, before).shared_tokens == len(PROMPT) - 1
  assert since(engine, before).prefilled_tokens == 0
  [fresh] = make_engine((config, other)).generate([request])
  assert not np.array_equal(stale.logprobs, fresh.logprobs)
  assert set(stale.versions.tolist()) == {2}
  assert_nothing_is_left(engine)


def test_the_index_gives_up_its_pages_when_they_are_wanted(roomy):
  """Far more prompts than there are pages: none waits for one, and the newest is still known."""
  roomy.replicas[0].index.clear()
  rng = np.random.default_rng(1)
  prompts = [tuple(rng.integers(0, 64, 30).tolist()) for _ in range(20)]
  before = roomy.counters
  roomy.generate([Request(prompt, 0, 0, 4, 1.0) for prompt in prompts])
  spent = since(roomy, before)
  assert spent.preemptions == 0
  assert spent.evicted_pages >= 20 * 4 - roomy.pages_total
  replica = roomy.replicas[0]
  assert replica.pages.free + len(replica.index) == replica.pages.total
  before = roomy.counters
  roomy.generate([Request(prompts[-1], 0, 1, 4, 1.0)])
  assert since(roomy, before).shared_tokens == 29
  roomy.generate([Request(prompts[0], 0, 1, 4, 1.0)])
  assert since(roomy, before).shared_tokens == 29
  assert_nothing_is_left(roomy)


def test_the_longest_attempt_fits_the_smallest_pool(tiny):
  """However few pages are asked for, one attempt of max_length always runs, on the end of another's
  pages even, and alone it is never preempted."""
  engine = make_engine(tiny, pages=1, stop_ids=())
  assert engine.pages_total == SHAPES.max_length // SHAPES.page + 1
  for attempt in range(3):
    [result] = engine.generate([Request(PROMPT, 0, attempt, 1000, 1.0)])
    assert len(PROMPT) + len(result.tokens) == SHAPES.max_length
  results = engine.generate(group(PROMPT, 5, 1000))
  assert all(len(PROMPT) + len(c.tokens) == SHAPES.max_length for c in results)
  assert_nothing_is_left(engine)
