"""Weights of Hugging Face folders: read into any sharding, or refused in one line."""

import json

import hf_folders
import jax
import numpy as np
import pytest
import safetensors.numpy
from hf_folders import bits, to_hf, to_jax
from jax.sharding import NamedSharding

from qed_jax import sharding
from qed_jax.model import hf_weights, presets, qwen3

HOW = {"dtype": "float32", "remat": "none", "attention": "xla"}


def read(folder, mesh, dtype=None):
  config = presets.from_hf(hf_weights.read_config(folder), **HOW)
  layout = {
    path: NamedSharding(mesh, sharding.spec(sharding.WEIGHTS, qwen3.DIMS[path], shape, mesh))
    for path, shape in qwen3.shapes(config).items()
  }
  return qwen3.flatten(hf_weights.load(folder, config, qwen3.unflatten(layout), dtype))


# --- into shardings


@pytest.mark.parametrize("axes", [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize("block", [8 * 2**20, 3000])
def test_sharded_reading_equals_the_file(monkeypatch, tmp_path, axes, block):
  """Every shard of every parameter, whatever the mesh and however small the blocks."""
  monkeypatch.setattr(hf_weights, "BLOCK_BYTES", block)
  folder = hf_folders.make(tmp_path / "m", tie_word_embeddings=False, shard="9KB", vocab_size=64)
  params = read(folder, sharding.make_mesh(*axes))
  expected = bits(folder)
  assert any(not x.is_fully_replicated for x in params.values())
  seen = set()
  for path, array in params.items():
    host = np.asarray(array)
    layers = range(len(host)) if path.startswith("layers") else [None]
    for layer in layers:
      name = hf_weights.hf_name(path, layer)
      seen.add(name)
      assert host[layer].tobytes() == expected[name][2], name
  assert seen == expected.keys()


def test_reading_casts_or_keeps_the_widest_dtype(tmp_path):
  folder = hf_folders.make(tmp_path / "m")
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  arrays["model.norm.weight"] = np.full(32, 1 / 3, np.float32)
  safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  kept, cast = read(folder, mesh), read(folder, mesh, "bfloat16")
  assert {str(x.dtype) for x in kept.values()} == {"float32"}
  assert {str(x.dtype) for x in cast.values()} == {"bfloat16"}
  np.testing.assert_array_equal(kept["norm"], arrays["model.norm.weight"])
  np.testing.assert_array_equal(
    kept["embed_tokens"], arrays["model.embed_tokens.weight"].astype(np.float32)
  )


def test_a_head_beside_a_tied_embedding_must_equal_it(tmp_path):
  folder = hf_folders.make(tmp_path / "m")
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
  save = safetensors.numpy.save_file
  save(arrays, folder / "model.safetensors", {"format": "pt"})
  back = to_hf(to_jax(folder, tmp_path / "jax"), tmp_path / "back")
  assert bits(back).keys() == bits(folder).keys() - {"lm_head.weight"}
  arrays["lm_head.weight"][66, 31] += 1
  save(arrays, folder / "model.safetensors", {"format": "pt"})
  with pytest.raises(ValueError, match="lm_head.weight .* differs from model.embed_tokens.weight"):
    read(folder, sharding.make_mesh(1, 1, 1, jax.devices()[:1]))


# --- what is refused


def rewrite(folder, change):
  """Changes the dictionary of tensors of a folder with one shard."""
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  change(arrays)
  safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})


def reindex(folder, change):
  """Changes the index of a folder with several shards."""
  index = json.loads((folder / "model.safetensors.index.json").read_text())
  change(index["weight_map"])
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shorten(file, size):
  file.write_bytes(file.read_bytes()[:size])


