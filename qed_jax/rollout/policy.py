"""Where a policy comes from: random, a workdir of this program, a Hugging Face folder or hub id.

A workdir describes its policy in `model/` (config.json and tokenizer files, as Hugging Face names
them) and holds it in `checkpoints/`; convert.py writes the same layout. Where an adapter was
trained the checkpoints hold it alone, and `model/adapter.json` says which policy it changes: its
name, and a fingerprint of its weights, without which no adapter is used.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding

from qed_jax import checkpoint, checksums, optim, sharding
from qed_jax.data.tokenizer import Tokenizer
from qed_jax.model import hf_weights, lora, presets, qwen3

SMALLER = "use configs/...:tiny on a laptop, :colab on one 16 GB chip, or more devices"
DESCRIPTION = "model"
ADAPTER = "adapter.json"


@dataclasses.dataclass(frozen=True)
class Start:
  """kind: "random", "workdir" or "hf". folder: of config.json and tokenizer files.

  checkpoint: of a workdir, one step to read or, if None, the newest whole one.
  """

  kind: str
  name: str
  folder: epath.Path | None = None
  revision: str | None = None
  checkpoint: epath.Path | None = None


@dataclasses.dataclass(frozen=True)
class Base:
  """What an adapter changes. name, revision: as config.init has them; a hub id's is the commit.

  dtype: that it was frozen in. fingerprint: of its parameters in that dtype.
  """

  name: str
  revision: str
  dtype: str
  fingerprint: str


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
  adapter = lora.from_config(config.lora)
  trained = count if adapter is None else lora.count(adapter, model)
  parameter = jnp.dtype(config.model.param_dtype).itemsize
  moments = optim.moment_bytes(config.optimizer.mu_dtype, config.optimizer.second_moment)
  needed = trained * (2 * parameter + moments) / 1e9
  if adapter is not None:
    copies = 2 if config.job != "sft" and config.lora.sampler == "merged" else 1
    needed += copies * count * jnp.dtype(config.model.dtype).itemsize / 1e9
  device, devices = jax.local_devices()[0], jax.device_count()
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    available = stats["bytes_limit"] * devices / 1e9
  else:
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
  if needed > available:
    raise ValueError(
      f"{name} has {count / 1e9:.2f}B parameters"
      f"{'' if adapter is None else f', of an adapter {trained / 1e6:.1f}M are trained'}: "
      "weights, gradients and optimizer need "
      f"{needed:.0f} GB, this run has {available:.0f} GB ({devices} x {device.device_kind}): "
      f"{SMALLER}"
    )


def abstract_params(model: qwen3.Qwen3Config, mesh, dtype: str) -> dict:
  """The parameters as ShapeDtypeStructs with the trainer's shardings."""
  return _abstract(qwen3.shapes(model), qwen3.DIMS, mesh, dtype)


def abstract_adapter(adapter: lora.Adapter, model: qwen3.Qwen3Config, mesh, dtype: str) -> dict:
  """The same of an adapter's factors."""
  return _abstract(lora.adapter_shapes(adapter, model), lora.letters(adapter), mesh, dtype)


def _abstract(shapes: dict, letters: dict, mesh, dtype: str) -> dict:
  def one(path, shape):
    layout = NamedSharding(mesh, sharding.spec(sharding.WEIGHTS, letters[path], shape, mesh))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

  return qwen3.unflatten({path: one(path, shape) for path, shape in shapes.items()})


def load_params(start: Start, model: qwen3.Qwen3Config, abstract: dict, seed: int) -> dict:
  """The parameters, made or read straight into their shardings."""
  dtype = jax.tree.leaves(abstract)[0].dtype
  layout = jax.tree.map(lambda x: x.sharding, abstract)
  described = read_adapter(start)
  if described is not None:
    return _merged(start, *described, model, abstract, seed)
  if start.kind == "workdir":
    return checkpoint.read_params(start.checkpoint or start.folder.parent, abstract)
  if start.kind == "hf":
    folder = start.folder
    if start.revision is not None:
      folder = huggingface_hub.snapshot_download(
        start.name, revision=start.revision, allow_patterns=["*.json", "*.safetensors"]
      )
    return hf_weights.load(folder, model, layout, dtype)
  make = jax.jit(lambda key: qwen3.init_params(model, key, dtype), out_shardings=layout)
  return make(jax.random.key(seed))


def _merged(start: Start, adapter: lora.Adapter, base: Base, model, abstract: dict, seed: int):
  """A workdir's adapter added to the policy that it changes, in the dtype it was trained in."""
  leaf, layout = jax.tree.leaves(abstract)[0], jax.tree.map(lambda x: x.sharding, abstract)
  as_frozen = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, base.dtype, sharding=x.sharding), abstract
  )
  frozen = load_base(start, base, model, as_frozen, seed)
  own = abstract_adapter(adapter, model, leaf.sharding.mesh, "float32")
  trained = checkpoint.read_params(start.checkpoint or start.folder.parent, own)

  def merge(frozen, trained):
    return lora.merge(lora.attach(frozen, trained, adapter.scale), leaf.dtype)

  in_place = (0,) if leaf.dtype == base.dtype else ()
  return jax.jit(merge, donate_argnums=in_place, out_shardings=layout)(frozen, trained)


