"""Adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

A layer's factors are tensors of their own there, lora_A [r, in] and lora_B [out, r]; here they are
stacked by layer with the heads split out. Nothing is rounded either way.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import safetensors.numpy

from qed_jax.model import lora
from qed_jax.model.hf_weights import hf_name, read_json
from qed_jax.model.qwen3 import Qwen3Config, flatten, unflatten

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FACTORS = {"a": "lora_A", "b": "lora_B"}
# What would make an adapter more than w + alpha/r b a; a field may be absent, empty or this.
PLAIN = {
  "peft_type": "LORA",
  "bias": "none",
  "use_dora": False,
  "use_qalora": False,
  "fan_in_fan_out": False,
  "lora_bias": False,
  "modules_to_save": None,
  "rank_pattern": None,
  "alpha_pattern": None,
  "layers_to_transform": None,
  "layer_replication": None,
  "trainable_token_indices": None,
  "target_parameters": None,
}


def tensor_name(path: str, layer: int) -> str:
  """layers.mlp.up_proj.a -> base_model.model.model.layers.0.mlp.up_proj.lora_A.weight."""
  layer_path, part = path.rsplit(".", 1)
  module = hf_name(layer_path, layer).removesuffix(".weight")
  return f"base_model.model.{module}.{FACTORS[part]}.weight"


def save(folder: Path, adapter: lora.Adapter, trained: dict, base: str, revision: str) -> None:
  """Writes the two files; trained: the adapter's arrays. base: what PEFT is told it belongs to."""
  tensors = {}
  for path, stacked in flatten(trained).items():
    for layer, x in enumerate(np.asarray(stacked)):
      shape = (len(x), -1) if path.endswith(".a") else (-1, x.shape[-1])
      tensors[tensor_name(path, layer)] = np.ascontiguousarray(x.reshape(shape))
  safetensors.numpy.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "revision": revision or None,
    "r": adapter.rank,
    "lora_alpha": adapter.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": [path.split(".")[-1] for path in adapter.targets],
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "inference_mode": True,
  }
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_config(folder: Path) -> dict:
  """adapter_config.json. Raises ValueError, one line, for what a plain adapter cannot be."""
  config = read_json(folder / CONFIG)
  for field, plain in PLAIN.items():
    value = config.get(field)
    if value not in (None, {}, [], plain):
      raise ValueError(f"{folder / CONFIG} has {field}={value!r}: only {plain!r} is supported")
  for field in ("r", "lora_alpha"):
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
      raise ValueError(f"{folder / CONFIG} has {field}={value!r}: need a number above 0")
  return config


def load(folder: Path, model: Qwen3Config) -> tuple[lora.Adapter, dict]:
  """The adapter of a PEFT folder and its arrays, on the host, in the dtype of the file.

  Raises FileNotFoundError or ValueError, one line, when files are missing or damaged, or tensors do
  not belong to `model`.
  """
  config = read_config(folder)
  rank, alpha = int(config["r"]), float(config["lora_alpha"])
  if config.get("use_rslora"):
    alpha *= math.sqrt(rank)  # there the scale is alpha / sqrt(r)
  if not (folder / WEIGHTS).is_file():
    raise FileNotFoundError(f"{folder / WEIGHTS} does not exist: give a folder that PEFT saved")
  try:
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
  except Exception as error:  # the library raises its own kind
    reason = " ".join(str(error).split())
    raise ValueError(f"{folder / WEIGHTS} is not whole ({reason}): download it again") from None
  modules = {re.sub(r".*\.(\w+)\.lora_[AB]\.weight", r"\1", name) for name in tensors}
  targets = tuple(path for path in lora.TARGETS if path.split(".")[-1] in modules)
  adapter = lora.Adapter(rank, alpha, targets)
  expected = {
    tensor_name(path, layer): (path, shape)
    for path, shape in lora.adapter_shapes(adapter, model).items()
    for layer in range(shape[0])
  }
  for name in sorted(tensors.keys() ^ expected.keys()):
    where = "is missing" if name in expected else "is not of an adapter of this model"
    raise ValueError(f"{name} {where} ({folder / WEIGHTS}): need every layer of {sorted(modules)}")
  if not tensors:
    raise ValueError(f"{folder / WEIGHTS} holds no tensors: it is no adapter")
  layers: dict[str, list] = {}
  for name, (path, shape) in expected.items():
    outer = (rank, math.prod(shape[2:])) if path.endswith(".a") else (math.prod(shape[1:-1]), rank)
    if tensors[name].shape != outer:
      found = list(tensors[name].shape)
      raise ValueError(f"{name} has shape {found}, this model and r={rank} ask for {list(outer)}")
    layers.setdefault(path, []).append(tensors[name].reshape(shape[1:]))
  return adapter, unflatten({path: np.stack(parts) for path, parts in layers.items()})
