"""Checkpoints: bitwise, atomic under kill -9, never silently wrong, and readable on any mesh."""

import logging
import os
import resource
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qed_jax import checkpoint
from qed_jax.checkpoint import Checkpoints, read_params

ROOT = Path(__file__).parents[1]

# Once one of Orbax's coroutines has failed, nobody awaits the others.
pytestmark = [
  pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def make_state(seed, rows=8):
  """A state with every kind of array a run saves: bf16, f32, ints, bools, keys, Adam's moments."""
  key = jax.random.key(seed)
  params = {
    "embed_tokens": jax.random.normal(key, (rows, 6)),
    "layers": {
      "norm": jax.random.normal(key, (3, 4), jnp.bfloat16),
      "q_proj": jax.random.normal(jax.random.fold_in(key, 1), (3, 4, 2)),
    },
  }
  return {
    "params": params,
    "opt_state": optax.adamw(1e-3).init(params),
    "key": jax.random.split(key, 2),
    "others": (
      jnp.arange(-3, 3, dtype=jnp.int8),
      jax.random.bits(key, (5,), jnp.uint32),
      jnp.array([True, False]),
      jnp.float32(seed),
      jnp.array([jnp.nan, -0.0, jnp.inf]),
    ),
  }


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def as_bytes(tree):
  """Paths, dtypes, shapes and bytes of all leaves: equal when the trees are bitwise equal."""
  flat = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    raw = jax.random.key_data(leaf) if checkpoint._is_key(leaf) else leaf
    name = jax.tree_util.keystr(path)
    flat[name] = (str(leaf.dtype), leaf.shape, np.asarray(raw).tobytes())
  return flat


def save_steps(root, steps, keep=10):
  checkpoints = Checkpoints(root, keep=keep)
  for step in steps:
    checkpoints.save(step, make_state(step), {"step": step})
  checkpoints.close()
  return checkpoints


def test_roundtrip_is_bitwise(tmp_path):
  """Arrays of every dtype, typed keys and host values come back bit for bit."""
  state = make_state(3)
  rng = np.random.default_rng(0)
  host = {
    "rng": rng.bit_generator.state,
    "nested": {"list": [1, 2.5, None, True, "é\n"], "bytes": b"\x00\xff", "big": 2**200},
    "nan": float("nan"),
    "replay": rng.normal(size=(100, 7)),
    "tokens": np.arange(6, dtype=np.int32).reshape(2, 3),
    "half": np.arange(3).astype(jnp.bfloat16),
    "scalar": np.int64(7),
  }
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(12, state, host)
  checkpoints.close()

  step, restored, host_back = Checkpoints(tmp_path, keep=2).restore_latest(abstract(state))
  assert step == 12
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert as_bytes(restored) == as_bytes(state)
  assert np.isnan(host_back.pop("nan")) and host.pop("nan")
  for name in ("replay", "tokens", "half", "scalar"):
    a, b = host.pop(name), host_back.pop(name)
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
  assert host_back == host


def test_state_may_be_donated_after_save(tmp_path):
  """What is saved is the state at the call, although its buffers are overwritten at once."""
  state = {"params": {"w": jnp.arange(400_000, dtype=jnp.float32)}}
  before = as_bytes(state)
  update = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, state)
  for _ in range(3):
    state = update(state)
  checkpoints.close()
  assert as_bytes(checkpoints.restore_latest(abstract(state)).state) == before


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_under_a_mesh_and_a_transfer_guard(tmp_path, kind):
  """As a trainer calls it: with a mesh set, implicit transfers forbidden, arrays sharded."""
  devices = jax.devices()[:2]
  mesh = jax.make_mesh((len(devices),), ("fsdp",), devices=devices, axis_types=(kind,))
  state = make_state(1)
  place = jax.tree.map(
    lambda x: NamedSharding(mesh, PartitionSpec(*["fsdp"] * (x.shape[:1] == (8,)))),
    state,
  )
  state = jax.device_put(state, place)
  wanted = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16, sharding=x.sharding), state["params"]
  )
  with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state)
    checkpoints.close()
    restored = checkpoints.restore_latest(abstract(state)).state
    params = read_params(tmp_path, wanted)
  assert as_bytes(restored) == as_bytes(state)
  for tree, where in ((restored, place), (params, place["params"])):
    assert jax.tree.all(
      jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), tree, where)
    )


