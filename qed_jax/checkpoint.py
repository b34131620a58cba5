"""Checkpoints of a run: one atomic step holds everything, and nothing damaged is ever restored.

The only file that touches Orbax, which writes the arrays asynchronously and commits a step by one
rename (by a marker file on object stores). Added here, because Orbax has neither: checksums, and
the way back to an older step.

A step `root/<step>/` holds `params/` (what lies under the state's first key "params"), `state/`
(the other arrays) and `host/data.json`: the host state and one checksum per array, themselves under
a CRC32. Checksums are taken on the devices before the save and again after the restore, on
whichever mesh that is.
"""

import contextlib
import functools
import logging
import operator
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from qed_jax.checksums import checksums
from qed_jax.host_state import decode, encode, seal, unseal

log = logging.getLogger(__name__)

# Orbax's own names: the marker of a committed step, the file it writes first, the unfinished step.
COMMITTED, IDENTIFIER, UNFINISHED = (
  "commit_success.txt",
  "orbax.checkpoint",
  ".orbax-checkpoint-tmp",
)
CHUNK_BYTES = 2**28  # an array chunk; restoring onto more devices reads no more than this in excess


class Restored(NamedTuple):
  step: int
  state: Any
  host_state: dict


class Checkpoints:
  """The checkpoints of one run, in one folder (local or gs://).

  At most one save is under way. A failed save is raised, once, by the next call of `check`, `wait`,
  `save`, `restore_latest` or `close`; the saves after it work. All processes of a run make the same
  calls; arrays are written by all, `host_state` is that of process 0.
  """

  def __init__(self, root: str | os.PathLike, *, keep: int, create: bool = True):
    """keep: whole steps that stay (the newest). create: make the folder, clear what kills left."""
    if keep < 1:
      raise ValueError(f"keep must be at least 1, not {keep}")
    self.root = _absolute(root)
    self.keep = keep
    self._pending = None
    if create and jax.process_index() == 0:
      self.root.mkdir(parents=True, exist_ok=True)
      self._clear_unfinished()

  def steps(self) -> list[int]:
    """The committed steps, oldest first."""
    return _steps(self.root)

  def latest_step(self) -> int | None:
    """The newest committed step; a save still under way does not count."""
    return max(self.steps(), default=None)

  def save(self, step: int, state: Any, host_state: dict | None = None) -> None:
    """Starts to write a step; returns when the arrays may be donated or changed.

    state: pytree of jax arrays, typed keys included. host_state: dict of str to None, bool, int,
    float, str, bytes, numpy arrays and scalars, lists (tuples come back as lists) and such dicts.
    Waits for the save before it, so no save is skipped. Raises RuntimeError when that one or the
    start of this one failed, ValueError unless the step is newer than all there are, TypeError for
    what cannot be stored.
    """
    self.wait()
    step = int(step)
    newest = self.latest_step()
    if newest is not None and step <= newest:
      raise ValueError(f"checkpoint {step} is not newer than {newest} in {self.root}: resume first")
    path = self.root / str(step)
    if path.exists() and jax.process_index() == 0:
      self._set_aside(step)  # what a half-done deletion or a stranger left
    arrays = _flatten(state)
    with _neutral():
      raw = {name: _raw(array) for name, (_, array) in arrays.items()}
      sums = checksums(raw)
      document = seal(
        {
          "step": step,
          "arrays": {n: [str(a.dtype), list(a.shape), sums[n]] for n, (_, a) in arrays.items()},
          "host_state": encode(host_state or {}, "host_state"),
        }
      )
      items = _items({name: (parts, raw[name]) for name, (parts, _) in arrays.items()})
      try:
        with _context():
          response = ocp.save_checkpointables_async(path, items | {"host": document})
      except Exception as error:
        raise self._failure(step, error) from error
    self._pending = (step, response)

  def check(self) -> None:
    """Raises if the save under way has failed; never blocks. Cheap: call it every step."""
    self._finish(timeout=0)

  def wait(self) -> None:
    """Blocks until the save under way is committed; raises RuntimeError if it failed."""
    self._finish(timeout=None)

  def close(self) -> None:
    """As `wait`: nothing is lost when the program ends after it."""
    self.wait()

  def restore_latest(self, abstract_state: Any) -> Restored | None:
    """Reads the newest step whose every byte is right; None when there is no step at all.

    abstract_state: pytree of the state's structure; leaves have shape, dtype and sharding
    (jax.ShapeDtypeStruct or arrays), on any mesh. A damaged step is passed over with a warning and
    renamed `<step>.bad`, but only once an older one has been read. Raises ValueError when the
    newest whole step does not fit `abstract_state`, RuntimeError when no step can be read.
    """
    self.wait()
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("restore")  # process 0 may still be deleting old steps
    damaged = []
    for step in reversed(self.steps()):
      try:
        state, host_state = _read(self.root / str(step), abstract_state)
      except _Damaged as error:
        damaged.append((step, error))
        continue
      if jax.process_index() == 0:
        for bad, error in damaged:
          name = self._set_aside(bad)
          log.warning("checkpoint %d is damaged (%s): now %s; using %d", bad, error, name, step)
      return Restored(step, state, host_state)
    if damaged:
      raise RuntimeError(_none_readable(self.root, damaged))
    return None

  def _finish(self, timeout: float | None) -> None:
    if self._pending is None:
      return
    step, response = self._pending
    try:
      response.result(timeout=timeout)
    except Exception as error:
      if timeout is not None and isinstance(error, TimeoutError):
        return
      self._pending = None
      raise self._failure(step, error) from error
    self._pending = None
    if jax.process_index() == 0:
      self._delete_old()

  def _failure(self, step: int, error: Exception) -> RuntimeError:
    if jax.process_index() == 0:
      # A full disk stays full while the unfinished step lies there.
      self._clear_unfinished()
    return RuntimeError(
      f"checkpoint {step} was not written to {self.root}: {_line(error)}; "
      f"newest whole step: {self.latest_step()}"
    )

  def _clear_unfinished(self) -> None:
    try:
      for child in self.root.iterdir():
        if child.name.endswith(UNFINISHED):
          child.rmtree()
    except OSError as error:
      log.warning("unfinished checkpoints in %s could not be deleted: %s", self.root, _line(error))

  def _delete_old(self) -> None:
    oldest_kept = min(self.steps()[-self.keep :], default=0)
    for child in self.root.iterdir():
      if not _is_step(child.name) or int(child.name) >= oldest_kept:
        continue
      if not (child / IDENTIFIER).exists():
        continue  # not made by us
      try:
        # The marker goes first and the identifier last: a kill in between leaves a folder that is
        # no checkpoint, and that the next call knows for its own.
        (child / COMMITTED).unlink(missing_ok=True)
        for part in child.iterdir():
          if part.name != IDENTIFIER:
            part.rmtree() if part.is_dir() else part.unlink()
        child.rmtree()
      except OSError as error:
        log.warning("old checkpoint %s could not be deleted: %s", child, _line(error))

  def _set_aside(self, step: int) -> str:
    names = [f"{step}.bad"] + [f"{step}.bad{i}" for i in range(1, 1000)]
    name = next(name for name in names if not (self.root / name).exists())
    (self.root / str(step)).rename(self.root / name)
    return name


