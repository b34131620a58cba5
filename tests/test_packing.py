"""Packing of RL examples: nothing is lost, split or mixed, and rows are well filled."""

import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax import records
from qed_jax.data import packing
from qed_jax.model import qwen3

ROW = 16
lengths_strategy = st.lists(st.integers(1, ROW), min_size=1, max_size=30)


def make_examples(lengths):
  rng = np.random.default_rng(0)
  return [
    {
      "tokens": rng.integers(0, 100, n),
      "weight": rng.random(n),
      "advantage": rng.normal(size=n),
      "behavior_logp": rng.normal(size=n),
      "lag": rng.integers(0, 5, n),
    }
    for n in lengths
  ]


@settings(deadline=None)
@given(lengths_strategy, st.integers(1, 4))
def test_pack_then_unpack_is_identity(lengths, rows_multiple):
  """Every array of every example comes back, in order, in its dtype, bit by bit."""
  examples = make_examples(lengths)
  batch, placement = packing.pack_rows(examples, row_length=ROW, rows_multiple=rows_multiple)
  assert batch.tokens_BT.shape[0] % rows_multiple == 0
  assert batch.reference_logp_BT is None
  for key in examples[0]:
    array_BT = getattr(batch, f"{key}_BT")
    assert array_BT.dtype == packing.DTYPES[key]
    for got, example in zip(packing.unpack(array_BT, placement), examples, strict=True):
      np.testing.assert_array_equal(got, example[key].astype(packing.DTYPES[key]))


@settings(deadline=None)
@given(lengths_strategy)
def test_segments_and_positions_tell_the_examples_apart(lengths):
  """A segment is one example: contiguous, numbered from the left, positions from 0, 0 behind it."""
  batch, placement = packing.pack_rows(make_examples(lengths), row_length=ROW, rows_multiple=1)
  for segments, positions in zip(
    packing.unpack(batch.segments_BT, placement),
    packing.unpack(batch.positions_BT, placement),
    strict=True,
  ):
    assert len(set(segments)) == 1 and segments[0] > 0
    np.testing.assert_array_equal(positions, np.arange(len(positions)))
  for segments, weight in zip(batch.segments_BT, batch.weight_BT, strict=True):
    real = segments[segments > 0]
    assert (segments[len(real) :] == 0).all() and (weight[len(real) :] == 0).all()
    assert set(np.diff(real)) <= {0, 1} and real[0] == 1
  assert sum(segments.max() for segments in batch.segments_BT) == len(lengths)
  assert packing.efficiency(batch.segments_BT) == sum(lengths) / batch.segments_BT.size


@settings(deadline=None)
@given(lengths_strategy)
def test_no_two_rows_would_fit_into_one(lengths):
  """Any two rows together hold more than a row: what best fit promises."""
  placement, used = packing.best_fit(lengths, ROW)
  filled = np.bincount(placement.row_N, weights=placement.length_N, minlength=used)
  assert (filled > 0).all() and (filled <= ROW).all()
  assert used == 1 or np.sort(filled)[:2].sum() > ROW


def test_best_fit_takes_the_tightest_row():
  """The last example fills the row with the least room that is enough."""
  placement, used = packing.best_fit([3, 9, 12, 10, 4], ROW)
  assert used == 3
  # Longest first: 12, 10 and 9 open a row each; 4 then leaves 0 beside 12, and 3 leaves 3 beside
  # 10, less than beside 9.
  np.testing.assert_array_equal(placement.row_N, [1, 2, 0, 1, 0])
  np.testing.assert_array_equal(placement.start_N, [10, 0, 0, 0, 12])


def test_rows_come_in_few_counts():
  """Row counts are the smallest bucket that is enough, else a multiple of the largest."""
  count = packing.row_count
  assert [count(n, rows_multiple=4, row_counts=()) for n in (1, 4, 5)] == [4, 4, 8]
  assert [count(n, rows_multiple=2, row_counts=(8, 2)) for n in (1, 3, 8, 9, 17)] == [
    2,
    8,
    8,
    16,
    24,
  ]
  with pytest.raises(ValueError, match="row_counts has 6; give positive multiples of 4"):
    count(1, rows_multiple=4, row_counts=(4, 6))
  examples = make_examples([ROW] * 3)
  batch, _ = packing.pack_rows(examples, row_length=ROW, rows_multiple=2, row_counts=(2, 8))
  assert batch.tokens_BT.shape == (8, ROW)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda e: e[1].update({k: np.ones(ROW + 1) for k in e[1]}), "example 1 has 17 tokens"),
    (lambda e: e[1].update({k: np.ones(0) for k in e[1]}), "example 1 is empty"),
    (lambda e: e[1].update(weight=np.ones(2)), "example 1 has arrays of different shapes"),
    (lambda e: e[1].pop("lag"), "example 1 has keys"),
    (lambda e: [x.update(reward=np.ones(3)) for x in e], "'reward' is unknown or missing"),
    (lambda e: [x.pop("weight") for x in e], "'weight' is unknown or missing"),
    (lambda e: e.clear(), "nothing to pack"),
  ],
)
def test_bad_examples_are_named(change, message):
  """What cannot be packed stops with one line that names the example."""
  examples = make_examples([3, 3])
  change(examples)
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    packing.pack_rows(examples, row_length=ROW, rows_multiple=1)
  assert "\n" not in str(error.value)


