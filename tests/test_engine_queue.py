"""The engine's queue: what is submitted is polled once, and can be aborted wherever it is."""

import numpy as np
import pytest
from engines import (
  CROWDED,
  SHAPES,
  STOP,
  VOCAB,
  alone,
  assert_nothing_is_left,
  assert_pages_add_up,
  drain,
  make_engine,
  near_ties,
  ragged_requests,
  same,
)

from qed_jax.rollout.requests import Request

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def engine(tiny):
  """One for the tests that leave it as they found it."""
  return make_engine(tiny)


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


def where_attempts_are(engine, tickets) -> list[str]:
  """Waiting, prefilling, decoding or in flight, by what the replicas hold."""
  found = dict.fromkeys(tickets, "gone")
  found |= {running.ticket: "waiting" for running in engine._waiting}
  for replica in engine.replicas:
    for running in replica.running.values():
      found[running.ticket] = "decoding" if running.decoding else "prefilling"
    for flight in replica._in_flight:
      found |= {r.ticket: "in flight" for r in flight.attempts if replica.running.get(r.slot) is r}
  return [found[ticket] for ticket in tickets]


@pytest.mark.parametrize("stage", ["waiting", "prefilling", "in flight"])
def test_an_aborted_attempt_gives_back_all_it_has(tiny, stage):
  """Its slot and its pages, wherever it is; it is never polled, the others are the same to the
  bit, and who gets its slot next is too."""
  rng = np.random.default_rng(0)
  prompts = [tuple(rng.integers(0, VOCAB, n).tolist()) for n in (5, 9, 30, 31, 7, 12)]
  requests = [Request(prompt, 0, 0, 9, 1.0, logit_bias=((STOP, -INF),)) for prompt in prompts]
  engine = make_engine(tiny, slots=3, prefill_tokens=4, prefill_rows=1, prefill_budget=1)
  wanted = alone(engine, requests)
  engine.replicas[0].index.clear()
  tickets = [engine.submit(request) for request in requests[:2]]
  engine.step()
  tickets += [engine.submit(request) for request in requests[2:]]
  engine.step()
  stages = where_attempts_are(engine, tickets)
  assert stages == ["in flight", "in flight", "prefilling", "waiting", "waiting", "waiting"]
  lost = stages.index(stage)
  before = engine.pages_free, engine.running, engine.waiting
  engine.abort(tickets[lost])
  assert_pages_add_up(engine)
  if stage == "waiting":
    assert (engine.pages_free, engine.running, engine.waiting) == (*before[:2], before[2] - 1)
  else:
    held = -(-(len(prompts[lost]) + SHAPES.chunk) // SHAPES.page)
    assert engine.pages_free >= before[0] + held
    assert (engine.running, engine.waiting) == (before[1] - 1, before[2])
  results = drain(engine)
  assert sorted(results) == sorted({*tickets} - {tickets[lost]})
  assert all(same(results[t], c) for t, c in zip(tickets, wanted, strict=True) if t in results)
  engine.abort(tickets[lost])
  engine.abort(12_345)
  assert_nothing_is_left(engine)


def test_a_finished_attempt_can_be_aborted_before_it_is_polled(engine):
  tickets = [engine.submit(Request((1, 2), 0, a, 2, 1.0)) for a in range(2)]
  while engine.unfinished:
    engine.step()
  engine.abort(tickets[0])
  assert [ticket for ticket, _ in engine.poll()] == tickets[1:]


@pytest.mark.parametrize("changes", [{}, CROWDED, {"lanes": 2}], ids=["roomy", "crowded", "lanes"])
def test_on_piece_may_abort(tiny, changes):
  """Itself or others, at any token, the last one too: those are never polled, the others are as
  they would be."""
  engine = make_engine(tiny, **changes)
  requests = ragged_requests(16, seed=2, max_tokens=16)
  wanted, rng = make_engine(tiny, **changes).generate(requests), np.random.default_rng(0)
  tickets, gone = [], set()

  def abort_some(piece):
    for ticket in rng.choice(tickets, 1 + rng.integers(2)):
      if rng.random() < 0.5:
        engine.abort(int(ticket))
        gone.add(int(ticket))

  finished = []
  tickets += [engine.submit(request, abort_some) for request in requests]
  while engine.unfinished:
    engine.step()
    assert_pages_add_up(engine)
    now = engine.poll()
    assert not gone & {ticket for ticket, _ in now}
    finished += now
  assert 0 < len(finished) < len(requests)
  assert {ticket for ticket, _ in finished} | gone == {*tickets}
  chosen = [(requests[t - 1], wanted[t - 1], c) for t, c in finished]
  assert near_ties(tiny, *zip(*chosen, strict=True)) == 0
  assert_nothing_is_left(engine)


def test_an_attempt_can_be_aborted_in_the_step_that_pushes_it_out(tiny):
  """Between its replica giving up its pages and the queue taking it back it is found too."""
  engine, gone = make_engine(tiny, lanes=2, pages=12, slots=6), set()

  def abort_the_pushed_out(piece):
    for replica in engine.replicas:
      for running in list(replica.preempted):
        engine.abort(running.ticket)
        gone.add(running.ticket)

  requests = ragged_requests(40, seed=5, max_tokens=22, logit_bias=((STOP, -INF),))
  tickets = [engine.submit(request, abort_the_pushed_out) for request in requests]
  assert sorted(drain(engine)) == sorted({*tickets} - gone)
  assert gone
  assert_nothing_is_left(engine)


def test_an_attempt_can_abort_itself_with_its_last_token(engine):
  """The piece that ends it comes before it is reported."""
  heard = []

  def stop(piece):
    heard.append(piece)
    engine.abort(ticket)

  ticket = engine.submit(Request((1, 2, 3), 0, 0, 6, 1.0, logit_bias=((STOP, -INF),)), stop)
  other = engine.submit(Request((1, 2, 3), 0, 1, 6, 1.0))
  assert list(drain(engine)) == [other]
  assert [len(piece.tokens) for piece in heard] == [6]
  assert_nothing_is_left(engine)


def test_a_stop_that_never_comes_is_a_limit(engine):
  """A stop id that is forbidden: the attempt ends at max_tokens, nobody waits for it."""
  request = Request((1, 2), 0, 0, 30, 1.0, stop_ids=(9,), logit_bias=((9, -INF), (STOP, -INF)))
  [completion] = engine.generate([request])
  assert (len(completion.tokens), completion.finish_reason) == (30, "length")
