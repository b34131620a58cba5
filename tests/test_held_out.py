"""Evaluation during training: it changes nothing, stops nothing, and resumes."""

import asyncio
import os
import signal
import types

import jax
import pytest
from test_train import assert_bitwise, rows_of, small, weights

from configs import rl, sft
from qed_jax import sharding, train
from qed_jax.evaluation import held_out
from qed_jax.records import Completion, Grade, Usage


def evaluated(config, interval=2, problems=4):
  config.eval.interval = interval
  config.eval.data.problems = problems
  config.eval.rollout.update(slots=8, lanes=1, prefill_rows=8, max_length=128, chunk=8)
  config.eval.scaffold.reason.max_tokens = 12
  return config


class Chat:
  """In place of an engine and its chat; `events` are called with the number of the call."""

  def __init__(self, event=lambda number: None):
    self.calls, self.event = 0, event

  async def chat(self, messages, *, n, seed, **sampling):
    self.calls += 1
    self.event(self.calls)
    await asyncio.sleep(0.001)
    return [Completion("r</think>b 5", usage=Usage(3, 4, 0.1, 1))]


@pytest.fixture
def scripted(tmp_path, monkeypatch):
  """make(first=, event=, stopped=) -> (HeldOut, its Chat, rows of metrics as they come, a log)."""

  def make(first=0, event=lambda number: None, stopped=lambda: False, **changes):
    config = evaluated(sft.get_config("tiny"))
    config.eval.problems_at_once = 1
    config.eval.update(changes)
    chat = Chat(event)
    monkeypatch.setattr(held_out, "EngineChat", lambda *_: chat)
    engine = types.SimpleNamespace(set_params=lambda params, version: None)
    monkeypatch.setattr(held_out.jobs, "make_engine", lambda *_: engine)
    part = held_out.HeldOut(config, None, None, None, tmp_path, first, stopped)
    written = []
    writer = types.SimpleNamespace(write=lambda step, values: written.append((step, values)))
    log = types.SimpleNamespace(settle=lambda: None, writer=writer)
    return part, chat, written, log

  return make


def test_it_is_due_every_so_many_steps_and_never_at_zero(scripted):
  part, *_ = scripted()
  assert [step for step in range(7) if part.due(step)] == [0, 2, 4, 6]
  part, *_ = scripted(interval=0)
  assert not any(part.due(step) for step in range(7))


def test_a_row_of_metrics_and_rows_of_proofs(scripted, tmp_path):
  part, chat, written, log = scripted()
  for step in range(3):
    part.evaluate(step, None, log)
  assert [step for step, _ in written] == [0, 2] and chat.calls == 8
  values = written[-1][1]
  assert values["eval/n"] == 4 and values["eval/invalid"] == values["eval/missing"] == 0
  assert 0 <= values["eval/score"] <= 7 and values["eval/failures"] == 0
  assert all(isinstance(v, int | float) for v in values.values())
  rows = [r for r in rows_of(tmp_path / "held_out", "rows.jsonl") if "problem_id" in r]
  assert [r["step"] for r in rows] == [0] * 4 + [2] * 4
  assert {(r["scaffold"], r["model"], r["judge"]) for r in rows[4:]} == {
    ("direct", "step 2", "exact")}  # fmt: skip


@pytest.mark.parametrize("where", ["judge", "data", "chat"])
def test_a_failure_is_one_line_and_a_count(where, scripted, tmp_path, monkeypatch, capsys):
  """No judge, no data, a bug: training hears nothing of it but eval/failures; then it mends."""
  if where == "judge":
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

  def broken(number):
    raise RuntimeError("two\nlines")

  part, _, written, log = scripted(event=broken if where == "chat" else lambda number: None)
  block = part.config.eval
  kept = (block.judge.reward, block.data.source)
  if where == "judge":
    block.judge.reward = "rubric"
  elif where == "data":
    block.data.source = str(tmp_path / "nowhere.jsonl")
  part.evaluate(0, None, log)
  part.evaluate(2, None, log)
  assert [v["eval/failures"] for _, v in written] == [1, 2]
  assert all(v.keys() == {"eval/failures", "eval/seconds"} for _, v in written)
  out = capsys.readouterr().out.splitlines()
  assert len(out) == 2 and out[1].startswith("evaluation at step 2 failed, training goes on: ")
  if where != "chat":
    block.judge.reward, block.data.source = kept
    part.evaluate(4, None, log)
    assert written[-1][1]["eval/n"] == 4 and written[-1][1]["eval/failures"] == 2


def test_a_judge_that_is_away_leaves_proofs_invalid(scripted, monkeypatch):
  async def away(problem, proof):
    return Grade(None, "failed: HTTP 503")

  monkeypatch.setattr(held_out.jobs, "grader", lambda *_: away)
  part, _, written, log = scripted()
  part.evaluate(0, None, log)
  [(_, values)] = written
  assert values["eval/invalid"] == 4 and "eval/score" not in values


