"""Many hosts: who joins whom, whose problems, the same step as on one, and how such a run ends."""

import collections
import copy
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_experience import TEMPLATES, FakeChat, grade

from configs import cache_rl, rl, sft
from qed_jax import checkpoint, hosts, sharding, workdir
from qed_jax.records import Problem
from qed_jax.rollout import experience, jobs, judging
from qed_jax.rollout.streaming import Window, share, together

ROOT = Path(__file__).parents[1]
NOTHING = {"coordinator": None, "processes": None, "process_id": None}

# --- joining


JOINED = {"coordinator_address": "a:1234", "num_processes": 2, "process_id": 1}
TPU_AT = {"coordinator_address": "a:1"}
BY_FLAGS = {"coordinator": "a:1234", "processes": 2, "process_id": 1}
BY_JAX = {"JAX_COORDINATOR_ADDRESS": "a:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]"}
SLURM |= {"SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}


@pytest.mark.parametrize(
  ("environ", "flags", "expected"),
  [
    ({}, {}, None),
    ({}, BY_FLAGS, JOINED),
    (BY_JAX, {}, JOINED),
    (BY_JAX, BY_FLAGS, JOINED),
    (BY_JAX, {"process_id": 1}, JOINED),
    ({"JAX_COORDINATOR_ADDRESS": "a:1234"}, {"processes": 2, "process_id": 1}, JOINED),
    (SLURM, {}, {"local_device_ids": [0, 1, 2, 3]}),
    (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, {}, {}),
    (SLURM, {"coordinator": "a:1234"}, JOINED | {"local_device_ids": [0, 1, 2, 3]}),
    (SLURM, {"processes": 1}, None),
    ({"SLURM_NTASKS": "1"}, {}, None),
    ({"TPU_WORKER_HOSTNAMES": "h0,h1,h2,h3"}, {}, {}),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_COORDINATOR_ADDRESS": "a:1"}, {}, TPU_AT),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "h0", "TPU_WORKER_HOSTNAMES": "h0"}, {}, {}),
  ],
)
def test_hosts_are_found_by_flags_variables_slurm_or_the_tpu(environ, flags, expected):
  """{} leaves it to jax's own look at Slurm or the TPU's metadata; None is a run on one host."""
  assert hosts.settings(environ, NOTHING | flags) == expected


@pytest.mark.parametrize(
  ("environ", "flags", "said"),
  [
    (BY_JAX, {"processes": 4}, "--processes is 4 and JAX_NUM_PROCESSES is 2"),
    (BY_JAX, {"coordinator": "b:1"}, "--coordinator is b:1 and JAX_COORDINATOR_ADDRESS is a:1234"),
    (SLURM, BY_FLAGS | {"processes": 3}, "--processes is 3 and SLURM_NTASKS is 2"),
    (SLURM, BY_FLAGS | {"process_id": 0}, "--process_id is 0 and SLURM_PROCID is 1"),
    ({}, {"coordinator": "a:1"}, "--coordinator without the rest: give --processes"),
    ({}, {"processes": 4}, "give --coordinator (or JAX_COORDINATOR_ADDRESS)"),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {}, "give --processes (or JAX_NUM_PROCESSES) and"),
    ({"JAX_NUM_PROCESSES": "two"}, {}, "JAX_NUM_PROCESSES is 'two': give a whole number"),
    ({}, BY_FLAGS | {"process_id": 2}, "process_id is 2 of 2 processes: they count from 0"),
    ({}, BY_FLAGS | {"coordinator": "a"}, "'a': give HOST:PORT"),
    ({"SLURM_NTASKS": "8"}, {}, "start the command with srun"),
  ],
)
def test_sources_that_disagree_or_say_half_are_one_line(environ, flags, said):
  with pytest.raises(ValueError) as error:
    hosts.settings(environ, NOTHING | flags)
  assert said in str(error.value) and "\n" not in str(error.value)