UP = "model.layers.1.mlp.up_proj.weight"
ONE_FILE = {
  "missing": (
    lambda f: rewrite(f, lambda a: a.pop(UP)),
    f"{UP} is missing: config.json asks for shape [48, 32], found none",
  ),
  "extra": (
    lambda f: rewrite(f, lambda a: a.update(spare=np.zeros((3, 5), np.float32))),
    "spare with shape [3, 5] is not in this model",
  ),
  "extra layer": (
    lambda f: hf_folders.edit(f, num_hidden_layers=1, layer_types=["full_attention"]),
    "model.layers.1.input_layernorm.weight with shape [32] is not in this model",
  ),
  "missing layer": (
    lambda f: hf_folders.edit(f, num_hidden_layers=10**15),
    "model.layers.2.input_layernorm.weight is missing: config.json asks for shape [32]",
  ),
  "misshapen": (
    lambda f: rewrite(f, lambda a: a.update({UP: a[UP].T.copy()})),
    f"{UP} has shape [32, 48], config.json asks for [48, 32]",
  ),
  "no head": (
    lambda f: hf_folders.edit(f, tie_word_embeddings=False),
    "lm_head.weight is missing: config.json asks for shape [67, 32], found none",
  ),
  "whole numbers": (
    lambda f: rewrite(f, lambda a: a.update({UP: np.ones((48, 32), np.int8)})),
    f"{UP} is stored as I8: need one of BF16, F16, F32, F64",
  ),
  "truncated": (
    lambda f: shorten(f / "model.safetensors", -100),
    "model.safetensors is not a whole safetensors file",
  ),
  "empty file": (
    lambda f: shorten(f / "model.safetensors", 0),
    "model.safetensors is not a whole safetensors file",
  ),
  "no weights": (
    lambda f: (f / "model.safetensors").unlink(),
    "has neither model.safetensors nor model.safetensors.index.json",
  ),
  "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
  "config of another model": (
    lambda f: hf_folders.edit(f, model_type="llama"),
    "model_type='llama': need 'qwen3'",
  ),
  "config cut short": (lambda f: shorten(f / "config.json", 50), "config.json is not JSON"),
  "scaled rope": (
    lambda f: hf_folders.edit(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
    "rope type='yarn': only 'default'",
  ),
  "no theta": (lambda f: hf_folders.edit(f, rope_parameters=None), "lacks rope_theta"),
  "a size that is text": (
    lambda f: hf_folders.edit(f, hidden_size="32"),
    "hidden_size='32': need a number above 0",
  ),
  "heads that do not divide": (
    lambda f: hf_folders.edit(f, num_key_value_heads=3),
    "num_attention_heads=4 and num_key_value_heads=3",
  ),
}
SEVERAL_FILES = {
  "absent shard": (
    lambda f: min(f.glob("*.safetensors")).unlink(),
    ".safetensors does not exist: model.safetensors.index.json puts model.",
  ),
  "path in the index": (
    lambda f: reindex(f, lambda m: m.update({UP: "../outside.safetensors"})),
    f"puts {UP} into '../outside.safetensors': need the name of a file beside it",
  ),
  "absolute path in the index": (
    lambda f: reindex(f, lambda m: m.update({UP: "/etc/passwd"})),
    f"puts {UP} into '/etc/passwd'",
  ),
  "number in the index": (lambda f: reindex(f, lambda m: m.update({UP: 3})), f"puts {UP} into 3"),
  "name not in its shard": (
    lambda f: reindex(f, lambda m: m.update(spare=m[UP])),
    "spare is missing from model-000",
  ),
  "name not in the index": (
    lambda f: reindex(f, lambda m: m.pop("model.norm.weight")),
    "holds model.norm.weight [32], which model.safetensors.index.json puts into no file",
  ),
  "index without a map": (
    lambda f: (f / "model.safetensors.index.json").write_text("{}"),
    "has no weight_map",
  ),
  "index that is a list": (
    lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000),
    "index.json is not JSON",
  ),
}


@pytest.mark.parametrize("case", [*ONE_FILE, *SEVERAL_FILES])
def test_damage_is_named_in_one_line_and_nothing_is_written(capsys, tmp_path, case):
  damage, expected = (ONE_FILE | SEVERAL_FILES)[case]
  (tmp_path / "outside.safetensors").write_bytes(b"")
  folder = hf_folders.make(tmp_path / "m", shard="5GB" if case in ONE_FILE else "5KB")
  damage(folder)
  with pytest.raises(SystemExit) as stop:
    to_jax(folder, tmp_path / "jax")
  error = capsys.readouterr().err.strip()
  assert stop.value.code == 2
  assert expected in error and "\n" not in error
  assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "outside.safetensors"]


def test_random_damage_never_crashes(tmp_path):
  """400 mutations of header, lengths and index: refused in one line, or the model still fits."""
  single = hf_folders.make(tmp_path / "single")
  several = hf_folders.make(tmp_path / "several", shard="9KB")
  config = presets.from_hf(hf_weights.read_config(single), **HOW)
  files = [single / "model.safetensors", several / "model.safetensors.index.json"]
  rng = np.random.default_rng(0)
  refused = 0
  for file in files:
    original = file.read_bytes()
    reach = min(len(original), 4000)  # the header; the weights themselves may be anything
    for _ in range(200):
      damaged = bytearray(original)
      for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(8 if rng.random() < 0.5 else reach))
        kind = rng.integers(3)
        if kind == 0:
          damaged[at] = int(rng.integers(256))
        elif kind == 1:
          del damaged[at : at + int(rng.integers(1, 9))]
        else:
          damaged[at:at] = bytes(rng.choice(list(b'0123456789[]{}",:./\\ '), 3).astype(np.uint8))
      file.write_bytes(damaged)
      try:
        hf_weights.check(file.parent, config)
      except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error)
        refused += 1
    file.write_bytes(original)
  assert refused > 300
