"""Experience: which prompts a step has, what is graded together, and what the Batch says of it."""

import asyncio
import types
import zlib

import numpy as np
import pytest

from configs import cache_rl, rl
from qed_jax.records import Completion, Grade, Problem
from qed_jax.rollout import experience
from qed_jax.rollout.requests import RequestError

PROBLEMS = [Problem(id=f"p{i}", statement=f"problem {i}") for i in range(5)]
TEMPLATES = {
  "reason": "P {problem} S {summary}",
  "summarise": "P {problem} {existing_summary} {reasoning}",
}
VERSION = 7


class FakeChat:
  """Completions whose words, tokens and log-probs follow from prompt, seed and attempt."""

  def __init__(self, refuse=()):
    self.calls, self.refuse = [], refuse

  async def __call__(self, messages, *, max_tokens, n, seed, thinking=True, **sampling):
    content = messages[0]["content"]
    self.calls.append((content, n, seed, thinking))
    if any(word in content for word in self.refuse):
      raise RequestError("the prompt has 99 tokens, this engine takes 9")
    await asyncio.sleep(0)
    return [self.completion(content, seed, a, thinking) for a in range(n)]

  def completion(self, content, seed, attempt, thinking):
    rng = np.random.default_rng([zlib.crc32(content.encode()), seed, attempt])
    length = int(rng.integers(2, 6))
    text = f"r{rng.integers(99)}</think>{rng.integers(8)}" if thinking else f"s{rng.integers(99)}"
    return Completion(
      text=text,
      tokens=rng.integers(1, 50, length).astype(np.int32),
      logprobs=-rng.uniform(0, 3, length).astype(np.float32),
      versions=np.full(length, VERSION - attempt % 2, np.int32),
      prompt_tokens=np.arange(1, 1 + len(content) % 7 + 1, dtype=np.int32),
      finish_reason="stop" if attempt % 3 else "length",
    )


async def grade(problem, proof):
  """The digit of the proof; problem p3 cannot be graded."""
  return Grade(None, "failed: outage") if problem.id == "p3" else Grade(int(proof))


def make(job="rl", chat=None, **cache):
  config = {"rl": rl, "cache_rl": cache_rl}[job].get_config("tiny")
  config.rollout.update(problems=3, attempts=4)
  config.batch.update(row_length=64, rows=4)
  if job == "cache_rl":
    config.cache.update(turns=2, states=2, summariser="", **cache)
  engine = types.SimpleNamespace(
    set_params=lambda params, version: None, counters=types.SimpleNamespace(sampled_tokens=0)
  )
  stream = experience.Experience(
    config, PROBLEMS, engine, None, None, grade, TEMPLATES, stopped=lambda: False
  )
  stream.chat = chat or FakeChat()
  return stream


def test_every_problem_once_an_epoch_in_an_order_of_its_own():
  stream = make()
  order = [stream.problem(number).id for number in range(30)]
  epochs = [order[i : i + 5] for i in range(0, 30, 5)]
  assert all(sorted(epoch) == sorted(p.id for p in PROBLEMS) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) > 1


def test_attempts_of_one_prompt_are_centred_together():
  """Within a group of graded attempts the advantages add up to 0; the reward is score / 7."""
  stream = make()
  _, metrics, rollouts = stream.next(None, VERSION)
  groups = {r.group: [x for x in rollouts if x.group == r.group] for r in rollouts}
  assert all(len(g) == 4 and [r.attempt for r in g] == [0, 1, 2, 3] for g in groups.values())
  graded = [r.grade.score for r in rollouts if r.grade.score is not None]
  assert metrics["reward"] == pytest.approx(np.mean(graded) / 7)
  assert metrics["lag/max"] == 1


def test_the_batch_holds_the_sampled_tokens_and_their_log_probs():
  """Sampled ids, log-probs and versions arrive unchanged at their targets; prompts weigh 0."""
  stream = make()
  stream.config.objective.drop_dead_groups = False
  batch, _, rollouts = stream.next(None, VERSION)
  graded = [r for r in rollouts if r.grade.score is not None]
  assert (batch.weight_BT > 0).sum() == sum(len(r.completion.tokens) for r in graded)
  found = set()
  for row, segment in np.argwhere(batch.segments_BT > 0):
    found.add((row, batch.segments_BT[row, segment]))
  assert len(found) == len(graded)
  trained = batch.weight_BT > 0
  assert sorted(batch.behavior_logp_BT[trained].tolist()) == sorted(
    x for r in graded for x in r.completion.logprobs.tolist()
  )
  assert set(batch.lag_BT[trained]) == {0, 1}
  np.testing.assert_allclose(batch.weight_BT[trained], 1 / len(graded), rtol=1e-6)
  per_rollout = [
    batch.advantage_BT[(batch.segments_BT == s) & trained & rows_are(batch, row)]
    for row, s in found
  ]
  assert all(np.ptp(a) == 0 for a in per_rollout)
  assert sum(a[0] for a in per_rollout) == pytest.approx(0, abs=1e-6)


