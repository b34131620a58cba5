"""tools/bench_engine.py: its mixes, and the batches that its workers make of them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def bench(monkeypatch):
  monkeypatch.syspath_prepend(str(TOOLS))
  import bench_engine

  return bench_engine


def test_mixes_are_what_the_docstring_says(bench):
  requests = bench.make_requests(seed=0, count=64)
  lengths = {name: np.array([[len(p), n] for p, n in rows]) for name, rows in requests.items()}
  assert lengths["sample"].tolist() == [[64, 64]] * 8
  assert lengths["ragged"].shape == (64, 2)
  assert lengths["ragged"].min() >= 8 and lengths["ragged"].max() <= 64
  by_batch = lengths["straggler"][:, 1].reshape(8, 8)
  assert np.sort(by_batch, axis=1).tolist() == [[16] * 7 + [160]] * 8
  assert len(set(by_batch.argmax(axis=1))) > 1
  assert len({tuple(p) for p, _ in requests["shared"]}) == 1
  assert len({tuple(p[:16]) for p, _ in requests["copies"]}) == 16
  assert requests == bench.make_requests(seed=0, count=64)


def test_batches_are_formed_in_the_order_of_arrival(bench):
  from engine_workers import in_batches

  requests = bench.make_requests(seed=0, count=16)
  batches = in_batches(requests["ragged"])
  assert [len(batch) for batch in batches] == [8, 8]
  assert sum(batches, []) == requests["ragged"]
  assert [len(batch) for batch in in_batches(requests["shared"])] == [16]


def test_work_that_cannot_be_cut_into_batches_is_refused():
  command = [sys.executable, str(TOOLS / "bench_engine.py"), "--requests=9"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2
  assert "--requests=9: must be a multiple of 8" in done.stderr