def read_params(path: str | os.PathLike, abstract_params: Any) -> Any:
  """Reads only the parameters: from a workdir, a checkpoints folder or one step, of any run.

  abstract_params: as in `restore_latest`; a leaf of another dtype than the stored one is cast after
  the check. Changes nothing on disk: a damaged step is passed over with a warning. Raises
  FileNotFoundError when there is no checkpoint, ValueError when the shapes do not fit,
  RuntimeError when no step can be read.
  """
  path = _absolute(path)
  if (path / COMMITTED).exists():
    candidates = [path]
  else:
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    candidates = [root / str(step) for step in reversed(_steps(root))]
  if not candidates:
    raise FileNotFoundError(f"no checkpoint in {path}: it is no workdir and no checkpoint")
  damaged = []
  for candidate in candidates:
    try:
      state, _ = _read(candidate, {"params": abstract_params}, cast=True)
    except _Damaged as error:
      log.warning("checkpoint %s is damaged (%s); trying an older one", candidate, error)
      damaged.append((candidate.name, error))
      continue
    return state["params"]
  raise RuntimeError(_none_readable(path, damaged))


# --- reading one step


class _Damaged(Exception):
  """A step that cannot be read, or whose bytes are not those that were saved."""


def _read(path, abstract_state, cast=False):
  """(state, host_state) of one step, verified. With `cast`, only what `abstract_state` names."""
  wanted = _flatten(abstract_state)
  unplaced = [name for name, (_, leaf) in wanted.items() if getattr(leaf, "sharding", None) is None]
  if unplaced:
    raise ValueError(f"{unplaced[0]} has no sharding: give every leaf the one to restore it with")
  failure, manifest, arrays = None, {}, {}
  try:
    with _context(alone=True):
      document = ocp.load_checkpointables(path, {"host": None})["host"]
    manifest = unseal(document)
  except Exception as error:
    failure = error
  _agree(failure)

  saved = manifest["arrays"]
  if cast:
    saved = {name: entry for name, entry in saved.items() if name.split("/")[0] == "params"}
  _check_fit(path, wanted, saved, cast)
  keys = {name for name, (_, leaf) in wanted.items() if _is_key(leaf)}
  abstract = {}
  for name, (parts, leaf) in wanted.items():
    raw = jax.eval_shape(jax.random.key_data, leaf) if name in keys else leaf
    dtype = raw.dtype if name in keys else jnp.dtype(saved[name][0])
    abstract[name] = (parts, jax.ShapeDtypeStruct(raw.shape, dtype, sharding=leaf.sharding))

  with _neutral():
    try:
      with _context(alone=True):
        items = ocp.load_checkpointables(path, _items(abstract))
      tree = items.get("state", {}) | items.get("params", {})
      for name, (parts, _) in wanted.items():
        arrays[name] = functools.reduce(operator.getitem, parts, tree)
    except Exception as error:
      failure = error
    _agree(failure)
    sums = checksums(arrays)
    wrong = [name for name in arrays if sums[name] != saved[name][2]]
    if wrong:
      raise _Damaged(
        f"{wrong[0]} is not what was saved, {len(wrong)} of {len(arrays)} arrays differ"
      )
    leaves = []
    for name, (_, leaf) in wanted.items():
      array = arrays[name]
      if name in keys:
        array = jax.random.wrap_key_data(array, impl=_key_impl(leaf))
      elif array.dtype != leaf.dtype:
        array = jax.jit(lambda x, dtype=leaf.dtype: x.astype(dtype), out_shardings=leaf.sharding)(
          array
        )
      leaves.append(array)
  state = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract_state), leaves)
  return state, decode(manifest["host_state"])