def test_a_port_that_is_taken_is_one_line():
  """jax itself would crash on it."""
  with socket.socket() as taken:
    taken.bind(("", 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f"port {port} of .*in use; give a free one"):
      hosts.join({"coordinator": f"127.0.0.1:{port}", "processes": 2, "process_id": 0}, 100)


# --- devices


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a mesh asks of a TPU device."""

  id: int
  process_index: int
  slice_index: int
  coords: tuple
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"
  core_on_chip: int = 0


def chips(slices: int) -> list[Chip]:
  """Slices of 2 x 4 chips, hosts of 2 x 2."""
  return [
    Chip(8 * s + 2 * y + x, 2 * s + y // 2, s, (x, y, 0))
    for s in range(slices)
    for y in range(4)
    for x in range(2)
  ]


def test_data_alone_crosses_slices():
  """Each index of `data` is one slice; everything else of the mesh stays inside."""
  mesh = sharding.make_mesh(2, -1, 2, chips(2), sequence=2)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 2}
  assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
  both = sharding.make_mesh(4, -1, 1, chips(2))
  assert [{d.slice_index for d in part.flat} for part in both.devices] == [{0}, {0}, {1}, {1}]


def test_a_mesh_that_would_lay_weights_across_slices_is_refused():
  with pytest.raises(ValueError, match=r"mesh\.data is 1 and this run has 2 slices.*multiple of 2"):
    sharding.make_mesh(1, -1, 1, chips(2))


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_engines_keep_within_a_host_whatever_the_training_mesh(tensor):
  """Also where the mesh to train on lays `tensor` across hosts."""
  training = np.array(chips(2)).reshape(2, 2, 4).transpose(0, 2, 1).ravel()  # chips of two hosts
  mesh = sharding.within_hosts(training, tensor)
  rows = mesh.devices.reshape(-1, tensor)
  assert {len({d.process_index for d in row}) for row in rows} == {1}
  assert {d.id for d in mesh.devices.flat} == set(range(16))


def test_microbatches_have_rows_of_every_host():
  """Two rows at a time of three hosts' four: the rows of each keep their order."""
  x = sharding.put(sharding.make_mesh(1, 1, 1, jax.devices()[:1]), np.arange(12), "B")
  turned = sharding._in_turns(x, 3, 2, x.sharding)
  assert turned.tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]


def test_devices_that_hosts_cannot_share_evenly_are_named():
  with pytest.raises(ValueError, match="tensor is 8 and a host has 4 devices"):
    sharding.within_hosts(chips(1), 8)
  with pytest.raises(ValueError, match=r"different numbers of devices \(\{0: 4, 1: 3\}\)"):
    sharding.by_host(chips(1)[:-1])


def test_numbers_that_hosts_cannot_share_are_named(monkeypatch):
  monkeypatch.setattr(hosts, "count", lambda: 3)
  for config, said in ((sft, r"batch\.rows is 16"), (rl, r"batch\.rows is 16")):
    with pytest.raises(ValueError, match=said + " and 3 hosts"):
      jobs.check_shares(config.get_config("tiny"))
  config = rl.get_config("tiny")
  config.batch.rows = 24
  with pytest.raises(ValueError, match=r"rollout\.problems is 16 and 3 hosts.*multiple of 3"):
    jobs.check_shares(config)


def test_every_host_keeps_the_judges_replies_in_a_file_of_its_own(monkeypatch):
  monkeypatch.setattr(hosts, "index", lambda: 2)
  assert judging.replies_of_this_host("judge.jsonl", Path("/w")) == "/w/judge.host2.jsonl"
  monkeypatch.setattr(hosts, "index", lambda: 0)
  assert judging.replies_of_this_host("judge.jsonl", Path("/w")) == "/w/judge.jsonl"


