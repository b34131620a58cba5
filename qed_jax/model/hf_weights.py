"""The weights of a Hugging Face folder: safetensors in, safetensors out, a block at a time.

Both sides store the same bytes in the same order; a parameter here is the stack of its layers'
tensors with the heads split out (qwen3.DIMS). Reading goes from file to device in blocks of
BLOCK_BYTES, each written in place into the parameter's shards, so that the host holds a few blocks
beside what the devices own. Headers are checked against the config before anything is read.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open

from qed_jax.model.qwen3 import DIMS, Qwen3Config, flatten, shapes, unflatten

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
CODES = {name: code for code, name in DTYPES.items()}
BLOCK_BYTES = 8 * 2**20
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies, its dtype (numpy's name) and shape, from a shard's header."""

  file: Path
  name: str
  dtype: str
  shape: tuple[int, ...]


def read_config(folder: str | os.PathLike) -> dict:
  """config.json, parsed. Number of key/value heads and head width come from the tensors if absent.

  transformers has defaults for these two that fit the real Qwen3 only; the weights know better.
  Raises FileNotFoundError without the file, ValueError when it is not a JSON object.
  """
  config = read_json(Path(folder) / "config.json")
  if all(config.get(field) for field in ("head_dim", "num_key_value_heads")):
    return config
  found = {t.name.removeprefix("model.layers.0.self_attn."): t.shape for t in tensors(folder)}
  norm, keys = found.get("k_norm.weight", ()), found.get("k_proj.weight", ())
  if not config.get("head_dim") and norm:
    config["head_dim"] = norm[0]
  if "num_key_value_heads" not in config and keys and isinstance(config.get("head_dim"), int):
    config["num_key_value_heads"] = keys[0] // config["head_dim"]
  return config


def read_json(path: Path) -> dict:
  """A JSON object from a file; FileNotFoundError or ValueError in one line otherwise."""
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist: give a folder that has {path.name}")
  try:
    value = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON ({error}): download it again") from None
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds a {type(value).__name__}: need a JSON object")
  return value


def tensors(folder: str | os.PathLike) -> list[Tensor]:
  """Every tensor of a folder, from the headers of its shards.

  Raises FileNotFoundError when the weights or a shard are missing, ValueError when a shard is
  damaged or shards and index disagree.
  """
  folder = Path(folder)
  if (folder / SINGLE).is_file():  # transformers prefers it too
    return _header(folder / SINGLE)
  if not (folder / INDEX).is_file():
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}: it holds no weights")
  where = read_json(folder / INDEX).get("weight_map")
  if not isinstance(where, dict) or not where:
    raise ValueError(f"{folder / INDEX} has no weight_map: download it again")
  for name, file in where.items():
    if not _is_plain_name(file):
      raise ValueError(f"{INDEX} puts {name} into {file!r}: need the name of a file beside it")
  found = []
  for file in sorted(set(where.values())):
    if not (folder / file).is_file():
      name = next(name for name in where if where[name] == file)
      raise FileNotFoundError(f"{folder / file} does not exist: {INDEX} puts {name} into it")
    found += _header(folder / file)
  for tensor in found:
    if where.get(tensor.name) != tensor.file.name:
      expected = where.get(tensor.name, "no file")
      raise ValueError(
        f"{tensor.file.name} holds {tensor.name} {list(tensor.shape)}, "
        f"which {INDEX} puts into {expected}: download both again"
      )
  absent = sorted(where.keys() - {t.name for t in found})
  if absent:
    raise ValueError(
      f"{absent[0]} is missing from {where[absent[0]]}, where {INDEX} puts it "
      f"({len(absent)} such): download the shard again"
    )
  return found


def load(folder: str | os.PathLike, config: Qwen3Config, shardings: dict, param_dtype) -> dict:
  """The parameters of an HF folder. shardings: a NamedSharding for each, nested as they are.

  param_dtype: what they are cast to; None keeps the widest dtype on disk, one for all of them.
  Host memory beside the shards that this process owns: a few BLOCK_BYTES. Raises ValueError or
  FileNotFoundError in one line that names the tensor and both shapes, before anything is read.
  """
  on_disk = check(folder, config)
  dtype = jnp.dtype(param_dtype or widest_dtype(on_disk.values()))
  wanted = shapes(config)
  if isinstance(shardings, jax.sharding.Sharding):
    placed = dict.fromkeys(wanted, shardings)
  else:
    placed = flatten(shardings)
  read = {path: _read(path, shape, on_disk, placed[path], dtype) for path, shape in wanted.items()}
  return unflatten(read)