def test_keep_and_no_save_is_skipped(tmp_path):
  """Back-to-back saves all happen; only the newest `keep` stay."""
  checkpoints = Checkpoints(tmp_path, keep=2)
  seen = set()
  for step in range(1, 6):
    checkpoints.save(step, {"w": jnp.full(3, step)})
    checkpoints.wait()
    seen.add(checkpoints.latest_step())
  assert seen == {1, 2, 3, 4, 5}
  assert checkpoints.steps() == [4, 5]
  for step in (6, 7, 8):  # no wait in between
    checkpoints.save(step, {"w": jnp.full(3, step)})
  checkpoints.close()
  assert sorted(os.listdir(tmp_path)) == ["7", "8"]


def test_empty_root_gives_none(tmp_path):
  """No checkpoint is not an error for restore_latest; it is one for read_params."""
  assert Checkpoints(tmp_path / "new", keep=1).restore_latest(abstract(make_state(0))) is None
  assert Checkpoints(tmp_path / "absent", keep=1, create=False).latest_step() is None
  assert not (tmp_path / "absent").exists()
  with pytest.raises(FileNotFoundError, match="no checkpoint in .*new"):
    read_params(tmp_path / "new", abstract(make_state(0)["params"]))


def test_foreign_and_half_deleted_folders_are_ignored(tmp_path):
  """Thirty shapes of rubbish beside a good step: it is found, and rubbish of others stays."""
  save_steps(tmp_path, [5])
  good = tmp_path / "5"
  for name in ["tmp", "5.bad", "-3", "007", "+9", "1e3", "9 ", "٣", "9.orbax-checkpoint-tmp", "x9"]:
    shutil.copytree(good, tmp_path / name)
  (tmp_path / "99").mkdir()
  (tmp_path / "98").write_text("a file")
  (tmp_path / "notes.txt").write_text("mine")
  parts = ["commit_success.txt", "params", "state", "host", "_CHECKPOINT_METADATA"]
  for i, part in enumerate(parts):  # without the marker a folder is no step, whatever else is there
    shutil.copytree(good, tmp_path / f"{60 + i}")
    (tmp_path / f"{60 + i}" / "commit_success.txt").unlink()
    if part != "commit_success.txt":
      target = tmp_path / f"{60 + i}" / part
      shutil.rmtree(target) if target.is_dir() else target.unlink()
  for i in range(12):
    (tmp_path / f"{70 + i}" / "params" / "d").mkdir(parents=True)
    (tmp_path / f"{70 + i}" / "params" / "d" / "0").write_bytes(bytes(i))

  checkpoints = Checkpoints(tmp_path, keep=3)
  assert checkpoints.steps() == [5]
  restored = checkpoints.restore_latest(abstract(make_state(0)))
  assert restored.step == 5 and as_bytes(restored.state) == as_bytes(make_state(5))
  # A step that rubbish sits on can be saved all the same, and nothing foreign is lost.
  checkpoints.save(60, make_state(60))
  checkpoints.save(99, make_state(99))
  checkpoints.save(100, make_state(100))
  checkpoints.close()
  assert checkpoints.steps() == [60, 99, 100]
  assert (tmp_path / "99.bad").is_dir() and (tmp_path / "notes.txt").read_text() == "mine"
  assert (tmp_path / "70" / "params").is_dir()


def test_deletion_cut_short_is_finished_later(tmp_path):
  """A step whose deletion was killed half-way is no step, and goes with the next save."""
  checkpoints = save_steps(tmp_path, [1, 2], keep=2)
  (tmp_path / "1" / "commit_success.txt").unlink()
  shutil.rmtree(tmp_path / "1" / "params")
  assert checkpoints.steps() == [2]
  save_steps(tmp_path, [3], keep=2)
  assert sorted(os.listdir(tmp_path)) == ["2", "3"]