def rows_are(batch, row):
  return (np.arange(len(batch.tokens_BT)) == row)[:, None]


def test_rollouts_that_could_not_be_graded_are_not_trained():
  stream = make()
  for step in range(4):
    batch, metrics, rollouts = stream.next(None, step)
    if any(r.problem.id == "p3" for r in rollouts):
      lost = [r for r in rollouts if r.problem.id == "p3"]
      assert metrics["invalid_share"] == pytest.approx(len(lost) / len(rollouts))
      return
  raise AssertionError("problem p3 never came")


def test_a_prompt_too_long_for_the_engine_costs_only_its_group():
  stream = make(chat=FakeChat(refuse=["problem 1"]))
  seen = False
  for step in range(5):
    _, metrics, rollouts = stream.next(None, step)
    for r in rollouts:
      if r.problem.id == "p1":
        seen = True
        assert r.grade.score is None and "99 tokens" in r.grade.reason
  assert seen


def test_a_step_without_any_grade_stops_with_one_line():
  stream = make(chat=FakeChat(refuse=["problem"]))
  with pytest.raises(ValueError, match="none of 12 rollouts could be graded") as error:
    stream.next(None, 0)
  assert "\n" not in str(error.value)


def test_cache_rl_draws_states_and_groups_by_them():
  """Per problem: 2 turns rolled in, 2 of 3 states drawn, 4 attempts at each, on its own prompt."""
  chat = FakeChat()
  stream = make("cache_rl", chat)
  _, metrics, rollouts = stream.next(None, VERSION)
  roll_in = [c for c in chat.calls if c[1] == 1]
  assert len(roll_in) == 3 * (2 + 2) and len(rollouts) == 3 * 2 * 4
  states = {(r.problem.id, r.turn, r.summary) for r in rollouts}
  assert len({r.group for r in rollouts}) == len(states) == 6
  for r in rollouts:
    assert r.messages[0]["content"] == f"P {r.problem.statement} S {r.summary}"
    assert (r.turn == 1) == (r.summary == "")
  assert metrics["roll_in_tokens"] > 0
  assert any(name.startswith("reward_turn_") for name in metrics)


def test_all_states_are_drawn_in_the_long_run():
  stream = make("cache_rl")
  turns = {r.turn for step in range(6) for r in stream.next(None, step)[2]}
  assert turns == {1, 2, 3}
  without = make("cache_rl", final_state=False)
  assert {r.turn for step in range(6) for r in without.next(None, step)[2]} == {1, 2}


def test_the_same_step_gives_the_same_experience():
  """Nothing is drawn in order of arrival: two streams agree on any step."""
  a, b = make("cache_rl"), make("cache_rl")
  b.next(None, 0)
  first, second = a.next(None, 3), b.next(None, 3)
  np.testing.assert_array_equal(first[0].tokens_BT, second[0].tokens_BT)
  np.testing.assert_array_equal(first[0].advantage_BT, second[0].advantage_BT)


def test_the_replay_buffer_starts_trajectories_from_stored_summaries_and_survives_a_restart():
  stream = make("cache_rl", replay=True)
  for step in range(4):
    stream.next(None, step)
  again = make("cache_rl", replay=True)
  again.restore(stream.state())
  assert again.state() == stream.state() and stream.state()["buffer"]
  chat = again.chat
  again.next(None, 4)
  first_prompts = [c for c in chat.calls if c[1] == 1 and c[3]]
  assert any(not content.endswith("S ") for content, *_ in first_prompts[:3])
  restarted = make("cache_rl", replay=True)
  restarted.restore(stream.state())
  np.testing.assert_array_equal(
    stream.next(None, 4)[0].tokens_BT, restarted.next(None, 4)[0].tokens_BT
  )


def test_training_the_summariser_adds_its_tokens():
  """Two summaries of one trace are compared by the rewards of the attempts from each."""
  plain, trained = make("cache_rl"), make("cache_rl", summaries=2)
  for stream in (plain, trained):
    stream.config.objective.drop_dead_groups = False
  tokens = {}
  for name, stream in (("plain", plain), ("trained", trained)):
    batch, _, rollouts = stream.next(None, 2)
    graded = [r for r in rollouts if r.grade.score is not None]
    tokens[name] = int((batch.weight_BT > 0).sum()) - sum(len(r.completion.tokens) for r in graded)
  assert tokens["plain"] == 0 and tokens["trained"] > 0


def test_stopping_gives_up_the_step():
  """Once `stopped` says so, next returns None and leaves the buffer as it was."""
  stream = make("cache_rl", replay=True)
  stream.stopped = lambda: True

  async def never(*args, **kwargs):
    await asyncio.sleep(60)

  stream.chat = never
  assert stream.next(None, 0) is None
  assert stream.state() == {"buffer": {}, "window": {"next": 3, "open": [0, 1, 2]}}