def check(folder: str | os.PathLike, config: Qwen3Config) -> dict[str, Tensor]:
  """{name: Tensor} of the folder, when it is exactly what `config` asks for.

  A head stored beside a tied embedding must be equal to it, and is left out. Raises as `load`.
  """
  found: dict[str, Tensor] = {}
  for tensor in tensors(folder):
    if tensor.dtype not in CODES:
      raise ValueError(
        f"{tensor.name} is stored as {tensor.dtype}: need one of {', '.join(DTYPES)}"
      )
    found[tensor.name] = tensor
  head = found.pop(HEAD, None) if config.tie_word_embeddings else None
  expected = {}
  for name, shape in hf_shapes(config):
    if name not in found:
      raise ValueError(f"{name} is missing: config.json asks for shape {list(shape)}, found none")
    if found[name].shape != shape:
      raise ValueError(
        f"{name} has shape {list(found[name].shape)}, config.json asks for {list(shape)}: "
        "correct config.json or the weights"
      )
    expected[name] = shape
  extra = sorted(found.keys() - expected.keys())
  if extra:
    raise ValueError(
      f"{extra[0]} with shape {list(found[extra[0]].shape)} is not in this model "
      f"(config.json asks for none; {len(extra)} such): correct config.json or the weights"
    )
  if head is not None:
    _check_tied(head, found[EMBEDDING])
  return found


def widest_dtype(found) -> str:
  """The dtype that holds every tensor exactly."""
  return str(jnp.dtype(jnp.result_type(*{t.dtype for t in found})))


def count(config: Qwen3Config) -> int:
  """Number of parameters."""
  return sum(math.prod(shape) for shape in shapes(config).values())


def hf_shapes(config: Qwen3Config) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Hugging Face's names and shapes, a layer at a time; lazy, as a bad config may ask for 10^15."""
  wanted = shapes(config)
  for path in wanted:
    for layer in range(_layers(path, wanted[path])):
      yield hf_name(path, layer), _hf_shape(path, wanted[path])


def hf_name(path: str, layer: int) -> str:
  """("layers.mlp.up_proj", 3) -> "model.layers.3.mlp.up_proj.weight"."""
  if path == "lm_head":
    return HEAD
  return "model." + path.replace("layers.", f"layers.{layer}.", 1) + ".weight"


