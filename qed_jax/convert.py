"""Hugging Face folders to qed_jax and back, bit for bit.

  python -m qed_jax.convert --to=jax --src=Qwen/Qwen3-0.6B --revision=HASH --dst=models/qwen
  python -m qed_jax.convert --to=hf --src=runs/cache_rl --dst=exports/my-prover
  python -m qed_jax.convert --to=peft --src=runs/lora --dst=exports/my-adapter

`--to=jax` makes a folder in the layout of a training workdir, for `config.init`: checkpoints/ with
the parameters, model/ with config.json and the tokenizer. `--to=hf` takes such a folder, a workdir,
or one step of its checkpoints, and makes a folder that transformers opens unedited; an adapter that
was trained is merged. `--to=peft` writes the adapter alone, as PEFT keeps it, and `--to=jax` takes
such a folder too. The result is written beside its place and renamed at the end: a kill leaves
nothing that looks like a model.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from qed_jax import checkpoint, flags, sharding
from qed_jax.data import hub, tokenizer
from qed_jax.model import hf_weights, lora, peft_folder, presets, qwen3
from qed_jax.model.card import adapter_card, card
from qed_jax.rollout import policy

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "*.model", "LICENSE*", "README.md")
# Beside config.json. The source's README.md stays in model/, for the licence and the base model.
COPIED = (*tokenizer.HUGGING_FACE_FILES, "generation_config.json", "LICENSE")
DTYPES = ("bfloat16", "float16", "float32")
SHARD = "5GB"
FLOAT32 = {"dtype": "float32", "remat": "none", "attention": "auto"}


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    flags.fail(ValueError(f"{message}; see --help"))


def main(argv: list[str]) -> None:
  parser = _Parser(
    prog="python -m qed_jax.convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--to", required=True, choices=("jax", "hf", "peft"))
  parser.add_argument("--src", required=True, help="folder; with --to=jax also a hub id")
  parser.add_argument("--dst", required=True, help="folder to make; must not exist, or be empty")
  parser.add_argument("--revision", help="commit of a hub id")
  parser.add_argument("--dtype", choices=DTYPES, help="cast to it; the source's if not given")
  parser.add_argument("--max_shard_size", default=SHARD, help=f"with --to=hf; {SHARD} if not given")
  parser.add_argument("--base", help="what a PEFT adapter changes, if not what it names itself")
  args = parser.parse_args(argv)
  jax.config.update("jax_platforms", "cpu")  # conversion is the host's work
  try:
    if "://" in args.dst:
      raise ValueError(f"--dst={args.dst} is not a local path: convert here, then copy the folder")
    if args.to == "jax" and (Path(args.src) / peft_folder.CONFIG).is_file():
      from_peft(Path(args.src), Path(args.dst), args.base, args.revision, args.dtype)
    elif args.to == "peft":
      to_peft(Path(args.src), Path(args.dst), args.dtype)
    elif args.to == "jax":
      to_jax(args.src, Path(args.dst), args.revision, args.dtype)
    else:
      to_hf(Path(args.src), Path(args.dst), args.dtype, args.max_shard_size)
  except (ValueError, RuntimeError, OSError) as error:
    flags.fail(error)


def to_jax(source: str, destination: Path, revision: str | None, dtype: str | None) -> None:
  """HF folder or hub id -> a folder of checkpoints/ and model/. Raises as hf_weights.load."""
  _check_free(destination)
  folder = Path(source)
  if not folder.is_dir():
    if not hub.is_hub_id(source):
      raise FileNotFoundError(f"{source} does not exist: give a folder or a hub id")
    folder = hub.fetch(source, kind="model", revision=revision, patterns=HUB_FILES)
  if (folder / "model" / "config.json").is_file():
    raise ValueError(f"{folder} is a folder of qed_jax already: --to=hf takes it back")
  described = hf_weights.read_config(folder)
  config = presets.from_hf(described, **FLOAT32)
  dtype = dtype or hf_weights.widest_dtype(hf_weights.check(folder, config).values())
  params = hf_weights.load(folder, config, _layout(config), dtype)
  with _unfinished(destination) as partial:
    _describe(partial / "model", folder, config, described, dtype)
    if (folder / "README.md").is_file():
      shutil.copyfile(folder / "README.md", partial / "model" / "README.md")
    record = {"job": "convert", "init": source, "init_revision": revision, "dtype": dtype}
    _write_json(partial / "config.json", record)
    checkpoints = checkpoint.Checkpoints(partial / "checkpoints", keep=1)
    checkpoints.save(0, {"params": params})
    checkpoints.close()
  _report(destination, config, dtype)


def to_hf(source: Path, destination: Path, dtype: str | None, max_shard_size: str) -> None:
  """Workdir or checkpoint -> HF folder. Raises ValueError, RuntimeError or OSError in one line."""
  _check_free(destination)
  workdir = _workdir(source)
  described = hf_weights.read_json(workdir / "model" / "config.json")
  config = presets.from_hf(described, **FLOAT32)
  dtype = dtype or described.get("dtype")
  if dtype not in DTYPES:
    raise ValueError(f"{workdir}/model/config.json has dtype={dtype!r}: give --dtype=bfloat16")
  start = policy.Start("workdir", str(workdir), epath.Path(workdir / "model"), None, source)
  abstract = policy.abstract_params(config, _one_device().mesh, dtype)
  params = policy.load_params(start, config, abstract, seed=0)
  with _unfinished(destination) as partial:
    hf_weights.save(partial, config, params, dtype, max_shard_size)
    text = card(destination.name, config, hf_weights.count(config), dtype, workdir)
    (partial / "README.md").write_text(text)
    _describe(partial, workdir / "model", config, described, dtype)
  _report(destination, config, dtype)


def to_peft(source: Path, destination: Path, dtype: str | None) -> None:
  """The adapter of a workdir or checkpoint -> a folder that PEFT opens. Raises as to_hf."""
  _check_free(destination)
  workdir = _workdir(source)
  start = policy.Start("workdir", str(workdir), epath.Path(workdir / "model"))
  described = policy.read_adapter(start)
  if described is None:
    raise ValueError(f"{workdir} holds whole weights and no adapter: use --to=hf")
  adapter, base = described
  config = presets.from_hf(hf_weights.read_json(workdir / "model" / "config.json"), **FLOAT32)
  own = policy.abstract_adapter(adapter, config, _one_device().mesh, dtype or "float32")
  trained = checkpoint.read_params(source, own)
  name = base.name if hub.is_hub_id(base.name) else Path(base.name).name
  with _unfinished(destination) as partial:
    peft_folder.save(partial, adapter, trained, name, base.revision)
    (partial / "README.md").write_text(adapter_card(destination.name, adapter, base.name, workdir))
  print(f"wrote {destination}: an adapter of {lora.count(adapter, config):,} parameters for {name}")


def from_peft(
  source: Path, destination: Path, base: str | None, revision: str | None, dtype: str | None
) -> None:
  """A PEFT folder -> a workdir with that adapter. Raises as to_jax.

  dtype: that the base is frozen in; its own if None.
  """
  _check_free(destination)
  described = peft_folder.read_config(source)
  name = base or described.get("base_model_name_or_path")
  if not name:
    raise ValueError(f"{source / peft_folder.CONFIG} names no base model: give --base")
  revision = revision or (not base and described.get("revision")) or "main"
  start = policy.locate(name, revision, "--base")
  of_base = hf_weights.read_json(Path(start.folder) / "config.json")
  dtype = dtype or of_base.get("dtype") or of_base.get("torch_dtype") or "bfloat16"
  model = presets.from_hf(of_base, dtype=dtype, remat="none", attention="auto")
  adapter, arrays = peft_folder.load(source, model)
  mesh = _one_device().mesh
  _, of = policy.load_frozen(adapter, start, model, mesh, seed=0)
  with _unfinished(destination) as partial:
    _describe(partial / "model", Path(start.folder), model, of_base, dtype)
    policy.save_adapter(epath.Path(partial / "model"), adapter, of)
    record = {"job": "convert", "init": str(source), "init_revision": None, "dtype": dtype}
    _write_json(partial / "config.json", record)
    checkpoints = checkpoint.Checkpoints(partial / "checkpoints", keep=1)
    checkpoints.save(0, {"params": jax.device_put(arrays, _one_device())})
    checkpoints.close()
  print(f"wrote {destination}: an adapter of {lora.count(adapter, model):,} parameters for {name}")


def _workdir(source: Path) -> Path:
  """The folder with model/ and checkpoints/ that `source` is, or lies in."""
  source = source.absolute()
  for folder in (source, source.parent, source.parent.parent):
    if (folder / "model" / "config.json").is_file() and (folder / "checkpoints").is_dir():
      return folder
  raise FileNotFoundError(
    f"{source} is no workdir and no checkpoint in one: need checkpoints/ and model/config.json"
  )


def _describe(folder: Path, source: Path, config, described: dict, dtype: str) -> None:
  """Tokenizer files, generation_config.json and, last, config.json."""
  folder.mkdir(exist_ok=True)
  for name in COPIED:
    if (source / name).is_file():
      shutil.copyfile(source / name, folder / name)
  ids = described.get("eos_token_id")
  stop_ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
  if not (folder / "tokenizer_config.json").is_file():
    print(f"note: no tokenizer files in {source}, so the result has none", flush=True)
  elif not (folder / "generation_config.json").is_file():
    stop_ids = tokenizer.load(folder).stop_ids
  bos_id, pad_id = described.get("bos_token_id"), described.get("pad_token_id")
  if not (folder / "generation_config.json").is_file():
    generation = {
      "bos_token_id": bos_id,
      "eos_token_id": list(stop_ids) or None,
      "pad_token_id": pad_id,
      "do_sample": True,
      "temperature": 0.6,
      "top_p": 0.95,
    }
    _write_json(
      folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None}
    )
  hf = presets.to_hf(config, eos_ids=stop_ids, bos_id=bos_id, pad_id=pad_id, dtype=dtype)
  _write_json(folder / "config.json", hf)


def _check_free(destination: Path) -> None:
  if destination.is_dir() and not any(destination.iterdir()):
    return
  if destination.exists() or destination.is_symlink():
    raise ValueError(f"--dst={destination} exists: nothing is overwritten, give another path")


@contextlib.contextmanager
def _unfinished(destination: Path) -> Iterator[Path]:
  """A folder beside `destination` that takes its place at the end, or is removed on an error.

  What a killed conversion left under this name is removed first.
  """
  destination = destination.absolute()
  partial = destination.parent / f".{destination.name}.unfinished"
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    yield partial
    for path in partial.rglob("*"):
      if path.is_file():
        _sync(path)
    os.rename(partial, destination)
    _sync(destination.parent)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _sync(path: Path) -> None:
  """Flush to disk, so that the rename cannot come before the content."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _write_json(path: Path, value: dict) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")


def _one_device() -> NamedSharding:
  return NamedSharding(sharding.make_mesh(1, 1, 1, jax.devices()[:1]), PartitionSpec())


def _layout(config) -> dict:
  return qwen3.unflatten(dict.fromkeys(qwen3.shapes(config), _one_device()))


def _report(destination: Path, config, dtype: str) -> None:
  tensors = sum(1 for _ in hf_weights.hf_shapes(config))
  print(f"wrote {destination}: {hf_weights.count(config):,} parameters, {tensors} tensors, {dtype}")


if __name__ == "__main__":
  main(sys.argv[1:])
