"""The trainer's parameters as the sampler holds them.

Accelerators sample from the trainer's pytree itself, cast and resharded. On a CPU a decode step is
bound by what XLA copies: a scanned layer is sliced out of its stack, and a product with eight rows
is half as fast with weights [out, in] as with [in, out]. So there, once for each new policy, each
layer's weights become arrays of their own, held [in, out]. `model_view` turns them back inside jit,
where the transposes fold into the products: the model's code sees one layout.
"""

import dataclasses
import functools

import jax

from qed_jax.model import lora, qwen3
from qed_jax.model.layers import Adapted
from qed_jax.sharding import (
  WEIGHTS,
  replica_meshes,
  shardings,
  side_by_side,
  this_hosts_rows,
  within_hosts,
)

SAMPLED = {letter: axes for letter, axes in WEIGHTS.items() if letter != "D"}


def by_layer(mesh) -> bool:
  """Whether parameters for this mesh are arrays of one layer each."""
  return mesh.devices.flat[0].platform == "cpu"


def check(config: qwen3.Qwen3Config, params: dict) -> None:
  """Raises ValueError, one line, when paths or shapes are not those of the model."""
  expected = qwen3.shapes(config)
  leaves = {p: x.w if isinstance(x, Adapted) else x for p, x in qwen3.flatten(params).items()}
  found = {path: tuple(x.shape) for path, x in leaves.items()}
  for path in sorted(expected.keys() | found.keys()):
    if expected.get(path) != found.get(path):
      raise ValueError(
        f"parameter {path} has the shape {found.get(path, 'of nothing: it is missing')}, the "
        f"engine's model needs {expected.get(path, 'none of that name')}: pass its own parameters"
      )


def on_this_host(config: qwen3.Qwen3Config, params: dict) -> dict:
  """Parameters spread over hosts -> this host's whole copy, in the compute dtype, split over
  `tensor` on its own devices; those of one host are given back as they are.

  One gather over all hosts, which all of them call. Nothing else of theirs may be under way.
  """
  mesh = jax.tree.leaves(params)[0].sharding.mesh
  if len({device.process_index for device in mesh.devices.flat}) == 1:
    return params
  everyone = within_hosts(mesh.devices.flat, mesh.shape["tensor"])
  whole = jax.device_put(_cast(params, config.dtype), layout(params, everyone))
  here = layout(params, this_hosts_rows(everyone))

  def own(x, sharding):
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)

  return jax.tree.map(own, whole, here)


def sampler_params(config: qwen3.Qwen3Config, params: dict, mesh) -> list[dict]:
  """Parameters for each replica of `mesh`: compute dtype, split over tensor, otherwise whole.

  One jitted cast and reshard; where the trainer works on other devices, a copy between them. On
  accelerators leaves that need no change are the caller's own arrays, not copies.
  """
  replicas = replica_meshes(mesh)
  whole = jax.device_put(_cast(params, config.dtype), layout(params, side_by_side(mesh)))

  def part(replica):
    own = layout(params, replica)
    devices = set(replica.devices.flat)

    def of_devices(x, sharding):
      shards = [s.data for s in x.addressable_shards if s.device in devices]
      return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)

    here = jax.tree.map(of_devices, whole, own)
    return _for_cpu(config, here) if by_layer(replica) else here

  return [part(replica) for replica in replicas]


def layout(params: dict, mesh) -> dict:
  """Shardings of the sampler's parameters: split over `tensor`, the width D whole."""
  return shardings(SAMPLED, mesh, lora.letters_in(params), jax.tree.map(lambda x: x.shape, params))


def model_view(config: qwen3.Qwen3Config, params: dict) -> tuple[qwen3.Qwen3Config, dict]:
  """What sampler_params returned -> (config, params) for the functions of model/qwen3.py."""
  if 0 not in params["layers"]:
    return config, params
  untied = dataclasses.replace(config, tie_word_embeddings=False)
  layers = {i: _each(_turn_back, config, layer) for i, layer in params["layers"].items()}
  return untied, {**params, "layers": layers, "lm_head": params["lm_head"].T}


@functools.partial(jax.jit, static_argnums=1)
def _cast(params, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), params)


@functools.partial(jax.jit, static_argnums=0)
def _for_cpu(config, params):
  layers = {
    i: _each(_turn, config, jax.tree.map(lambda x, i=i: x[i], params["layers"]))
    for i in range(config.num_layers)
  }
  head = params["embed_tokens" if config.tie_word_embeddings else "lm_head"]
  return {**params, "layers": layers, "lm_head": head.T}


def _each(turn, config, layer: dict) -> dict:
  shapes = {path: shape[1:] for path, shape in qwen3.shapes(config).items()}
  turned = {}
  for path, x in qwen3.flatten(layer).items():
    path_in_model = f"layers.{path}"
    turned[path] = turn(qwen3.DIMS[path_in_model][1:], shapes[path_in_model], x)
  return qwen3.unflatten(turned)


def _turn(letters: str, shape: tuple, x):
  """NHD, FD -> [in, out] = [D, N H]; DNH, DF -> [N H, D]; norm scales stay."""
  if isinstance(x, Adapted):  # the factors are small, and stay as they are
    return dataclasses.replace(x, w=_turn(letters, shape, x.w))
  if len(letters) == 1:
    return x
  outputs = -1 if letters.endswith("D") else shape[0]
  return x.reshape(outputs, shape[-1] if outputs == -1 else -1).T


def _turn_back(letters: str, shape: tuple, x):
  if isinstance(x, Adapted):
    return dataclasses.replace(x, w=_turn_back(letters, shape, x.w))
  return x if len(letters) == 1 else x.T.reshape(shape)
