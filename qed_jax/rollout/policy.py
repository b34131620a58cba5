"""Where a policy comes from: random, a workdir of this program, a Hugging Face folder or hub id.

A workdir describes its policy in `model/` (config.json and tokenizer files, as Hugging Face names
them) and holds it in `checkpoints/`; convert.py writes the same layout.
"""

import dataclasses
import json
import math
import os
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding

from qed_jax import checkpoint, optim, sharding
from qed_jax.data.tokenizer import Tokenizer
from qed_jax.model import hf_weights, presets, qwen3

SMALLER = "use configs/...:tiny on a laptop, :colab on one 16 GB chip, or more devices"
DESCRIPTION = "model"


@dataclasses.dataclass(frozen=True)
class Start:
  """kind: "random", "workdir" or "hf". folder: of config.json and tokenizer files."""

  kind: str
  name: str
  folder: epath.Path | None = None
  revision: str | None = None


def locate(init: str, revision: str, field: str = "config.init") -> Start:
  """Finds what a config field names; of a hub id only the small files are fetched.

  Raises ValueError, one line, when it names nothing that can be opened.
  """
  if not init:
    return Start("random", "random parameters")
  path = epath.Path(init)
  if (path / DESCRIPTION / "config.json").exists():
    return Start("workdir", init, path / DESCRIPTION)
  if (path / "config.json").exists() and list(path.glob("*.safetensors")):
    return Start("hf", init, path)
  if path.exists() or init.count("/") != 1 or init.startswith((".", "/")):
    raise ValueError(
      f"{field} is {init!r}: neither a workdir (with model/ and checkpoints/) nor a folder of "
      "safetensors with config.json"
    )
  try:
    folder = huggingface_hub.snapshot_download(
      init, revision=revision, allow_patterns=["*.json", "*.jinja", "merges.txt", "vocab.json"]
    )
  except Exception as error:  # the hub client raises many kinds; all of them mean "not there"
    why = str(error).strip().splitlines()[0][:160]
    raise ValueError(
      f"{field} is {init!r} (revision {revision}), which is no folder here and could not be "
      f"fetched ({type(error).__name__}: {why}): download it and give the folder, or {SMALLER}"
    ) from None
  return Start("hf", init, epath.Path(folder), revision)


def sizes(start: Start, block) -> qwen3.Qwen3Config:
  """The model config: sizes from config.json, or from the preset for random parameters."""
  how = {"dtype": block.dtype, "remat": block.remat, "attention": block.attention}
  if start.kind == "random":
    if not block.preset:
      raise ValueError("config.init and config.model.preset are both empty: give one of them")
    return presets.from_preset(block.preset, **how)
  if start.kind == "hf":
    return presets.from_hf(hf_weights.read_config(start.folder), **how)
  return presets.from_hf(json.loads((start.folder / "config.json").read_text()), **how)


def check_vocabulary(model: qwen3.Qwen3Config, tokenizer: Tokenizer) -> None:
  """Raises ValueError when the tokenizer has ids that the embedding lacks."""
  if tokenizer.vocab_size > model.vocab_size:
    raise ValueError(
      f"the tokenizer has {tokenizer.vocab_size} ids, the model's embedding {model.vocab_size} "
      "rows: they do not belong together; set config.tokenizer to the model's own"
    )


def check_memory(config) -> None:
  """Raises ValueError, one line, when weights, gradients and optimizer state cannot fit here.

  Needs no download: the sizes come from the preset that config.init or config.model names; a model
  without one is not checked. Activations and the KV cache come on top.
  """
  name = config.model.preset or config.init.rstrip("/").split("/")[-1].lower()
  if name not in presets.PRESETS:
    return
  model = presets.from_preset(name, dtype="bfloat16", remat="layer", attention="auto")
  count = sum(math.prod(shape) for shape in qwen3.shapes(model).values())
  parameter = jnp.dtype(config.model.param_dtype).itemsize
  moments = optim.moment_bytes(config.optimizer.mu_dtype, config.optimizer.second_moment)
  needed = count * (2 * parameter + moments) / 1e9
  device, devices = jax.devices()[0], jax.device_count()
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    available = stats["bytes_limit"] * devices / 1e9
  else:
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
  if needed > available:
    raise ValueError(
      f"{name} has {count / 1e9:.2f}B parameters: weights, gradients and optimizer need "
      f"{needed:.0f} GB, this run has {available:.0f} GB ({devices} x {device.device_kind}): "
      f"{SMALLER}"
    )


def abstract_params(model: qwen3.Qwen3Config, mesh, dtype: str) -> dict:
  """The parameters as ShapeDtypeStructs with the trainer's shardings."""
  shapes = qwen3.shapes(model)
  letters = {path: qwen3.DIMS[path] for path in shapes}
  layout = {
    path: NamedSharding(
      mesh, sharding.spec(sharding.WEIGHTS, letters[path], shape, mesh)
    )
    for path, shape in shapes.items()
  }  # fmt: skip
  return qwen3.unflatten(
    {p: jax.ShapeDtypeStruct(s, dtype, sharding=layout[p]) for p, s in shapes.items()}
  )


def load_params(start: Start, model: qwen3.Qwen3Config, abstract: dict, seed: int) -> dict:
  """The parameters, made or read straight into their shardings."""
  dtype = jax.tree.leaves(abstract)[0].dtype
  layout = jax.tree.map(lambda x: x.sharding, abstract)
  if start.kind == "workdir":
    return checkpoint.read_params(start.folder.parent, abstract)
  if start.kind == "hf":
    folder = start.folder
    if start.revision is not None:
      folder = huggingface_hub.snapshot_download(
        start.name, revision=start.revision, allow_patterns=["*.json", "*.safetensors"]
      )
    return hf_weights.load(folder, model, layout, dtype)
  make = jax.jit(lambda key: qwen3.init_params(model, key, dtype), out_shardings=layout)
  return make(jax.random.key(seed))


def save_description(folder: epath.Path, model: qwen3.Qwen3Config, tokenizer: Tokenizer) -> None:
  """Writes model/: config.json and the tokenizer files; whoever opens the workdir reads them."""
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(Path(folder))
    config = presets.to_hf(
      model,
      eos_ids=tokenizer.stop_ids,
      bos_id=None,
      pad_id=tokenizer.pad_id,
      dtype="bfloat16",
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