def _agree(failure: Exception | None) -> None:
  """Raises _Damaged on every process when one has failed to read."""
  failed = [failure is not None]
  if jax.process_count() > 1:
    failed = multihost_utils.process_allgather(np.array(failed)).ravel()
  if any(failed):
    raise _Damaged(_line(failure) if failure else "another process could not read it") from failure


def _check_fit(path, wanted, saved, cast):
  problems = []
  for name in wanted.keys() | saved.keys():
    if name not in saved:
      problems.append(f"{name} is not in the checkpoint")
    elif name not in wanted:
      problems.append(f"{name} is in the checkpoint only")
    else:
      leaf, (dtype, shape, _) = wanted[name][1], saved[name]
      other_dtype = str(leaf.dtype) != dtype and (not cast or "key" in (str(leaf.dtype) + dtype))
      if list(leaf.shape) != shape or other_dtype:
        problems.append(f"{name} is {dtype}{shape}, not {str(leaf.dtype)}{list(leaf.shape)}")
  if problems:
    shown = "; ".join(sorted(problems)[:8])
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise ValueError(f"checkpoint {path} does not fit this model and optimizer: {shown}{more}")


# --- arrays by name


def _flatten(tree) -> dict[str, tuple[tuple[str, ...], Any]]:
  """{"params/layers/norm": (("params", "layers", "norm"), leaf)} in the tree's order."""
  flat = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    parts = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    name = "/".join(parts)
    if not parts or name in flat:
      raise ValueError(f"the state must be a container with distinct paths; {name!r} is not")
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
      raise TypeError(f"{name} is a {type(leaf).__name__}, not a jax array: move it to host_state")
    if leaf.size == 0:
      raise ValueError(f"{name} has no elements (shape {leaf.shape}), which Orbax cannot store")
    flat[name] = (parts, leaf)
  return flat


def _items(flat):
  """Orbax's named parts: the parameters apart, so that they can be read alone."""
  items = {}
  for parts, leaf in flat.values():
    node = items.setdefault("params" if parts[0] == "params" else "state", {})
    for part in parts[:-1]:
      node = node.setdefault(part, {})
    node[parts[-1]] = leaf
  return items


def _is_key(leaf):
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf):
  """The generator of a key array, abstract or not: jax.random.key_impl takes no abstract leaf."""
  found = []
  jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
  return found[0]


def _raw(array):
  return jax.random.key_data(array) if _is_key(array) else array


# --- folders


def _context(alone: bool = False):
  """Orbax's options. alone: this process reads for itself and meets no other."""
  context = ocp.Context()
  if alone:
    # At Orbax's barriers, the processes that can read a damaged step would wait for the others.
    context.multiprocessing_options.active_processes = {jax.process_index()}
    context.multiprocessing_options.primary_host = jax.process_index()
  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name="host")
  context.checkpointables.registry = registry
  context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
  # In the background, a folder that cannot be made leaves the writers waiting for minutes.
  context.async_options.create_directories_asynchronously = False
  return context


@contextlib.contextmanager
def _neutral():
  """No mesh, so that single shards can be computed on; transfers are what happens here."""
  with jax.set_mesh(Mesh(np.empty((), object), ())), jax.transfer_guard("allow"):
    yield


def _absolute(path) -> epath.Path:
  text = os.fspath(path)
  return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def _is_step(name: str) -> bool:
  return re.fullmatch("0|[1-9][0-9]*", name) is not None


def _steps(root) -> list[int]:
  if not root.is_dir():
    return []
  names = [child.name for child in root.iterdir() if _is_step(child.name)]
  return sorted(int(name) for name in names if (root / name / COMMITTED).exists())


def _none_readable(root, damaged) -> str:
  reasons = "; ".join(f"{step}: {error}" for step, error in damaged)
  return f"no checkpoint in {root} can be read ({reasons}); move them away to start over"


def _line(error: BaseException) -> str:
  """The reason in one line; Orbax hides the first cause under errors about handlers."""
  while error.__cause__ is not None:
    error = error.__cause__
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:200]}"