def corruptions(data, rng):
  """(name, new bytes or None to delete) for one file."""
  if data:
    flipped = bytearray(data)
    flipped[rng.integers(len(data))] ^= 1 << rng.integers(8)
    yield "flip", bytes(flipped)
    yield "zero", bytes(len(data))
    yield "cut", data[: len(data) // 2]
  yield "delete", None


def test_damage_to_the_latest_step_never_gives_wrong_state(tmp_path, caplog):
  """Flip, zero, cut or delete any file of the newest step: exact, or the older step exactly."""
  source = tmp_path / "source"
  save_steps(source, [1, 2])
  expected = {step: as_bytes(make_state(step)) for step in (1, 2)}
  rng = np.random.default_rng(0)
  fallbacks, trials = 0, 0
  for file in sorted(p for p in (source / "2").rglob("*") if p.is_file()):
    for name, content in corruptions(file.read_bytes(), rng):
      if file.name == "commit_success.txt" and name == "delete":
        continue  # then it is no step: see the test of foreign folders
      root = tmp_path / f"{trials}"
      shutil.copytree(source, root)
      target = root / file.relative_to(source)
      target.unlink() if content is None else target.write_bytes(content)
      caplog.clear()
      restored = Checkpoints(root, keep=2).restore_latest(abstract(make_state(0)))
      assert as_bytes(restored.state) == expected[restored.step], (file, name)
      assert restored.host_state == {"step": restored.step}
      warned = [r.getMessage() for r in caplog.records if r.name == "qed_jax.checkpoint"]
      if restored.step == 1:
        fallbacks += 1
        assert len(warned) == 1 and "checkpoint 2 is damaged" in warned[0]
        assert "\n" not in warned[0]
        assert (root / "2.bad").is_dir() and Checkpoints(root, keep=2).steps() == [1]
      else:
        assert not warned and (root / "2").is_dir()
      trials += 1
      shutil.rmtree(root)
  assert trials > 40 and fallbacks > 15


def test_every_flip_in_array_data_is_noticed(tmp_path):
  """A bit flipped in the stored values themselves, which Orbax alone loads without a word."""
  rng = np.random.default_rng(1)
  values = rng.normal(size=20_000).astype(np.float32)
  checkpoints = Checkpoints(tmp_path, keep=3)
  checkpoints.save(1, {"params": {"w": jnp.zeros(20_000)}})
  checkpoints.save(2, {"params": {"w": jnp.asarray(values)}})
  checkpoints.close()
  like = {"params": {"w": jnp.zeros(20_000)}}
  data = max((tmp_path / "2").rglob("*"), key=lambda p: p.stat().st_size)
  good = data.read_bytes()
  noticed = 0
  for trial in range(20):
    flipped = bytearray(good)
    flipped[rng.integers(len(good))] ^= 1 << rng.integers(8)
    data.write_bytes(flipped)
    try:
      w = read_params(tmp_path / "2", like["params"])["w"]
    except RuntimeError as error:
      assert "can be read" in str(error), trial
      noticed += 1
    else:
      assert np.asarray(w).tobytes() == values.tobytes(), trial
  assert noticed >= 15
  data.write_bytes(good)
  assert checkpoints.restore_latest(like).step == 2


def test_no_readable_step_is_an_error_and_nothing_is_moved(tmp_path):
  """A run whose every checkpoint is damaged stops: it must not start over without being told."""
  save_steps(tmp_path, [1, 2])
  for step in (1, 2):
    (tmp_path / f"{step}" / "host" / "data.json").write_text("{}")
  with pytest.raises(RuntimeError, match="no checkpoint in .* can be read .*2: .*1: .*start over"):
    Checkpoints(tmp_path, keep=2).restore_latest(abstract(make_state(0)))
  assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_another_model_is_refused_not_quarantined(tmp_path):
  """Other shapes, dtypes or names raise one line that names them; the steps stay."""
  checkpoints = save_steps(tmp_path, [1, 2])
  with pytest.raises(
    ValueError, match=r"params/embed_tokens is float32\[8, 6\], not float32\[9, 6\]"
  ):
    checkpoints.restore_latest(abstract(make_state(0, rows=9)))
  other = make_state(0)
  other["params"]["layers"]["norm"] = jnp.zeros((3, 4))
  other["params"]["lm_head"] = jnp.zeros(3)
  with pytest.raises(ValueError) as error:
    checkpoints.restore_latest(abstract(other))
  assert "layers/norm is bfloat16[3, 4], not float32[3, 4]" in str(error.value)
  assert "params/lm_head is not in the checkpoint" in str(error.value)
  assert "\n" not in str(error.value)
  assert checkpoints.steps() == [1, 2]


def test_unplaced_leaf_is_refused(tmp_path):
  """Without a sharding a scalar would land on one device and break the next step's jit."""
  checkpoints = save_steps(tmp_path, [1])
  with pytest.raises(ValueError, match="has no sharding"):
    checkpoints.restore_latest(jax.eval_shape(lambda: make_state(0)))


def test_old_step_is_not_overwritten(tmp_path):
  """Saving at or before the newest step is refused: it would lose or hide work."""
  checkpoints = save_steps(tmp_path, [4])
  for step in (3, 4):
    with pytest.raises(ValueError, match=f"checkpoint {step} is not newer than 4"):
      checkpoints.save(step, make_state(0))


@pytest.mark.parametrize(
  ("host", "where"),
  [
    ({"a": {1: 2}}, "host_state.a has the key 1"),
    ({"a": [{3}]}, r"host_state.a\[0\] is a set"),
    ({"a": np.array(["x"])}, "host_state.a is a numpy array of <U1"),
    ({"a": jnp.zeros(1)}, "host_state.a is a "),
  ],
)
def test_host_state_that_would_change_is_refused(tmp_path, host, where):
  """What JSON would silently turn into something else raises and names the field."""
  with pytest.raises(TypeError, match=where):
    Checkpoints(tmp_path, keep=1).save(1, {"w": jnp.zeros(1)}, host)


def test_state_of_host_values_is_refused(tmp_path):
  """Numbers and numpy arrays among the device arrays have no sharding; the message says where."""
  with pytest.raises(TypeError, match="step is a int, not a jax array: move it to host_state"):
    Checkpoints(tmp_path, keep=1).save(1, {"w": jnp.zeros(1), "step": 3})


def surface_by_wait(checkpoints):
  checkpoints.wait()


def surface_by_check(checkpoints):
  for _ in range(3000):
    checkpoints.check()
    time.sleep(0.01)


def surface_by_next_save(checkpoints):
  checkpoints.save(3, make_state(3))


@pytest.mark.parametrize("surface", [surface_by_wait, surface_by_check, surface_by_next_save])
def test_disk_error_surfaces_and_later_saves_work(tmp_path, surface):
  """A write that fails in the background is raised by the next call; then saving works again."""
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(1, make_state(1))
  checkpoints.wait()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  big = {"w": jax.random.normal(jax.random.key(0), (400_000,))}
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))
  try:
    with pytest.raises(RuntimeError, match="checkpoint 2 was not written .*newest whole step: 1"):
      checkpoints.save(2, big)
      surface(checkpoints)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert os.listdir(tmp_path) == ["1"]  # the space is free again
  checkpoints.check()
  checkpoints.save(3, make_state(3))
  checkpoints.close()
  assert checkpoints.steps() == [1, 3]
  assert as_bytes(checkpoints.restore_latest(abstract(make_state(0))).state) == as_bytes(
    make_state(3)
  )


