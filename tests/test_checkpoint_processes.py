"""Checkpoints across processes: other device counts, two hosts, kill -9."""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_python(code, *arguments):
  """Runs a script in a fresh process; its last line is JSON."""
  env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT), XLA_FLAGS="")
  env["OPENBLAS_NUM_THREADS"] = "1"  # KILLS forks, which is safe from one thread only
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
    env=env,
    capture_output=True,
    text=True,
    timeout=580,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


TOPOLOGY = """
  import hashlib, json, sys
  import jax
  jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
  import jax.numpy as jnp, numpy as np
  from jax.sharding import AxisType, NamedSharding, PartitionSpec
  from qed_jax.checkpoint import Checkpoints

  count = int(sys.argv[2])
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))
  place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
  shardings = {"params": {"w": place("fsdp"), "b": place()}, "count": place(), "key": place()}
  checkpoints = Checkpoints(sys.argv[1], keep=9)
  like = {"params": {"w": ((8, 5), jnp.bfloat16), "b": ((3,), jnp.float32)},
          "count": ((), jnp.int32), "key": ((), jax.random.key(0).dtype)}
  abstract = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(*a, sharding=s), like, shardings,
    is_leaf=lambda x: isinstance(x, tuple))
  found = checkpoints.restore_latest(abstract)
  if found is None:
    state = {"params": {"w": jax.random.normal(jax.random.key(1), (8, 5), jnp.bfloat16),
                        "b": jnp.arange(3.0)}, "count": jnp.int32(7), "key": jax.random.key(2)}
    state = jax.device_put(state, shardings)
    step = 0
  else:
    step, state, _ = found
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(state):
    digest.update(np.asarray(jax.random.key_data(leaf) if leaf is state["key"] else leaf).tobytes())
  checkpoints.save(step + 1, state)
  checkpoints.close()
  print(json.dumps([step, jax.device_count(), digest.hexdigest()]))
"""


def test_resume_on_other_device_counts(tmp_path):
  """4 -> 1 -> 2 -> 4 devices, each in its own process: every resume is bitwise, and sharded."""
  counts = [4, 1, 2, 4]
  results = [run_python(TOPOLOGY, tmp_path, count) for count in counts]
  assert [r[:2] for r in results] == [[i, count] for i, count in enumerate(counts)]
  assert len({r[2] for r in results}) == 1


HOSTS = """
  import json, pathlib, sys
  import jax
  jax.config.update("jax_num_cpu_devices", 2)
  root, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
  import numpy as np
  from jax.experimental import multihost_utils
  from jax.sharding import AxisType, NamedSharding, PartitionSpec
  from qed_jax.checkpoint import Checkpoints

  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))
  def put(x, *spec):
    place = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

  def make(step):
    w = np.random.default_rng(step).normal(size=(8, 6)).astype(np.float32)
    return {"params": {"w": put(w, "fsdp"), "b": put(w)}, "n": put(np.array(step, np.int32))}

  checkpoints = Checkpoints(root, keep=2)
  for step in (1, 2, 3):
    checkpoints.save(step, make(step), {"process": process})
  checkpoints.close()
  if process == 0:
    for file in pathlib.Path(root).glob("3/params/**/d/*"):
      data = bytearray(file.read_bytes())
      data[len(data) // 3] ^= 4
      file.write_bytes(data)
  multihost_utils.sync_global_devices("damaged")
  step, state, host_state = checkpoints.restore_latest(make(0))
  same = all(
    np.array_equal(np.asarray(a.data), np.asarray(b.data))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(make(step)), strict=True)
    for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
  )
  print(json.dumps([step, same, host_state]))
"""


@pytest.mark.slow
def test_two_processes_save_and_fall_back_together(tmp_path):
  """Each of two processes writes its shards; both restore the same older step when one is bad."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  with ThreadPoolExecutor() as pool:
    results = list(pool.map(lambda process: run_python(HOSTS, tmp_path, port, process), (0, 1)))
  assert results == [[2, True, {"process": 0}]] * 2
  assert sorted(os.listdir(tmp_path)) == ["2", "3.bad"]


KILLS = """
  import json, os, random, signal, sys, time
  import jax, numpy as np
  import jax.numpy as jnp
  from qed_jax.checkpoint import Checkpoints

  root, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

  def make(step):
    rng = np.random.default_rng(step)
    w = rng.normal(size=(300, 70)).astype(np.float32)
    return {"params": {"w": jnp.asarray(w)}, "key": jax.random.key(step)}, {"w": w[:50], "n": step}

  def run(ready):
    checkpoints = Checkpoints(root, keep=2)
    like, _ = make(0)
    found = checkpoints.restore_latest(like)
    step = found.step if found else 0
    if found:
      state, host = make(step)
      right = all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in
        ((found.state["params"]["w"], state["params"]["w"]), (found.host_state["w"], host["w"]),
         (jax.random.key_data(found.state["key"]), jax.random.key_data(state["key"]))))
      step = step if right and found.host_state["n"] == step else -step
    bad = sum(name.endswith(".bad") for name in os.listdir(root))
    os.write(ready, (json.dumps([step, bad]) + "\\n").encode())
    while step >= 0:
      step += 1
      checkpoints.save(step, *make(step))
      os.write(ready, b"saving\\n")

  # Forked before any backend or thread starts here: the children pay for no imports.
  random.seed(seed)
  seen = []
  for attempt in range(kills + 1):
    r, w = os.pipe()
    child = os.fork()
    if child == 0:
      run(w)
      os._exit(1)
    os.close(w)
    with open(r) as lines:
      seen.append(json.loads(next(lines)))
      for _ in range(random.randint(1, 3)):
        next(lines)
      time.sleep(random.uniform(0, 0.1))
      os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
  print(json.dumps(seen))
"""


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_kill_nine_during_saves(tmp_path, kills):
  """SIGKILL at random points of save, commit and deletion: each restart resumes bitwise, ahead."""
  seen = run_python(KILLS, tmp_path, kills, kills)
  steps = [step for step, _ in seen]
  assert len(seen) == kills + 1 and steps[0] == 0
  assert steps == sorted(steps) and steps[-1] > 0  # a wrong restore reports a negative step
  assert all(bad == 0 for _, bad in seen)
  names = [name for name in os.listdir(tmp_path) if not name.endswith("-tmp")]
  assert all(re.fullmatch("[0-9]+", name) for name in names) and len(names) <= 4