# --- whose work


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3), st.integers(0, 3), st.sampled_from([1, 2, 3, 4, 6]), st.data())
def test_hosts_together_are_one_window(shares, max_lag, count, data):
  """The same numbers are open and trained each step, also after going on with other hosts."""
  per_step = 12 * shares
  one = Window(per_step, max_lag, "admission")

  def windows(count):
    return [
      Window(per_step // count, max_lag, "admission", host=h, hosts=count) for h in range(count)
    ]

  many = windows(count)
  for step in range(6):
    one.admit(step)
    behind = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    for host, window in enumerate(many):
      if host not in behind:
        window.admit(step)
    assert together([window.state() for window in many]) == one.state()
    if behind or data.draw(st.booleans()):  # stopped, and begun again on other hosts
      state, count = one.state(), data.draw(st.sampled_from([1, 2, 3, 4, 6]))
      many = windows(count)
      for host, window in enumerate(many):
        window.restore(share(state, host, count), step)
        assert window.admit(step) == []
    due = []
    for window in many:
      for number in window.open:
        window.finish(number)
      due += window.due(step)
      window.take(window.due(step))
    for number in one.open:
      one.finish(number)
    assert sorted(due) == one.due(step)
    one.take(one.due(step))
    assert together([window.state() for window in many]) == one.state()


class Threads:
  """Hosts that are threads of this process, meeting as hosts.py has them meet."""

  def __init__(self, monkeypatch, number: int):
    self.number, self.own = number, threading.local()
    self.values, self.barrier = [None] * number, threading.Barrier(number)
    monkeypatch.setattr(hosts, "count", lambda: number)
    monkeypatch.setattr(hosts, "index", lambda: self.own.index)
    monkeypatch.setattr(hosts, "gather", self.gather)

  def gather(self, value, waiting=None):
    self.values[self.own.index] = json.dumps(value)
    self.barrier.wait(60)
    values = list(map(json.loads, self.values))
    self.barrier.wait(60)
    return values

  def run(self, work) -> list:
    """work(host) in each of them -> what they return."""

    def one(index):
      self.own.index = index
      return work(index)

    with ThreadPoolExecutor(self.number) as pool:
      return list(pool.map(one, range(self.number)))


def stream(job="rl", **rollout):
  config = {"rl": rl, "cache_rl": cache_rl}[job].get_config("tiny")
  config.rollout.update(problems=4, attempts=4, **rollout)
  config.batch.update(row_length=64, rows=4)
  config.objective.drop_dead_groups = False
  if job == "cache_rl":
    config.cache.update(turns=2, states=2, summariser="", replay=True, summaries=2)
  engine = types.SimpleNamespace(
    set_params=lambda params, version: None, counters=types.SimpleNamespace(sampled_tokens=0)
  )
  problems = [Problem(id=f"p{i}", statement=f"problem {i}") for i in range(7)]
  made = experience.Experience(
    config, problems, engine, None, None, grade, TEMPLATES, stopped=lambda: False
  )
  made.chat = FakeChat()
  return made


def trained(batches) -> collections.Counter:
  """What is trained, token by token, wherever it lies."""
  counted = collections.Counter()
  for batch in batches:
    fields = ("tokens", "positions", "weight", "advantage", "behavior_logp", "lag")
    at = batch.weight_BT > 0
    columns = [getattr(batch, f"{name}_BT")[at].tolist() for name in fields]
    counted.update(zip(*columns, strict=True))
  return counted


@pytest.mark.parametrize("job", ["rl", "cache_rl"])
@pytest.mark.parametrize("path", [(1, 2), (2, 1), (2, 2), (4, 2)], ids=str)
def test_any_hosts_train_what_one_trains_and_resume_on_others(job, path, monkeypatch):
  """Same problems, tokens, weights and metrics; the state of one layout is that of another."""
  one = stream(job, max_lag=1)
  expected = [(*one.next(None, step)[:2], one.state()) for step in range(3)]
  state = None
  for step, number in ((0, path[0]), (1, path[1]), (2, path[1])):
    if step < 2:
      with monkeypatch.context() as patch:
        threads = Threads(patch, number)
        many = threads.run(lambda host: stream(job, max_lag=1))
        if state is not None:
          threads.run(lambda host: many[host].restore(copy.deepcopy(state)))  # noqa: B023
    with monkeypatch.context() as patch:
      threads = Threads(patch, number)
      found = threads.run(lambda host: many[host].next(None, step))  # noqa: B023
      states = threads.run(lambda host: many[host].state())  # noqa: B023
    batch, metrics, state = expected[step]
    assert trained(b for b, _, _ in found) == trained([batch])
    assert len({b.tokens_BT.shape for b, _, _ in found}) == 1
    assert all(theirs == state for theirs in states)
    untimed = [name for name in metrics if "seconds" not in name and "_per_s" not in name]
    for _, theirs, _ in found:
      for name in set(untimed) - {"packing_efficiency"}:
        assert theirs[name] == pytest.approx(metrics[name], rel=1e-6), name


def test_one_host_that_stops_stops_all_at_the_same_step(monkeypatch):
  """Whoever was ready gives up the step too; nothing of it is lost."""
  threads = Threads(monkeypatch, 2)
  many = threads.run(lambda host: stream("cache_rl"))
  assert all(threads.run(lambda host: many[host].next(None, 0)))
  before = threads.run(lambda host: many[host].state())

  async def never(*args, **kwargs):
    await experience.asyncio.sleep(60)

  many[1].chat, many[1].stopped = never, lambda: True
  assert threads.run(lambda host: many[host].next(None, 1)) == [None, None]
  after = threads.run(lambda host: many[host].state())
  assert after[0] == after[1]
  assert after[0]["buffer"] == before[0]["buffer"]
  assert after[0]["window"] == {"next": 8, "open": [4, 5, 6, 7]}


def test_a_host_without_anything_to_train_has_empty_rows(monkeypatch):
  """All of its rollouts went ungraded: the step is the other host's, and still everybody's."""
  threads = Threads(monkeypatch, 2)
  many = threads.run(lambda host: stream())

  async def outage(problem, proof):
    return dataclasses.replace(await grade(problem, "0"), score=None, reason="outage")

  many[1].grade = outage
  (batch, metrics, _), (empty, same, _) = threads.run(lambda host: many[host].next(None, 0))
  assert batch.tokens_BT.shape == empty.tokens_BT.shape
  assert batch.segments_BT.any() and not empty.segments_BT.any()
  untimed = {name for name in metrics if "s/" not in name}
  assert {n: metrics[n] for n in untimed} == {n: same[n] for n in untimed}
  many[0].grade = outage
  with pytest.raises(ValueError, match="none of 16 rollouts could be graded"):
    threads.run(lambda host: many[host].next(None, 1))


def test_sft_rows_of_the_hosts_are_those_of_one(monkeypatch):
  """Batch for batch, whatever the number of hosts; the position in the data is the same."""
  config = sft.get_config("tiny")
  config.batch.update(rows=4, row_length=96)
  config.data.size, config.data.read_threads = 16, 0
  rows = jobs.data(config)

  class Words:
    """Tokens enough for packing to have something to do."""

    def example(self, messages):
      text = np.frombuffer(messages[-1]["content"].encode()[:60], np.uint8).astype(np.int32)
      return text, np.arange(len(text)) > 3

  one = jobs.Rows(config, Words(), rows, lambda: False)
  threads = Threads(monkeypatch, 2)
  many = threads.run(lambda host: jobs.Rows(config, Words(), rows, lambda: False))
  for step in range(2):
    threads.own.index = 0
    batch = next(one.iterator)
    found = threads.run(lambda host: many[host].next(None, step)[0])  # noqa: B023
    np.testing.assert_array_equal(np.concatenate([b.tokens_BT for b in found]), batch.tokens_BT)
    np.testing.assert_array_equal(np.concatenate([b.weight_BT for b in found]), batch.weight_BT)
  assert threads.run(lambda host: many[host].state()) == [one.state()] * 2


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"config": {"optimizer": {"lr": 2.0}}}, "optimizer.lr is 1.0 on host 0 and 2.0 on host 1"),
    ({"commit": "abc+"}, "git commit is abc on host 0 and abc+ on host 1: check out the same"),
    ({"version": "0.11"}, "flax is 0.10 on host 0 and 0.11 on host 1: install the same versions"),
    ({"folder": "/other"}, "--workdir is /w on host 0 and /other on host 1"),
  ],
)
def test_hosts_that_disagree_are_one_line_on_all(change, said, monkeypatch):
  threads = Threads(monkeypatch, 2)
  what = {"config": {"optimizer": {"lr": 1.0}}, "commit": "abc", "version": "0.10", "folder": "/w"}
  mine = lambda: what | (change if threads.own.index else {})  # noqa: E731
  monkeypatch.setattr(workdir, "_git_commit", lambda: mine()["commit"])
  monkeypatch.setattr(workdir, "_version", lambda package: mine()["version"])

  def check(host):
    with pytest.raises(ValueError) as error:
      workdir.check_same_on_hosts(mine()["folder"], mine()["config"])
    return str(error.value)

  lines = threads.run(check)
  assert lines[0] == lines[1] and said in lines[0]