def test_unwritable_root_is_an_error_at_once(tmp_path):
  """A root that cannot take the step raises the same error from save itself."""
  checkpoints = Checkpoints(tmp_path / "root", keep=1)
  (tmp_path / "root").rmdir()
  (tmp_path / "root").write_text("a file now")
  with pytest.raises(RuntimeError, match="checkpoint 1 was not written"):
    checkpoints.save(1, make_state(1))
    checkpoints.wait()


def test_read_params_from_workdir_folder_and_step(tmp_path):
  """Stages chain: parameters alone are read from a workdir, its checkpoints or one copied step."""
  save_steps(tmp_path / "checkpoints", [1, 2])
  shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "kept")
  wanted = abstract(make_state(0)["params"])
  for path, step in (
    (tmp_path, 2),
    (tmp_path / "checkpoints", 2),
    (tmp_path / "checkpoints/1", 1),
    (tmp_path / "kept", 1),
  ):
    assert as_bytes(read_params(path, wanted)) == as_bytes(make_state(step)["params"])


def test_read_params_casts_and_leaves_damage_alone(tmp_path, caplog):
  """Another dtype is cast after the check; another run's damaged step is not moved."""
  save_steps(tmp_path, [1, 2])
  for file in (tmp_path / "2" / "params").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  params = make_state(1)["params"]
  wanted = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), params
  )
  with caplog.at_level(logging.WARNING, "qed_jax.checkpoint"):
    restored = read_params(tmp_path, wanted)
  assert as_bytes(restored) == as_bytes(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  assert "/2 is damaged" in caplog.text and (tmp_path / "2").is_dir()
  wanted.pop("embed_tokens")
  with pytest.raises(ValueError, match="params/embed_tokens is in the checkpoint only"):
    read_params(tmp_path, wanted)
