"""How the engine runs: what is compiled, moved, dispatched and computed, and that nothing leaks."""

import re

import jax
import numpy as np
import pytest
from engines import (
  CROWDED,
  SHAPES,
  VOCAB,
  alone,
  assert_nothing_is_left,
  assert_pages_add_up,
  drain,
  make_engine,
  near_ties,
  ragged_requests,
  related_requests,
  same,
  since,
)

from qed_jax import sharding
from qed_jax.rollout import sampler
from qed_jax.rollout.requests import Request
from qed_jax.sharding import make_mesh

WIDE = {"slots": 4, "max_length": 256, "page": 4, "chunk": 8, "pages": 90}


def ragged_work(rng, count, longest) -> list[Request]:
  """Everything that a request can ask for, up to `longest` tokens of prompt and answer together."""
  prompts = [rng.integers(0, VOCAB, longest) for _ in range(3)]
  requests = []
  for i in range(count):
    n = int(rng.integers(1, longest // 2))
    prompt = (*prompts[rng.integers(3)][:n].tolist(), int(rng.integers(VOCAB)))
    requests.append(
      Request(
        prompt, i, i, int(rng.integers(1, longest // 2)), float(rng.choice([0, 0.7, 1])),
        top_p=float(rng.choice([1, 0.8])), top_k=int(rng.choice([0, 5])),
        min_p=float(rng.choice([0, 0.02])), repetition_penalty=float(rng.choice([1, 1.2])),
        logit_bias=((5, 1.0),) if i % 7 == 0 else (), stop_ids=(9,) if i % 5 == 0 else (),
        top_logprobs=int(rng.choice([0, 2])),
      )
    )  # fmt: skip
  return requests


def test_nothing_is_compiled_or_moved_unasked_after_warm_up(tiny):
  """Every width of table, every kind of request, aborts, preemptions, copies and new parameters:
  nothing is traced or compiled, no transfer is implicit, and one read a chunk is all there is."""
  config, params = tiny
  engine = make_engine(tiny, **WIDE)
  engine.warm_up()
  [replica] = engine.replicas
  assert replica.shapes.widths == (8, 16, 32, 64)
  widths, reads, compiled = [], [], []
  decode, read = replica.device.decode, jax.device_get
  replica.device.decode = lambda table_BP, fewest: (
    widths.append(table_BP.shape[1]) or decode(table_BP, fewest)
  )
  other = jax.tree.map(lambda x: 1.1 * x, params)
  rng = np.random.default_rng(0)
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
  try:
    with jax.transfer_guard("disallow"), pytest.MonkeyPatch.context() as patch:
      patch.setattr(jax, "device_get", lambda x: reads.append(x) or read(x))
      for longest, own in ((20, params), (250, other), (100, params)):
        tickets = [engine.submit(request) for request in ragged_work(rng, 14, longest)]
        engine.step()
        engine.abort(tickets[0])
        engine.step()
        engine.abort(tickets[1])
        engine.set_params(own, longest)
        assert len(drain(engine)) == 12
  finally:
    jax.monitoring.clear_event_listeners()
  assert [name for name in compiled if "/compile/" in name] == []
  assert set(widths) == set(replica.shapes.widths)
  assert len(reads) == len(widths)
  assert all(isinstance(x, sampler.Chunk) for x in reads)
  counters = engine.counters
  assert min(counters.preemptions, counters.copied_pages, counters.evicted_pages) > 0
  assert_nothing_is_left(engine)


def test_the_next_chunk_is_dispatched_before_the_last_one_is_read(tiny):
  """While the device works on a chunk, the host reads the one before it: never more than one
  ahead, and a step does not wait for what it has dispatched."""
  engine = make_engine(tiny, stop_ids=())
  [replica] = engine.replicas
  events, numbers, kept = [], {}, []  # kept, or an id could name two of them
  decode, read = replica.device.decode, replica._read

  def dispatch(*given):
    chunk = decode(*given)
    kept.append(chunk)
    numbers[id(chunk)] = len(numbers)
    events.append(("dispatch", len(numbers) - 1))
    return chunk

  def note(flight):
    events.append(("read", numbers[id(flight.chunk)]))
    read(flight)

  replica.device.decode, replica._read = dispatch, note
  engine.submit(Request((1, 2, 3), 0, 0, 30, 1.0))
  drain(engine)
  count = len(numbers)
  assert count == 4
  ahead = [("dispatch", 0)]
  for i in range(1, count):
    ahead += [("dispatch", i), ("read", i - 1)]
  assert events == [*ahead, ("read", count - 1)]


@pytest.mark.parametrize("by_layer", [True, False], ids=["numbered layers", "stacked"])
def test_a_decode_step_costs_what_its_table_holds(tiny, by_layer):
  """Compiled for tables of 8, 16 and 32 pages, operations and bytes grow by the same for each page;
  the program is the same to the letter where more tokens are the most that an attempt may have."""
  config, params = tiny

  def programs(max_length):
    [replica] = make_engine(tiny, **WIDE | {"max_length": max_length}).replicas
    own, shapes = replica.device.params if by_layer else params, replica.shapes
    state = sampler.create_state(
      config, shapes.slots, shapes.pool, shapes.page, "float32", by_layer, replica.device.mesh
    )
    lowered = {}
    for width in shapes.widths:
      table_BP = np.zeros((shapes.slots, width), np.int32)
      lowered[width] = sampler.decode.lower(
        config, own, state, table_BP, np.int32(1), chunk=shapes.chunk, truncated_logp=False
      )
    return lowered

  short, long = programs(128), programs(256)
  assert (list(short), list(long)) == ([8, 16, 32], [8, 16, 32, 64])
  assert all(long[width].as_text() == program.as_text() for width, program in short.items())
  costs = {width: program.compile().cost_analysis() for width, program in short.items()}
  for what in ("flops", "bytes accessed"):
    first, second, third = (cost[what] for cost in costs.values())
    np.testing.assert_allclose((third - second) / 16, (second - first) / 8, rtol=0.1)
    assert second > 1.02 * first


def test_a_limit_that_is_not_used_costs_nothing(tiny):
  """With sixteen times the maximum length the same work runs in the very same compiled programs."""
  how = {"page": 8, "slots": 4, "pages": 130, "stop_ids": ()}
  requests = ragged_requests(9, max_tokens=30)
  short = make_engine(tiny, max_length=64, **how)
  wanted = short.generate(requests)
  before = sampler.decode._cache_size(), sampler.prefill._cache_size()
  long = make_engine(tiny, max_length=1024, **how)
  assert all(same(a, b) for a, b in zip(long.generate(requests), wanted, strict=True))
  assert (sampler.decode._cache_size(), sampler.prefill._cache_size()) == before
  assert long.counters == short.counters


def test_slots_are_refilled_while_work_is_queued(tiny):
  """Twelve attempts on four slots with one straggler: far fewer steps than three static batches."""
  limits = [30, 4, 4, 4] * 1 + [4] * 8
  requests = [Request((i + 1, 2), 0, 0, n, 1.0) for i, n in enumerate(limits)]
  engine = make_engine(tiny, stop_ids=())
  completions = engine.generate(requests)
  assert [len(c.tokens) for c in completions] == limits
  assert engine.counters.sampled_tokens == sum(limits)
  assert engine.counters.decode_steps < 30 + 4 + 4


def test_slots_are_busy_while_work_is_queued(tiny):
  """200 ragged attempts on 16 slots: of the steps of the decode loop while some wait, at least 95
  in 100 sample a token in a slot."""
  engine = make_engine(tiny, slots=16, max_length=64, prefill_rows=4, stop_ids=())
  rng = np.random.default_rng(0)
  requests = [
    Request(tuple(rng.integers(0, VOCAB, rng.integers(1, 24)).tolist()), 0, 0, n, 1.0)
    for n in rng.integers(1, 40, 200).tolist()
  ]
  for request in requests:
    engine.submit(request)
  while engine.unfinished:
    if engine.waiting:
      counters = engine.counters
    engine.step()
  assert len(engine.poll()) == 200
  assert engine.counters.sampled_tokens == sum(r.max_tokens for r in requests)
  assert counters.slot_steps > 0.8 * engine.counters.slot_steps
  assert counters.sampled_tokens / counters.slot_steps >= 0.95


def test_a_slot_that_was_left_is_not_decoded(tiny):
  """After an abort the loop runs for those who are there: one token takes one step."""
  engine = make_engine(tiny, stop_ids=())
  tickets = [engine.submit(Request((i, 2), 0, 0, 38, 1.0)) for i in range(4)]
  engine.step()
  for ticket in tickets:
    engine.abort(ticket)
  assert drain(engine) == {}
  before = engine.counters
  engine.generate([Request((1, 2, 3), 0, 0, 1, 1.0)])
  # The chunk in flight of those that left is read, too.
  assert since(engine, before).decode_steps - SHAPES.chunk == 1


def test_a_budget_bounds_what_is_computed_before_others_go_on(tiny):
  """A long prompt is computed in pieces between the chunks of those that decode, and at once when
  nobody does."""
  for budget, most in ((1, 4), (12, 12), (1000, 38)):
    engine = make_engine(tiny, prefill_tokens=4, prefill_rows=1, prefill_budget=budget, stop_ids=())
    engine.submit(Request((1, 2), 0, 0, 38, 1.0))
    engine.step()
    engine.submit(Request(tuple(range(39)), 0, 0, 1, 1.0))
    computed = []
    while engine.unfinished and not engine.poll():
      before = engine.counters
      engine.step()
      spent = since(engine, before)
      computed.append(spent.prefilled_tokens)
      assert spent.decode_steps > 0
    assert max(computed) == most
    drain(engine)
    assert engine.counters.prefilled_tokens == 1 + 38


def test_the_first_in_the_queue_comes_first(tiny):
  """Attempts start in the order in which they were submitted, also when they were preempted; only
  those that wait to share what another is computing are passed, for a step."""
  engine, started = make_engine(tiny, stop_ids=()), []
  for i in range(12):
    request = Request((i, 2 * i, 5), 0, 0, 5, 1.0)
    engine.submit(request, lambda piece, i=i: i in started or started.append(i))
  drain(engine)
  assert started == list(range(12))


@pytest.mark.parametrize("shape", [(1, 1, 8), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_a_mesh_gives_the_same_tokens(tiny, shape):
  """Replicas over data and fsdp, heads over tensor: refills, sharing and all."""
  requests = related_requests(14)
  one = make_engine(tiny, slots=8).generate(requests)
  engine = make_engine(tiny, slots=8, mesh=make_mesh(*shape))
  assert len(engine.replicas) == shape[0] * shape[1]
  eight = engine.generate(requests)
  assert near_ties(tiny, requests, one, eight) == 0
  assert all(replica.counters.sampled_tokens for replica in engine.replicas)
  assert_nothing_is_left(engine)


# --- everything at once


SOAKS = {
  "tiny pool": CROWDED,
  "small pages": {"pages": 1, "page": 3, "slots": 8, "chunk": 3},
  "lanes": {"lanes": 2, "pages": 12, "keep_prefixes": True},
  "int8": {"kv_dtype": "int8", **CROWDED},
}


@pytest.mark.parametrize("changes", SOAKS.values(), ids=SOAKS)
def test_a_long_run_leaks_nothing(tiny, changes):
  """Hundreds of attempts that come, are aborted, pushed out and given new parameters at random: who
  is not aborted is finished, as it would be alone, and every page and slot comes back."""
  config, params = tiny
  engine, rng = make_engine(tiny, **changes), np.random.default_rng(0)
  requests = [r for seed in range(15) for r in related_requests(20, seed, nested=True)]
  queue, live, results, version = list(range(len(requests))), {}, {}, 1
  while queue or engine.unfinished:
    for _ in range(min(int(rng.integers(0, 6)), len(queue))):
      index = queue.pop(0)
      live[engine.submit(requests[index])] = index
    if live and rng.random() < 0.15:
      ticket = int(rng.choice(list(live)))
      engine.abort(ticket)
      del live[ticket]
    if rng.random() < 0.1:
      version += 1
      engine.set_params(params, version)
    engine.step()
    assert_pages_add_up(engine)
    for ticket, result in engine.poll():
      results[live.pop(ticket)] = result
  assert not live
  assert 200 < len(results) < len(requests)
  assert engine.counters.preemptions > 3
  assert_nothing_is_left(engine)
  if "kv_dtype" not in changes:
    some = sorted(results)[::3]
    wanted = alone(make_engine(tiny), [requests[i] for i in some])
    ties = near_ties(tiny, [requests[i] for i in some], wanted, [results[i] for i in some])
    assert ties <= 1


def compiled_decode(replica) -> str:
  """What XLA made of the decode loop."""
  device, shapes = replica.device, replica.shapes
  table_BP = np.zeros((shapes.rows, shapes.widths[0]), np.int32)
  rows = sharding.replicate(device.mesh, (table_BP, np.int32(1)))
  with jax.set_mesh(device.mesh):
    lowered = sampler.decode.lower(
      device.config, device.params, device._state, *rows, chunk=8, truncated_logp=False
    )
    return lowered.compile().as_text()


def test_no_weight_is_copied_to_decode(tiny):
  """What turns a CPU's weights back to the model's layout folds into the products: carried into the
  loop from outside it was a copy of every weight a chunk, and slower products (a third of all)."""
  replica = make_engine(tiny, slots=4).replicas[0]
  program = compiled_decode(replica)
  parameters = jax.tree.leaves(replica.device.params)
  weights = {str(sorted(x.shape)) for x in parameters if x.ndim > 1}
  moved = re.findall(r" = f32\[([\d,]+)\]\S* (?:copy|transpose)\(", program)
  assert weights and not weights & {str(sorted(map(int, shape.split(",")))) for shape in moved}


def test_decode_over_tensor_gathers_the_vocabulary_only_where_asked(tiny):
  """Logits, penalties and bias stay split, and counting a token moves no row of counts: what is as
  wide as the vocabulary is gathered in branches alone, such as that of top-k."""
  engine = make_engine(tiny, slots=8, mesh=make_mesh(1, 1, 8))
  program = compiled_decode(engine.replicas[0])
  gathered = re.findall(r" = \w+\[([\d,]+)\]\S* all-gather\(.*op_name=\"([^\"]*)\"", program)
  wide = [name for shape, name in gathered if str(VOCAB) in shape.split(",")]
  assert wide and all("/cond/" in name for name in wide)


def test_what_fails_in_a_lane_is_raised_ever_after(tiny):
  """A lane dispatches from a thread of its own: a prefill that failed there must not be followed by
  decoding as if it had run."""
  engine = make_engine(tiny, lanes=2)
  requests = ragged_requests(6)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sampler, "prefill", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError, match="no room"):
      engine.generate(requests)
  with pytest.raises(MemoryError, match="no room"):
    while engine.unfinished:
      engine.step()