def save(
  folder: str | os.PathLike, config: Qwen3Config, params: dict, dtype, max_shard_size: str | int
) -> None:
  """Writes `params` as safetensors of at most `max_shard_size` each, with an index if several.

  dtype: on disk; None keeps that of each parameter. The host holds one tensor of one layer at most.
  Raises ValueError when a parameter does not have the shape that `config` asks for.
  """
  leaves, wanted = flatten(params), shapes(config)
  for path in wanted.keys() | leaves.keys():
    have = list(leaves[path].shape) if path in leaves else "none"
    want = list(wanted[path]) if path in wanted else "none"
    if have != want:
      raise ValueError(f"parameter {path} has shape {have}, the model's config asks for {want}")
  sources, sizes = {}, {}
  for path, shape in wanted.items():
    on_disk = jnp.dtype(dtype or leaves[path].dtype)
    for layer in range(_layers(path, shape)):
      name = hf_name(path, layer)
      sources[name] = (path, layer, on_disk)
      sizes[name] = math.prod(_hf_shape(path, shape)) * on_disk.itemsize
  plan = huggingface_hub.split_state_dict_into_shards_factory(
    sizes,
    get_storage_size=lambda size: size,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=max_shard_size,
  )
  for file, names in plan.filename_to_tensors.items():
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
      path, _, on_disk = sources[name]
      start, end = end, end + sizes[name]
      header[name] = {
        "dtype": CODES[on_disk.name],
        "shape": _hf_shape(path, wanted[path]),
        "data_offsets": [start, end],
      }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with open(Path(folder) / file, "wb") as f:
      f.write(len(text).to_bytes(8, "little") + text)
      for name in names:
        path, layer, on_disk = sources[name]
        leaf = leaves[path]
        if _stacked(path):
          leaf = jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)
        for block in _host_blocks(leaf):
          f.write(block.astype(on_disk).reshape(-1).view(np.uint8))
      f.flush()
      os.fsync(f.fileno())
  if plan.is_sharded:
    total = {"total_size": sum(sizes.values()), "total_parameters": count(config)}
    index = {"metadata": total, "weight_map": plan.tensor_to_filename}
    (Path(folder) / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _stacked(path: str) -> bool:
  return DIMS[path].startswith("L")


def _layers(path: str, shape) -> int:
  return shape[0] if _stacked(path) else 1


def _hf_shape(path: str, shape) -> tuple[int, ...]:
  """The shape of one layer's tensor: heads and head width are one dimension there."""
  folded: list[int] = []
  previous = ""
  for letter, size in zip(DIMS[path], shape, strict=True):
    if letter == "H" and previous in ("N", "K"):
      folded[-1] *= size
    elif letter != "L":
      folded.append(size)
    previous = letter
  return tuple(folded)


def _is_plain_name(file) -> bool:
  return isinstance(file, str) and Path(file).name == file and "\\" not in file and "\0" not in file


def _header(file: Path) -> list[Tensor]:
  try:
    with safe_open(file, framework="numpy") as f:
      slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
      return [
        Tensor(file, name, DTYPES.get(s.get_dtype(), s.get_dtype()), tuple(s.get_shape()))
        for name, s in slices.items()
      ]
  except Exception as error:  # the library raises its own kind, and OSErrors
    reason = " ".join(str(error).split())
    raise ValueError(
      f"{file} is not a whole safetensors file ({reason}): download it again"
    ) from None


def _rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
  # Opened anew each time: what a mapped file has touched counts as this process's memory.
  with safe_open(tensor.file, framework="numpy") as f:
    return f.get_slice(tensor.name)[start:stop]


def _check_tied(head: Tensor, embedding: Tensor) -> None:
  if head.shape != embedding.shape:
    raise ValueError(
      f"{HEAD} has shape {list(head.shape)}, but tie_word_embeddings is true and {EMBEDDING} "
      f"has {list(embedding.shape)}"
    )
  step = _block_rows(head.shape[0], head.shape)
  for start in range(0, head.shape[0], step):
    ours, theirs = (_rows(t, start, start + step) for t in (head, embedding))
    if not np.array_equal(ours.view(np.uint8), theirs.view(np.uint8)):
      raise ValueError(
        f"{HEAD} {list(head.shape)} differs from {EMBEDDING} {list(embedding.shape)} though "
        "tie_word_embeddings is true: set it to false in config.json, or remove the head"
      )


def _block_rows(rows: int, shape) -> int:
  """How many rows of float32 fit a block; at least one."""
  return min(rows, max(1, BLOCK_BYTES // (4 * math.prod(shape) // shape[0])))


def _read(path: str, shape, on_disk, sharding: NamedSharding, dtype) -> jax.Array:
  """One parameter: every device at once fills its own shard, a block of rows a time."""
  lead = 1 if _stacked(path) else 0
  local = sharding.shard_shape(shape)
  assert not lead or local[0] == shape[0], "layers are stacked, never sharded"
  unit = _hf_shape(path, shape)[0] // shape[lead]  # tensor rows to one row here: the head width
  step = _block_rows(local[lead], (local[lead], *shape[lead + 1 :]))
  shards = shape[lead] // local[lead]
  block_shape = (1,) * lead + (shards * step, *shape[lead + 1 :])
  everywhere = NamedSharding(sharding.mesh, PartitionSpec())

  @functools.partial(jax.jit, donate_argnums=0)
  @functools.partial(
    jax.shard_map,
    mesh=sharding.mesh,
    in_specs=(sharding.spec, sharding.spec, PartitionSpec()),
    out_specs=sharding.spec,
  )
  def write(shard, block, at):
    return jax.lax.dynamic_update_slice(shard, block, [at[i] for i in range(len(shape))])

  whole = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
  for layer in range(_layers(path, shape)):
    tensor = on_disk[hf_name(path, layer)]
    for start in range(0, local[lead], step):
      # The last block reaches back, so that all have one shape and one compiled update.
      start = min(start, local[lead] - step)
      read: dict[int, np.ndarray] = {}

      def part(index, tensor=tensor, start=start, read=read):
        first = (index[lead].start or 0) // step * local[lead] + start
        if first not in read:
          rows = _rows(tensor, first * unit, (first + step) * unit)
          read[first] = rows.reshape(step, *shape[lead + 1 :])
        block = read[first][(slice(None), *index[lead + 1 :])].astype(dtype)
        return block[None] if lead else block

      at = np.array((layer,) * lead + (start,) + (0,) * (len(shape) - lead - 1), np.int32)
      block = jax.make_array_from_callback(block_shape, sharding, part)
      at = jax.make_array_from_callback(at.shape, everywhere, lambda index, at=at: at[index])
      # One block in flight: the host holds no more.
      whole = jax.block_until_ready(write(whole, block, at))
  return whole


def _host_blocks(leaf) -> Iterator[np.ndarray]:
  host = np.asarray(leaf)
  step = _block_rows(host.shape[0], host.shape)
  for start in range(0, host.shape[0], step):
    yield host[start : start + step]