def read_adapter(start: Start) -> tuple[lora.Adapter, Base] | None:
  """What a workdir's adapter.json says; None where there is none. ValueError if it is damaged."""
  if start.kind != "workdir" or not (start.folder / ADAPTER).exists():
    return None
  try:
    record = json.loads((start.folder / ADAPTER).read_text())
    adapter = lora.parse(record["rank"], record["alpha"], ",".join(record["targets"]))
    return adapter, Base(**record["base"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{start.folder / ADAPTER} cannot be read ({type(error).__name__}: {error}): "
      "copy the workdir again"
    ) from None


def save_adapter(folder: epath.Path, adapter: lora.Adapter, base: Base) -> None:
  """Writes adapter.json, or raises ValueError, one line, when the folder's is of another base."""
  known = read_adapter(Start("workdir", str(folder.parent), folder))
  if known is not None and known[1].fingerprint != base.fingerprint:
    raise ValueError(
      f"{folder.parent} has an adapter of {_says(known[1])}, and config.init is now {_says(base)}: "
      "give that base back, or use another --workdir"
    )
  if jax.process_index() == 0 and known is None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {**dataclasses.asdict(adapter), "base": dataclasses.asdict(base)}
    unfinished = folder / f"{ADAPTER}.tmp"
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    unfinished.replace(folder / ADAPTER)


def _says(base: Base) -> str:
  revision = f" at {base.revision}" if base.revision else ""
  return f"{base.name}{revision} (fingerprint {base.fingerprint} in {base.dtype})"


def load_base(start: Start, base: Base, model, abstract: dict, seed: int) -> dict:
  """The policy that the adapter of `start` changes; ValueError, one line, if it is another now."""
  origin = locate_base(start, base)
  frozen = load_params(origin, model, abstract, seed)
  found = fingerprint(origin, model, frozen)
  if found != base.fingerprint:
    raise ValueError(
      f"{start.name} is an adapter of {_says(base)}, and {origin.name} now has the fingerprint "
      f"{found}: it has changed since; put the base back as it was"
    )
  return frozen


def locate_base(start: Start, base: Base) -> Start:
  """As `locate`; says whose base is missing, and where a new place for it is written."""
  try:
    return locate(base.name, base.revision, f"the base of {start.name}")
  except ValueError as error:
    raise ValueError(f"{error}; if it lies elsewhere, change {start.folder / ADAPTER}") from None


def fingerprint(start: Start, model: qwen3.Qwen3Config, params: dict) -> str:
  """Stands for the policy that was loaded from `start`; of an adapter, for its base and itself.

  What was merged is not looked at: its last bits may depend on the device that merged it.
  """
  described = read_adapter(start)
  if described is None:
    return checksums.fingerprint(qwen3.flatten(params))
  adapter, base = described
  own = abstract_adapter(adapter, model, jax.tree.leaves(params)[0].sharding.mesh, "float32")
  trained = checkpoint.read_params(start.checkpoint or start.folder.parent, own)
  parts = base.fingerprint + checksums.fingerprint(qwen3.flatten(trained))
  return hashlib.sha256(parts.encode()).hexdigest()[:16]


def check_adapter(adapter: lora.Adapter | None, start: Start, model: qwen3.Qwen3Config) -> None:
  """Raises ValueError, one line, when an adapter cannot be trained from there."""
  if adapter is None:
    return
  lora.check_rank(adapter, model)
  if start.kind == "random":
    raise ValueError(
      f"config.lora.rank is {adapter.rank} and config.init is empty: an adapter changes weights "
      "that are trained already; set config.init, or config.lora.rank=0"
    )


def abstract_trained(adapter: lora.Adapter | None, model, mesh, dtype: str) -> dict:
  """What is trained: an adapter, or all parameters."""
  if adapter is None:
    return abstract_params(model, mesh, dtype)
  return abstract_adapter(adapter, model, mesh, dtype)


def goes_on(start: Start, adapter: lora.Adapter, model: qwen3.Qwen3Config) -> Base | None:
  """The base of the adapter that `start` holds, where training goes on with that adapter.

  It does if rank, alpha, targets and the frozen dtype are the same; otherwise what `start` holds is
  merged and frozen, which rounds it to that dtype.
  """
  described = read_adapter(start)
  if described is None or described[0] != adapter or described[1].dtype != model.dtype:
    return None
  return described[1]


def load_frozen(adapter: lora.Adapter, start: Start, model, mesh, seed: int) -> tuple[dict, Base]:
  """What an adapter that begins at `start` changes, in the compute dtype, and the name for it."""
  abstract = abstract_params(model, mesh, model.dtype)
  base = goes_on(start, adapter, model)
  if base is not None:
    return load_base(start, base, model, abstract, seed), base
  frozen = load_params(start, model, abstract, seed)
  commit = start.folder.name if start.revision is not None else ""
  name = start.name if start.revision is not None else str(epath.Path(start.name).resolve())
  return frozen, Base(name, commit, model.dtype, fingerprint(start, model, frozen))


def load_trained(adapter: lora.Adapter | None, start: Start, model, abstract: dict, seed: int):
  """What is trained, as it is at first: all parameters, the adapter of `start`, or a fresh one."""
  if adapter is None:
    return load_params(start, model, abstract, seed)
  leaf = jax.tree.leaves(abstract)[0]
  if goes_on(start, adapter, model) is not None:
    return checkpoint.read_params(start.checkpoint or start.folder.parent, abstract)
  make = functools.partial(lora.init_adapter, adapter, model, dtype=leaf.dtype)
  return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(
    jax.random.key(seed)
  )


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
