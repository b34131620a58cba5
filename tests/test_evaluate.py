"""Evaluation: rows survive kills, intervals are right, a missing grade is never a zero."""

import json

import numpy as np
import pytest

from configs import evaluate as evaluate_config
from qed_jax import evaluate, flags, intervals
from qed_jax.records import Completion, Grade, Usage


@pytest.fixture
def config():
  c = evaluate_config.get_config("tiny")
  c.data.problems, c.problems_at_once, c.cache.turns = 6, 4, 2
  c.label = "model"
  flags.check(c)
  return c


class Scripted:
  """A chat that counts its calls; after `lives` of them it raises."""

  def __init__(self, lives=10**9):
    self.lives, self.calls = lives, 0

  async def __call__(self, messages, *, n, seed, thinking=True, **sampling):
    self.calls += 1
    if self.calls > self.lives:
      raise ConnectionError("killed")
    return [Completion(text="r</think>p" if thinking else "s", usage=Usage(1, 2, 0.0, 1))]


def graded_by(scores):
  """A grader that gives the scores in turn."""
  remaining = iter(scores)

  async def grade(problem, proof):
    return Grade(next(remaining), "scripted")

  return grade


def run(config, folder, chat, monkeypatch, scores=None):
  monkeypatch.setattr(evaluate, "open_chat", lambda _: chat)
  monkeypatch.setattr(
    evaluate.jobs, "grader", lambda *_: graded_by(scores if scores is not None else [7] * 1000)
  )
  evaluate.main(config, str(folder))
  return json.loads((folder / evaluate.SUMMARY).read_text())["rows"][0]


def test_every_turn_of_every_problem_is_a_row(config, tmp_path, monkeypatch):
  summary = run(config, tmp_path, Scripted(), monkeypatch)
  rows = [json.loads(line) for line in (tmp_path / evaluate.ROWS).read_text().splitlines()]
  assert len(rows) == 6 * 2 and len({(r["problem_id"], r["turn"]) for r in rows}) == 12
  assert [p["score"] for p in summary["by_turn"]] == [7.0, 7.0]
  assert summary["n"] == 6 and summary["missing"] == 0 and summary["invalid"] == 0
  assert sum(p["n"] for p in summary["by_length"]) == 6


def test_finished_rows_are_not_asked_for_again(config, tmp_path, monkeypatch):
  """Killed in the second block: the first is on disk, and the rerun asks for the rest only."""
  with pytest.raises(ConnectionError):
    run(config, tmp_path, Scripted(lives=14), monkeypatch)
  with (tmp_path / evaluate.ROWS).open("a") as file:
    file.write('{"problem_id": "torn')
  chat = Scripted()
  summary = run(config, tmp_path, chat, monkeypatch)
  assert chat.calls == 2 * (2 + 1)  # two problems: two turns and one summary each
  assert summary["n"] == 6 and summary["missing"] == 0
  again = Scripted()
  run(config, tmp_path, again, monkeypatch)
  assert again.calls == 0


def test_a_missing_grade_is_counted_and_left_out(config, tmp_path, monkeypatch):
  """None of twelve grades is a zero: the mean is over those that are there."""
  summary = run(config, tmp_path, Scripted(), monkeypatch, scores=[None, 6] * 6)
  assert summary["invalid"] == 6
  assert {p["score"] for p in summary["by_turn"]} <= {6.0, None}
  assert summary["by_turn"][0]["n"] + summary["by_turn"][1]["n"] == 6


def test_nothing_graded_is_said_not_invented(config, tmp_path, monkeypatch):
  summary = run(config, tmp_path, Scripted(), monkeypatch, scores=[None] * 12)
  assert summary["score"] is None and summary["invalid"] == 12
  assert "no grade" in evaluate.table(summary)


def test_samples_of_a_problem_are_averaged_before_the_interval(config):
  """Two samples a problem are not twice as many independent values."""
  rows = [
    {"problem_id": str(i), "sample": s, "turn": 1, "level": "2", "score": 7 * (i % 2),
     "finish_reason": "stop", "tokens": 1, "summary_tokens": 0}
    for i in range(20) for s in range(4)
  ]  # fmt: skip
  one = evaluate.summarise_rows(config, [r for r in rows if r["sample"] == 0], 20)
  four = evaluate.summarise_rows(config, rows, 80)
  assert (one["low"], one["high"], one["n"]) == (four["low"], four["high"], four["n"])


def test_a_policy_must_be_named(config):
  with pytest.raises(ValueError, match=r"config\.policy is empty"):
    evaluate.open_chat(config)


def test_the_interval_covers_the_mean_as_often_as_it_says():
  """Of 300 draws of 60 values the 95 % interval holds the true mean in 88 to 99 %."""
  rng = np.random.default_rng(0)
  held = 0
  for seed in range(300):
    _, low, high = intervals.bootstrap(rng.choice([0, 3, 7], size=60, p=[0.3, 0.3, 0.4]), seed)
    held += low <= 3.7 <= high
  assert 0.88 < held / 300 < 0.99


def test_the_interval_of_equal_values_is_a_point_and_of_none_an_error():
  assert intervals.bootstrap([4.0] * 9) == (4.0, 4.0, 4.0)
  with pytest.raises(ValueError, match="no values"):
    intervals.bootstrap([])
