"""metrics.jsonl is always valid and never repeats a step; progress and rates are right."""

import io
import json
import math
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from qed_jax import metrics


def read(path):
  """Rows of a JSONL file, by a parser that takes no NaN."""

  def refuse(constant):
    raise ValueError(f"{constant} is not JSON")

  return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def events(folder):
  """(step, tag, value) of the scalars in TensorBoard's files, and the steps purged from."""
  scalars, purges = [], []
  for file in sorted(folder.iterdir()):
    data = file.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      if event.HasField("session_log"):
        purges.append(event.step)
      scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
  return scalars, purges


def test_rows_and_events(tmp_path):
  """Python, numpy and jax scalars go to metrics.jsonl and TensorBoard; text to the former only."""
  writer = metrics.MetricWriter(tmp_path, 0)
  writer.write(1, {"loss": jnp.float32(0.5), "steps": np.int64(3), "reward/mean": 2, "note": "é"})
  assert read(tmp_path / "metrics.jsonl") == [  # before close: a kill loses nothing
    {"step": 1, "loss": 0.5, "steps": 3, "reward/mean": 2, "note": "é"}
  ]
  writer.write(jnp.int32(2), {"loss": jnp.bfloat16(0.25)})
  writer.close()
  assert read(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": 0.25}
  scalars, _ = events(tmp_path / "tb")
  assert scalars == [(1, "loss", 0.5), (1, "steps", 3), (1, "reward/mean", 2), (2, "loss", 0.25)]


def test_non_finite_values_are_null_and_named(tmp_path):
  """NaN and infinity, at any depth, leave valid JSON that still says what they were."""
  writer = metrics.MetricWriter(tmp_path, 0)
  writer.write(1, {"loss": jnp.nan, "kl": np.float32(-np.inf), "fine": 1.5})
  writer.close()
  rows = metrics.JsonLines(tmp_path / "rows.jsonl", 0)
  rows.write({"step": 1, "turns": [{"score": math.inf}, {"score": 7}], "none": None})
  rows.close()
  assert read(tmp_path / "metrics.jsonl") == [
    {"step": 1, "loss": None, "kl": None, "fine": 1.5, "not_finite": {"loss": "nan", "kl": "-inf"}}
  ]
  assert read(tmp_path / "rows.jsonl") == [
    {
      "step": 1,
      "turns": [{"score": None}, {"score": 7}],
      "none": None,
      "not_finite": {"turns.0.score": "inf"},
    }
  ]


def test_only_scalars(tmp_path):
  """An array is refused with its name, before anything is written."""
  rows = metrics.JsonLines(tmp_path / "rows.jsonl", 0)
  with pytest.raises(ValueError, match=r"metric logits has shape \(2,\)"):
    rows.write({"step": 1, "logits": jnp.zeros(2)})
  assert read(tmp_path / "rows.jsonl") == []


def test_resume_repeats_no_step(tmp_path):
  """After a kill at step 7 and a resume from 5, steps 6 and 7 are there once, from the rerun."""
  first = metrics.MetricWriter(tmp_path, 0)
  for step in range(1, 8):
    first.write(step, {"loss": step})
  first.close()
  path = tmp_path / "metrics.jsonl"
  with path.open("a") as file:
    file.write('{"step": 3, "loss"')  # cut by the kill
  second = metrics.MetricWriter(tmp_path, 5)
  assert [row["step"] for row in read(path)] == [1, 2, 3, 4, 5]
  for step in range(6, 9):
    second.write(step, {"loss": -step})
  second.close()
  assert [(row["step"], row["loss"]) for row in read(path)] == [
    *((s, s) for s in range(1, 6)),
    *((s, -s) for s in range(6, 9)),
  ]
  _, purges = events(tmp_path / "tb")
  assert purges == [1, 6]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tb"]


def test_cut_last_row_is_dropped_although_its_step_counts(tmp_path):
  """A row without its newline was cut, even where what is left parses."""
  path = tmp_path / "rows.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}')
  rows = metrics.JsonLines(path, 9)
  rows.write({"step": 3})
  rows.close()
  assert [row["step"] for row in read(path)] == [1, 3]


def test_remote_file_is_written_whole(tmp_path, monkeypatch):
  """Where nothing can be appended (gs://), the file is rewritten, and resumes like a local one."""
  real = metrics.epath.Path
  monkeypatch.setattr(
    metrics.epath, "Path", lambda p: real(str(p).replace("gs://bucket", str(tmp_path)))
  )
  for from_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
    rows = metrics.JsonLines("gs://bucket/run/rows.jsonl", from_step)
    for step in steps:
      rows.write({"step": step, "from": from_step})
    rows.close()
  assert [(r["step"], r["from"]) for r in read(tmp_path / "run" / "rows.jsonl")] == [
    (1, 0),
    (2, 0),
    (3, 2),
    (4, 2),
  ]


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 1153.5e12),
    ("NVIDIA H100 80GB HBM3", 989.4e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989.4e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("cpu", None),
  ],
)
def test_mfu(kind, peak):
  """Work of two seconds at half the peak of four devices is an MFU of a half; none on the CPU."""
  value = metrics.mfu((peak or 1.0) * 4, 2.0, kind, 4)
  assert value == (None if peak is None else pytest.approx(0.5))


def test_progress_prints_plain_lines_when_not_a_terminal(capsys, monkeypatch):
  """One line every few seconds, the first and the last step always, with rates and an ETA."""
  now = [100.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  progress = metrics.Progress("sft", 10, 20)
  for step in range(11, 21):
    progress.update(step, {"loss": 0.123456, "tokens_per_s/train": 5321.4, "other": "x"})
    now[0] += 2.0
  progress.close()
  lines = capsys.readouterr().out.splitlines()
  assert lines == [
    f"sft  step {step}/20  loss 0.1235  trained 5,321 tok/s  eta {eta}"
    for step, eta in ((11, "?"), (14, "0:00:12"), (17, "0:00:06"), (20, "0:00:00"))
  ]


def test_progress_is_live_on_a_terminal(monkeypatch):
  """On a terminal a bar is redrawn in place, starting from the restored step."""

  class Terminal(io.StringIO):
    def isatty(self):
      return True

  terminal = Terminal()
  monkeypatch.setattr(sys, "stdout", terminal)
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.setenv("COLUMNS", "120")
  progress = metrics.Progress("rl", 4, 9)
  progress.update(5, {"reward": np.float32(0.25)})
  progress.update(9, {"reward": np.float32(0.5)})
  progress.close()
  shown = terminal.getvalue()
  assert "9/9" in shown and "reward 0.500" in shown and "\x1b[" in shown
