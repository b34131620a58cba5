"""Which states cache RL trains on, what their rewards mean, and the summary replay buffer."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax import objectives
from qed_jax.objectives import reasoning_cache, rubric_rl
from qed_jax.objectives.reasoning_cache import EMPTY, StoredSummary, SummaryBuffer

choose_states = jax.jit(reasoning_cache.choose_states, static_argnames="count")
reward_by_turn = jax.jit(reasoning_cache.reward_by_turn, static_argnames="turns")
summary_rewards = jax.jit(reasoning_cache.summary_rewards)
advantages = jax.jit(rubric_rl.advantages, static_argnames=("baseline", "normalize_std"))

ALL = np.ones((6000, 4), bool)


# --- states


def test_every_subset_of_states_is_equally_likely():
  """Two of four states, 6000 problems: six subsets of 1000 each within 4.5 deviations."""
  chosen_PU = np.asarray(choose_states(0, 0, np.arange(6000), ALL, count=2))
  assert np.all(chosen_PU.sum(axis=1) == 2)
  counts = [np.sum(chosen_PU[:, pair].all(axis=1)) for pair in itertools.combinations(range(4), 2)]
  assert sum(counts) == 6000
  assert np.abs(np.array(counts) - 1000).max() < 4.5 * np.sqrt(6000 / 6 * 5 / 6)


def test_the_choice_depends_on_seed_step_and_problem_alone():
  """Another order or subset of the problems changes nothing; another step or seed does."""
  problems = np.arange(40)
  chosen_PU = choose_states(0, 5, problems, ALL[:40], count=2)
  order = np.random.default_rng(0).permutation(40)[:17]
  np.testing.assert_array_equal(
    choose_states(0, 5, problems[order], ALL[:17], count=2), chosen_PU[order]
  )
  for seed, step in [(0, 6), (1, 5), (5, 0)]:
    assert np.any(np.asarray(choose_states(seed, step, problems, ALL[:40], count=2)) != chosen_PU)


def test_states_that_a_trajectory_never_reached_are_not_chosen():
  """All states where no more than `count` exist, none where there are none."""
  available_PU = np.array(
    [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]], bool
  )
  for step in range(20):
    chosen_PU = np.asarray(choose_states(3, step, np.arange(5), available_PU, count=2))
    assert not np.any(chosen_PU & ~available_PU)
    np.testing.assert_array_equal(chosen_PU.sum(axis=1), [2, 2, 1, 0, 2])


def test_problem_numbers_tell_problems_and_draws_apart():
  """32 bits; a problem drawn twice in a step may train on other states the second time."""
  numbers = {
    reasoning_cache.problem_number(name, draw) for name in ("a", "b", "1:a") for draw in range(3)
  }
  assert len(numbers) == 9 and all(0 <= number < 2**32 for number in numbers)


def test_a_group_is_a_problem_with_its_summary():
  """Same problem, turn and summary: same group. Another summary: another baseline."""
  name = reasoning_cache.group("p1", 2, "We know x > 0.")
  assert name == reasoning_cache.group("p1", 2, "We know x > 0.")
  others = [("p2", 2, "We know x > 0."), ("p1", 3, "We know x > 0."), ("p1", 2, "We know x.")]
  assert len({name, *(reasoning_cache.group(*other) for other in others)}) == 4


# --- rewards


def test_mean_reward_by_turn_by_hand():
  """Two turns with grades, one of them failed; the third turn has none and is left out."""
  metrics = reward_by_turn(
    jnp.array([1.0, 0.5, 0.25, jnp.nan]),
    jnp.array([True, True, True, False]),
    jnp.array([1, 2, 1, 2]),
    turns=3,
  )
  means = objectives.finalise(metrics)
  assert means == {"reward_turn_1": 0.625, "reward_turn_2": 0.5}
  again = objectives.finalise(objectives.merge(metrics, metrics))
  assert again == means


def test_states_of_a_problem_have_their_own_baselines():
  """Myopic reward: an attempt is compared with attempts from its own summary only."""
  # Row 0: the empty summary, mostly failing. Row 1: a good summary, mostly solved.
  reward_PA, valid_PA = rubric_rl.rewards([[0, 0, 0, 7], [7, 7, 7, 0]], max_score=7)
  advantage_PA, _ = advantages(reward_PA, valid_PA, baseline="mean", normalize_std=False)
  np.testing.assert_allclose(advantage_PA[0], [-0.25, -0.25, -0.25, 0.75])
  np.testing.assert_allclose(advantage_PA[1], [0.25, 0.25, 0.25, -0.75])


def test_a_summary_earns_the_mean_of_its_next_turn():
  """Summaries of one state, compared by what attempts made of them, failed grades left out."""
  reward_PMA = jnp.array([[[1.0, 0.5, 9.0], [0.0, 0.25, 0.5], [9.0, 9.0, 9.0]]])
  valid_PMA = jnp.array([[[1, 1, 0], [1, 1, 1], [0, 0, 0]]], bool)
  reward_PM, valid_PM = summary_rewards(reward_PMA, valid_PMA)
  np.testing.assert_allclose(reward_PM[valid_PM], [0.75, 0.25])
  np.testing.assert_array_equal(valid_PM, [[True, True, False]])
  advantage_PM, _ = advantages(reward_PM, valid_PM, baseline="mean", normalize_std=False)
  np.testing.assert_allclose(advantage_PM, [[0.25, -0.25, 0]])


# --- replay buffer


def stored(*texts):
  return tuple(StoredSummary(text, turn, 0) for turn, text in enumerate(texts, 1))


def draw(buffer, problem_id, step=0, seed=0, repeat=0):
  return reasoning_cache.sample(buffer, problem_id, seed=seed, step=step, draw=repeat)


def test_adding_replaces_a_problems_summaries_and_no_others():
  """Also: the old buffer stays as it was, and a trajectory without summaries erases nothing."""
  old = reasoning_cache.replace(SummaryBuffer(), {"p": stored("a", "b"), "q": stored("c")})
  new = reasoning_cache.replace(old, {"p": stored("d"), "q": (), "r": stored("e")})
  assert new.summaries == {"p": stored("d"), "q": stored("c"), "r": stored("e")}
  assert old.summaries == {"p": stored("a", "b"), "q": stored("c")}


def test_turns_count_on_from_the_start():
  """Three turns from the empty summary, then three from the third: turns 4, 5, 6."""
  first = reasoning_cache.continued(EMPTY, ["a", "b", "c"], version=7)
  assert [(s.text, s.turn, s.version) for s in first] == [("a", 1, 7), ("b", 2, 7), ("c", 3, 7)]
  second = reasoning_cache.continued(first[-1], ["d", "e", "f"], version=9)
  assert [s.turn for s in second] == [4, 5, 6] and {s.version for s in second} == {9}


def test_a_problem_without_summaries_starts_empty():
  """The first epoch, and stage I, begin on policy."""
  assert draw(SummaryBuffer(), "p") == EMPTY
  assert EMPTY.text == "" and EMPTY.turn == 0


def test_sampling_is_uniform_and_repeatable():
  """600 steps over three summaries: 200 each within 4.5 deviations; the same arguments again give
  the same summary, another seed or draw gives others; device transfers are all explicit."""
  buffer = SummaryBuffer({"p": stored("a", "b", "c")})
  with jax.transfer_guard("disallow"):
    drawn = [draw(buffer, "p", step).text for step in range(600)]
  counts = np.array([drawn.count(text) for text in "abc"])
  assert np.abs(counts - 200).max() < 4.5 * np.sqrt(600 / 3 * 2 / 3)
  assert [draw(buffer, "p", step).text for step in range(30)] == drawn[:30]
  assert [draw(buffer, "p", step, seed=1).text for step in range(30)] != drawn[:30]
  assert [draw(buffer, "p", step, repeat=1).text for step in range(30)] != drawn[:30]


summaries = st.builds(
  StoredSummary, text=st.text(), turn=st.integers(0, 10**6), version=st.integers(0, 2**60)
)
buffers = st.builds(
  SummaryBuffer,
  st.dictionaries(st.text(), st.lists(summaries, min_size=1, max_size=4).map(tuple), max_size=5),
)


@settings(deadline=None)
@given(buffer=buffers)
def test_the_buffer_survives_json(buffer):
  """Any text, through the characters of a file: equal, and it draws the same summaries."""
  written = json.dumps(reasoning_cache.to_json(buffer))
  again = reasoning_cache.from_json(json.loads(written))
  assert again == buffer
  for problem_id in list(buffer.summaries)[:1]:
    assert draw(again, problem_id, step=3) == draw(buffer, problem_id, step=3)


def test_a_malformed_buffer_names_the_problem():
  """A field too few or too many is an error that says where."""
  with pytest.raises(ValueError, match="problem 'p'.*version"):
    reasoning_cache.from_json({"p": [{"text": "a", "turn": 1}]})
  with pytest.raises(ValueError, match="problem 'p'"):
    reasoning_cache.from_json({"p": [3]})