def test_a_stop_in_the_middle_is_finished_by_the_next_run(scripted, tmp_path):
  """SIGTERM after two of four: no metrics; the resumed run asks for the other two, once."""
  part, chat, written, log = scripted()
  stop = []
  part.stopped = lambda: bool(stop)
  chat.event = lambda number: stop.append(1) if number == 3 else None
  slow = asyncio.sleep

  async def wait(*_):
    await slow(0.01 if chat.calls < 3 else 3600)

  chat.chat = wrapped(chat.chat, wait)
  assert part.evaluate(0, None, log) is False
  assert written == [] and chat.calls == 3
  part.close()
  again, chat, written, log = scripted()
  assert again.due(0)
  again.evaluate(0, None, log)
  assert chat.calls == 2 and written[0][1]["eval/n"] == 4
  again.close()
  third, chat, written, log = scripted()
  assert not third.due(0) and third.due(2)
  assert third.evaluate(0, None, log) is True
  assert chat.calls == 0 and written == []


def wrapped(chat, wait):
  async def call(*arguments, **options):
    answer = await chat(*arguments, **options)
    await wait()
    return answer

  return call


def test_rows_after_the_step_of_the_resume_are_dropped(scripted, tmp_path):
  part, _, _, log = scripted()
  for step in (0, 2, 4):
    part.evaluate(step, None, log)
  part.close()
  again, chat, written, log = scripted(first=2)
  assert not again.due(2) and again.due(4)
  again.evaluate(4, None, log)
  again.close()
  assert chat.calls == 4
  steps = [r["step"] for r in rows_of(tmp_path / "held_out", "rows.jsonl")]
  assert steps == [0] * 5 + [2] * 5 + [4] * 5  # four proofs, and the line that says it is whole


@pytest.fixture
def one_device(monkeypatch):
  """Training and sampling on one device: an engine on eight has eight times as many programs."""
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  monkeypatch.setattr(train.jobs, "meshes", lambda config: (mesh, mesh))


@pytest.mark.slow
def test_the_weights_are_those_of_a_run_without_it(one_device, tmp_path):
  """SFT, its engine for real: bit for bit; metrics have their row, and a resume adds none."""
  train.main(small(sft.get_config("tiny"), 2), str(tmp_path / "without"))
  train.main(evaluated(small(sft.get_config("tiny"), 2)), str(tmp_path / "with"))
  assert_bitwise(weights(tmp_path / "without"), weights(tmp_path / "with"))
  rows = rows_of(tmp_path / "with")
  assert [r["step"] for r in rows if "eval/n" in r] == [0, 2]
  assert all(r["eval/n"] == 4 and r["eval/failures"] == 0 for r in rows if "eval/n" in r)
  trained = [r for r in rows if "loss" in r]
  plain = rows_of(tmp_path / "without")
  assert [r["loss"] for r in trained] == [r["loss"] for r in plain]
  train.main(evaluated(small(sft.get_config("tiny"), 2)), str(tmp_path / "with"))
  assert rows_of(tmp_path / "with") == rows


@pytest.mark.slow
def test_rl_with_it_has_the_same_weights_and_sigterm_in_it_saves(one_device, tmp_path, monkeypatch):
  """SIGTERM comes while the second evaluation samples: the run ends in order with its step saved;
  run again, it finishes that evaluation and ends at the weights of a run that never evaluated."""

  def config():
    c = small(rl.get_config("tiny"), 3)
    c.objective.drop_dead_groups = False
    c.init, c.checkpoint.every = "", 10
    return c

  train.main(config(), str(tmp_path / "without"))
  make, seen = held_out.jobs.grader, []

  def grader(judge, root):
    grade = make(judge, root)

    async def then_a_signal(problem, proof):
      if root.name == held_out.FOLDER:
        seen.append(problem.id)
        if len(seen) == 6:
          os.kill(os.getpid(), signal.SIGTERM)
          await asyncio.sleep(3600)
      return await grade(problem, proof)

    return then_a_signal

  monkeypatch.setattr(held_out.jobs, "grader", grader)
  old = signal.getsignal(signal.SIGTERM)
  try:
    train.main(evaluated(config()), str(tmp_path / "with"))
    assert [r["step"] for r in rows_of(tmp_path / "with") if "eval/n" in r] == [0]
    assert [r["step"] for r in rows_of(tmp_path / "with") if "loss" in r] == [1, 2]
    train.main(evaluated(config()), str(tmp_path / "with"))
  finally:
    signal.signal(signal.SIGTERM, old)
  assert [r["step"] for r in rows_of(tmp_path / "with") if "eval/n" in r] == [0, 2]
  assert [r["step"] for r in rows_of(tmp_path / "with") if "loss" in r] == [1, 2, 3]
  rows = [r for r in rows_of(tmp_path / "with" / "held_out", "rows.jsonl") if "problem_id" in r]
  assert len({(r["step"], r["problem_id"]) for r in rows}) == len(rows) == 8
  assert_bitwise(weights(tmp_path / "without"), weights(tmp_path / "with"))