# --- processes

OVERRIDES = [
  "--config.optimizer.warmup_steps=1", "--config.optimizer.lr=3e-3", "--config.log.every=1",
  "--config.checkpoint.every=2", "--config.checkpoint.keep=9", "--config.data.size=64",
  "--config.batch.rows=8", "--config.steps=8",
]  # fmt: skip
ROLLOUTS = [
  "--config.rollout.problems=2", "--config.rollout.attempts=4", "--config.rollout.slots=16",
  "--config.rollout.lanes=1", "--config.rollout.prefill_rows=8", "--config.rollout.max_tokens=12",
  "--config.rollout.chunk=8", "--config.cache.turns=2", "--config.cache.states=2",
  "--config.cache.max_tokens=6", "--config.cache.replay=True", "--config.cache.summariser=",
  "--config.objective.drop_dead_groups=False", "--config.objective.entropy_coef=0.1",
]  # fmt: skip


def command(job: str, folder, *flags: str) -> list[str]:
  more = ROLLOUTS if job == "cache_rl" else ["--config.batch.row_length=192"]
  config = [f"--config=configs/{job}.py:tiny", f"--workdir={folder}"]
  return [sys.executable, "-m", "qed_jax.train", *config, *OVERRIDES, *more, *flags]


def start(devices: int, arguments: list[str]) -> subprocess.Popen:
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
  }
  return subprocess.Popen(
    arguments, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )


def start_two(job: str, folder, flags=((), ())) -> list[subprocess.Popen]:
  """Two processes of four devices each."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  joined = [f"--coordinator=127.0.0.1:{port}", "--processes=2", "--heartbeat_s=10"]
  return [start(4, command(job, folder, *joined, f"--process_id={i}", *flags[i])) for i in range(2)]


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, list[str]]]:
  """(exit code, output, lines of errors) of each."""
  with ThreadPoolExecutor(len(processes)) as pool:
    said = list(pool.map(lambda process: process.communicate(timeout=400), processes))
  return [
    (process.returncode, out, [x for x in err.splitlines() if x.startswith("error:")] or [err])
    for process, (out, err) in zip(processes, said, strict=True)
  ]


def rows_of(folder: Path) -> list[dict]:
  path = folder / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(folder: Path, step: int, processes: list[subprocess.Popen]) -> None:
  """Until this step is in metrics.jsonl and the checkpoints before it are whole."""
  whole = checkpoint.Checkpoints(folder / "checkpoints", keep=9, create=False)
  before = step - step % 2
  for _ in range(4000):
    rows = rows_of(folder)
    if rows and rows[-1]["step"] >= step and (whole.latest_step() or 0) >= before:
      return
    assert all(process.poll() is None for process in processes), ends(processes)
    time.sleep(0.1)
  raise AssertionError(f"step {step} did not come")


def assert_same_steps(folder: Path, whole: list[dict]) -> None:
  """The curves of a run of one process, to 1e-5, and the very same tokens."""
  rows = rows_of(folder)
  assert [row["step"] for row in rows] == [row["step"] for row in whole]
  for row, expected in zip(rows, whole, strict=True):
    for name in ("loss", "grad_norm", "entropy"):
      assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (row["step"], name)
    for name in ("tokens", "reward", "roll_in_tokens", "length/mean"):
      assert row.get(name) == expected.get(name), (row["step"], name)


def cut_to(folder: Path, step: int, into: Path) -> None:
  """A copy of a run as it was after `step`."""
  shutil.copytree(folder, into)
  for path in (into / "checkpoints").iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  (into / "metrics.jsonl").unlink()


@pytest.mark.slow
def test_two_processes_train_as_one_and_survive(tmp_path):
  """2 x 4 devices have the losses of 1 x 8; one is killed, the other ends with a line, and one
  process goes on; two go on where one was, and stop together when one of them gets SIGTERM."""
  one, two, other = (tmp_path / name for name in ("one", "two", "other"))
  (code, _, errors) = ends([start(8, command("cache_rl", one))])[0]
  assert code == 0, errors
  whole = rows_of(one)
  assert len(whole) == 8 and all(row["grad_norm"] > 0 for row in whole)

  pair = start_two("cache_rl", two)
  wait_for(two, 3, pair)
  pair[1].send_signal(signal.SIGKILL)
  (code, _, errors), (victims, *_) = ends(pair)
  assert victims == -signal.SIGKILL and code == 1 and len(errors) == 1, errors
  assert "run the same command on every host" in errors[0]
  assert ends([start(8, command("cache_rl", two))])[0][0] == 0
  assert_same_steps(two, whole)

  cut_to(one, 2, other)
  pair = start_two("cache_rl", other)
  wait_for(other, 3, pair)
  pair[1].send_signal(signal.SIGTERM)
  stopped = ends(pair)
  assert [code for code, *_ in stopped] == [0, 0], stopped
  reached = {out.strip().splitlines()[-1].split(":")[0].split(" at ")[1] for _, out, _ in stopped}
  assert reached == {f"step {rows_of(other)[-1]['step']}"}
  assert_same_steps(other, whole[2 : 2 + len(rows_of(other))])


@pytest.mark.slow
def test_two_processes_that_disagree_say_so_and_end(tmp_path):
  """One line each, the same, with the field and both values; no workdir is made."""
  pair = start_two("sft", tmp_path / "w", ([], ["--config.optimizer.lr=1.0"]))
  for code, _, errors in ends(pair):
    assert code in (1, 2)
    assert "optimizer.lr is 0.003 on host 0 and 1.0 on host 1" in errors[0] and len(errors) == 1
  assert not (tmp_path / "w").exists()
