"""What steps measured is written in order, a step late where the device can go on meanwhile."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sft
from qed_jax import optim, sharding, train
from qed_jax.model import presets
from qed_jax.records import Batch
from qed_jax.rollout import step_log
from qed_jax.tracing import Trace

MODEL = presets.from_preset("tiny", dtype="float32", remat="none", attention="xla")
PARTS = ("embed", "attention", "mlp", "head", "optimizer")


def small_config(steps=6):
  config = sft.get_config("tiny")
  config.steps, config.log.every = steps, 1
  return config


def one_step(number, skipped=0.0):
  tokens_BT = np.ones((2, 8), np.int32)
  batch = Batch(tokens_BT, np.tile(np.arange(8, dtype=np.int32), (2, 1)), tokens_BT, tokens_BT)
  measured = {"loss": jnp.float32(number), "skipped": jnp.float32(skipped)}
  return step_log.Step(number, batch, {"seconds/data": 0.0}, [], measured, 0.0)


def written(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_rows_come_in_order_and_so_many_steps_late(tmp_path, lag):
  """With lag n the row of a step is written when n later ones are dispatched; settle writes all."""
  log = step_log.StepLog(tmp_path, small_config(), MODEL, 0, lag)
  for number in range(5):
    log.add(one_step(number))
    assert [row["loss"] for row in written(tmp_path)] == list(range(max(0, number + 1 - lag)))
  log.settle()
  log.close()
  rows = written(tmp_path)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
  assert all(row["seconds/train"] >= 0 and row["tokens_per_s/train"] > 0 for row in rows)


def test_the_device_is_waited_for_only_when_a_row_is_written(tmp_path, monkeypatch):
  """Dispatching the next step reads nothing of the one before it but what is `lag` behind."""
  read = []
  real = step_log.finalise
  monkeypatch.setattr(
    step_log, "finalise", lambda measured: read.append(float(measured["loss"])) or real(measured)
  )
  log = step_log.StepLog(tmp_path, small_config(), MODEL, 0, 1)
  log.add(one_step(0))
  assert read == []
  log.add(one_step(1))
  assert read == [0.0]
  log.settle()
  log.close()
  assert read == [0.0, 1.0]


def test_bad_steps_in_a_row_stop_the_run_with_their_batch(tmp_path):
  """The batch that is saved is that of the step whose metrics were bad, not of the one after."""
  config = small_config()
  config.max_skipped_steps = 2
  log = step_log.StepLog(tmp_path, config, MODEL, 0, 1)
  log.add(one_step(0, skipped=1.0))
  log.add(one_step(1, skipped=1.0))
  with pytest.raises(ValueError, match=r"2 steps in a row \(step 1\)"):
    log.add(one_step(2))
  assert np.load(tmp_path / "not_finite_1.npz")["tokens_BT"].shape == (2, 8)


def test_the_parts_of_the_step_have_names_in_the_program():
  """A profile shows embedding, attention, MLP, head and optimizer, forward and backward."""
  config = small_config(steps=100)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  optimizer = optim.make_optimizer(**train.optimizer_arguments(config))
  state = train.abstract_state(MODEL, optimizer, mesh, "float32")
  row = jax.ShapeDtypeStruct((2, 64), jnp.int32)
  batch = Batch(row, row, row, jax.ShapeDtypeStruct((2, 64), jnp.float32))
  lowered = jax.jit(train.make_update(config, MODEL, optimizer)).lower(state, batch)
  text = lowered.as_text(debug_info=True)
  for part in PARTS:
    assert f"/{part}/" in text or f"({part})/" in text, part


def test_a_trace_of_some_steps_is_written(tmp_path):
  """It starts before the first step, ends before the one behind the last, and is on disk."""
  trace = Trace(tmp_path / "profile", (1, 3))
  ended = []
  for step in range(5):
    if trace.before(step):
      trace.stop()
      ended.append(step)
    jax.block_until_ready(jnp.ones(4) + step)
  assert ended == [3]
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_that_ends_early_keeps_its_trace(tmp_path):
  trace = Trace(tmp_path, (0, 100))
  assert not trace.before(7)  # resumed in the middle
  trace.stop()
  trace.stop()
  assert list(tmp_path.rglob("*.xplane.pb"))


def test_without_steps_there_is_no_trace(tmp_path):
  trace = Trace(tmp_path / "profile", ())
  assert not any(trace.before(step) for step in range(3))
  trace.stop()
  assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", [(3,), (3, 3), (5, 2), (-1, 2), (1.5, 3), (1, 2, 3)])
def test_impossible_traces_are_one_line(steps, tmp_path):
  with pytest.raises(ValueError, match=r"config\.profile\.steps is .*: give") as error:
    Trace(tmp_path, steps)
  assert "\n" not in str(error.value)