def test_packed_examples_do_not_see_each_other(tiny):
  """Through the model: log-probs of a packed example are those of a row of its own, and another
  example in the row can change without changing one of them."""
  config, params = tiny
  examples = make_examples([5, 7, 3, 11])
  for example in examples:
    example["tokens"] = example["tokens"] % config.vocab_size
  score = jax.jit(lambda batch: qwen3.score(config, params, batch, 1.0, 8)[0])

  def logp(some):
    batch, placement = packing.pack_rows(some, row_length=ROW, rows_multiple=4)
    return packing.unpack(np.asarray(score(batch)), placement), batch

  packed, batch = logp(examples)
  assert batch.segments_BT.max() == 2
  for got, example in zip(packed, examples, strict=True):
    alone, _ = logp([example])
    np.testing.assert_allclose(got, alone[0], atol=1e-5)
    assert got[0] == 0 and (got[1:] < 0).all()
  changed = [e | {"tokens": (e["tokens"] + 1) % config.vocab_size} for e in examples]
  after, _ = logp([examples[0], changed[1], examples[2], changed[3]])
  for i in (0, 2):
    np.testing.assert_allclose(after[i], packed[i], atol=1e-6)
  assert not np.allclose(after[1], packed[1])


def proofs(rng, number: int) -> np.ndarray:
  """Lengths like FineProofs': log-normal, median 16k of at most 45k, here in units of 64 tokens."""
  return np.clip(rng.lognormal(np.log(250), 0.6, number), 8, 704).astype(int)


def batch_of(lengths, row_length: int, rows_multiple: int):
  """Packed rows in no order, as SFT has them; best fit would make the fullest ones first."""
  examples = [{"tokens": np.full(n, i), "weight": np.ones(n)} for i, n in enumerate(lengths)]
  batch, _ = packing.pack_rows(examples, row_length=row_length, rows_multiple=rows_multiple)
  order_B = np.random.default_rng(1).permutation(batch.tokens_BT.shape[0])
  rows = {name: x[order_B] for name, x in vars(batch).items() if x is not None}
  return records.Batch(**rows)


@settings(deadline=None)
@given(lengths_strategy, st.sampled_from([(1, 1), (2, 4), (4, 4), (2, 0), (3, 6)]))
def test_balancing_only_moves_rows(lengths, split):
  """Every row is there once, with all its arrays; rows that do not divide stay as they are."""
  shards, at_once = split
  batch, _ = packing.pack_rows(make_examples(lengths), row_length=ROW, rows_multiple=4)
  moved = packing.balanced(batch, shards=shards, rows_at_once=at_once, overhead=3.0)
  assert moved.reference_logp_BT is None

  def rows(b):
    arrays = [x for x in vars(b).values() if x is not None]
    return sorted(tuple(x[i].tobytes() for x in arrays) for i in range(b.tokens_BT.shape[0]))

  assert rows(moved) == rows(batch)


def test_a_rows_cost_is_that_of_its_segments():
  """A segment of L tokens costs L (L + 1) / 2 seen keys and `overhead` keys a token."""
  batch = batch_of([5, 3, 8], 8, 1)
  expected = sorted([15 + 6 + 8 * 2.0, 36 + 8 * 2.0])
  np.testing.assert_allclose(np.sort(packing.costs(batch, 2.0)), expected)


def waiting(batch, shards: int, at_once: int, overhead: float) -> float:
  """How much longer a step takes than its work: devices wait for the dearest at each microbatch."""
  cost = packing.costs(batch, overhead).reshape(-1, shards, at_once // shards).sum(axis=2)
  return cost.max(axis=1).sum() / cost.mean(axis=1).sum()


@pytest.mark.parametrize(("shards", "at_once"), [(8, 8), (8, 16), (8, 64), (4, 64)])
def test_devices_wait_less_for_one_another(shards, at_once):
  """Rows of proofs by cost: of the waiting in a random order, a third is left at most."""
  rng = np.random.default_rng(0)
  batch = batch_of(proofs(rng, 160), 704, 64)
  overhead = 213.0  # Qwen3-4B's 13,639 keys a token, in the same units
  before = waiting(batch, shards, at_once, overhead)
  moved = packing.balanced(batch, shards=shards, rows_at_once=at_once, overhead=overhead)
  after = waiting(moved, shards, at_once, overhead)
  assert after - 1 < (before - 1) / 3, (before, after)


def test_hosts_that_know_nothing_of_one_another_have_like_costs():
  """Eight hosts pack and order their own proofs: together they wait less than they would have."""
  batches = [batch_of(proofs(np.random.default_rng(host), 160), 704, 64) for host in range(8)]

  def together(parts):
    cost_HM = np.stack([packing.costs(b, 213.0).reshape(-1, 8).sum(axis=1)[:8] for b in parts])
    return cost_HM.max(axis=0).sum() / cost_HM.mean(axis=0).sum()

  moved = [packing.balanced(b, shards=8, rows_at_once=8, overhead=213.0) for b in batches]
  assert together(moved) - 1 < (together(batches) - 1) / 2


@pytest.mark.parametrize("rows", [8, 32, 64])
def test_rows_of_proofs_are_filled(rows):
  """RL: of the slots of rows that hold proofs, 95 % at least hold a token."""
  batch = batch_of(proofs(np.random.default_rng(rows), 40 * rows), 704, 1)
  assert packing.efficiency(batch.segments_BT) > 0.95
