"""Hugging Face folders come in and go out unchanged, damaged ones not at all."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import hf_folders
import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from jax.sharding import NamedSharding

from qed_jax import convert, sharding
from qed_jax.checkpoint import Checkpoints
from qed_jax.data import tokenizer
from qed_jax.model import hf_weights, presets, qwen3

HOW = {"dtype": "float32", "remat": "none", "attention": "xla"}


def to_jax(source, destination, *flags):
  convert.main(["--to=jax", f"--src={source}", f"--dst={destination}", *flags])
  return destination


def to_hf(source, destination, *flags):
  convert.main(["--to=hf", f"--src={source}", f"--dst={destination}", *flags])
  return destination


def bits(folder) -> dict:
  """{tensor name: (dtype, shape, bytes)} over all shards."""
  found = {}
  for file in Path(folder).glob("*.safetensors"):
    for name, array in safetensors.numpy.load_file(file).items():
      found[name] = (str(array.dtype), array.shape, array.tobytes())
  return found


def read(folder, mesh, dtype=None):
  config = presets.from_hf(hf_weights.read_config(folder), **HOW)
  layout = {
    path: NamedSharding(mesh, sharding.spec(sharding.WEIGHTS, qwen3.DIMS[path], shape, mesh))
    for path, shape in qwen3.shapes(config).items()
  }
  return qwen3.flatten(hf_weights.load(folder, config, qwen3.unflatten(layout), dtype))


def torch_logits(folder):
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
  tokens = torch.arange(40)[None] % 67
  with torch.no_grad():
    return model(input_ids=tokens).logits, model


# --- there and back


@pytest.mark.parametrize(
  "sizes",
  [
    {"tie_word_embeddings": True, "theta": 5e6, "max_position_embeddings": 262_144},
    {"tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 20, "shard": "15KB"},
    {"num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 71, "dtype": "float32"},
  ],
  ids=["tied", "untied 1:1 in shards", "8:1 float32"],
)
def test_every_tensor_returns_bit_for_bit(tmp_path, sizes):
  """HF -> jax -> HF: names, dtypes, shapes, bytes; theta and positions; equal logits in torch."""
  source = hf_folders.make(tmp_path / "source", **sizes)
  if sizes.get("dtype", "bfloat16") == "bfloat16":
    put_odd_values(source)
  back = to_hf(to_jax(source, tmp_path / "jax"), tmp_path / "back", "--max_shard_size=20KB")
  assert bits(back) == bits(source)
  shards = sorted(p.name for p in back.glob("*.safetensors"))
  assert len(shards) > 1 and all(p.stat().st_size < 22_000 for p in back.glob("*.safetensors"))
  assert sorted(p.name for p in back.iterdir()) == sorted(
    [*shards, "README.md", "config.json", "generation_config.json", "model.safetensors.index.json"]
  )
  ours, theirs = (json.loads((f / "config.json").read_text()) for f in (back, source))
  assert ours["rope_theta"] == sizes.get("theta", 1e4) == ours["rope_parameters"]["rope_theta"]
  for field in theirs.keys() - {"layer_types", "transformers_version", "max_window_layers"}:
    assert ours[field] == theirs[field], field


def put_odd_values(folder):
  """Into a norm: not-a-number with a payload, infinity, the smallest subnormal, minus zero."""
  file = next(
    f for f in folder.glob("*.safetensors") if "model.norm.weight" in safetensors.numpy.load_file(f)
  )
  arrays = safetensors.numpy.load_file(file)
  norm = arrays["model.norm.weight"].copy()
  norm.view(np.uint16)[:4] = [0x7FC1, 0x7F80, 0x0001, 0x8000]
  arrays["model.norm.weight"] = norm
  safetensors.numpy.save_file(arrays, file, {"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_the_export_with_equal_logits(tmp_path, tied):
  source = hf_folders.make(tmp_path / "source", theta=5e6, tie_word_embeddings=tied)
  back = to_hf(to_jax(source, tmp_path / "jax"), tmp_path / "back")
  assert (back / "model.safetensors").is_file()
  (before, _), (after, model) = torch_logits(source), torch_logits(back)
  assert torch.equal(before, after)
  assert model.dtype == torch.bfloat16
  assert model.config.rope_parameters["rope_theta"] == 5e6
  assert model.config.max_position_embeddings == 512


def tiny_tokenizer(folder):
  lines = ["prove that one and one are two", "so it is"]
  return tokenizer.train_sentencepiece(lines, folder, vocab_size=67, vocab_multiple=1)


def test_tokenizer_template_and_licence_travel(tmp_path):
  """AutoTokenizer opens the export, the chat template included; the card keeps the licence."""
  source = hf_folders.make(tmp_path / "source")
  ours = tiny_tokenizer(source)
  (source / "LICENSE").write_text("do as you like")
  (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
  back = to_hf(to_jax(source, tmp_path / "jax"), tmp_path / "back")
  for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "LICENSE"):
    assert (back / name).read_bytes() == (source / name).read_bytes(), name
  messages = [{"role": "user", "content": "prove it"}]
  theirs = transformers.AutoTokenizer.from_pretrained(back)
  prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)
  assert prompt["input_ids"] == ours.chat(messages)
  card = huggingface_hub.ModelCard.load(back / "README.md")
  assert card.data.license == "apache-2.0"
  assert card.data.library_name == "transformers"
  assert card.data.pipeline_tag == "text-generation"
  for title in ("Summary", "How to use", "Evaluation", "Training", "Limitations", "License"):
    assert f"## {title}\n" in card.text


@pytest.fixture
def workdir(tmp_path, tiny):
  """A training run's folder: float32 parameters and an optimizer state at two steps."""
  config, params = tiny
  root = tmp_path / "run"
  (root / "model").mkdir(parents=True)
  words = tiny_tokenizer(root / "model")
  described = presets.to_hf(
    config, eos_ids=words.stop_ids, bos_id=None, pad_id=words.pad_id, dtype="bfloat16"
  )
  (root / "model" / "config.json").write_text(json.dumps(described))
  record = {"job": "rl", "init": "someone/base", "data": {"source": "someone/proofs", "rows": 0}}
  (root / "config.json").write_text(json.dumps(record))
  row = {"label": "rl", "scaffold": "direct", "turns": 1, "n": 9, "score": 3.25}
  (root / "eval_summary.json").write_text(json.dumps({"rows": [row | {"low": 2.5, "high": 4.0}]}))
  checkpoints = Checkpoints(root / "checkpoints", keep=2)
  for step in (1, 2):
    scaled = jax.tree.map(lambda x, step=step: x * step, params)
    checkpoints.save(step, {"params": scaled, "opt_state": jax.tree.map(jnp.zeros_like, params)})
  checkpoints.close()
  return root, qwen3.flatten(params), words


@pytest.mark.parametrize("inside, step", [(".", 2), ("checkpoints", 2), ("checkpoints/1", 1)])
def test_a_training_run_is_published(tmp_path, workdir, inside, step):
  """Workdir, checkpoints folder or one step; cast to the dtype that model/config.json names."""
  root, params, _ = workdir
  found = bits(to_hf(root / inside, tmp_path / "out"))
  expected = np.asarray(params["layers.mlp.down_proj"])[1] * step
  assert found["model.layers.1.mlp.down_proj.weight"] == (
    "bfloat16",
    expected.shape,
    expected.astype(ml_dtypes.bfloat16).tobytes(),
  )


def test_the_card_and_generation_config_of_a_run(tmp_path, workdir):
  """base_model, data, scores with intervals; generation stops at the tokenizer's stop ids."""
  root, _, words = workdir
  out = to_hf(root, tmp_path / "out", "--dtype=float32")
  assert {dtype for dtype, _, _ in bits(out).values()} == {"float32"}
  card = huggingface_hub.ModelCard.load(out / "README.md")
  assert card.data.base_model == "someone/base"
  assert card.data.datasets == ["someone/proofs"]
  assert "rl" in card.data.tags
  assert "| rl | direct | 1 | 9 | 3.25 | 2.5 | 4 |" in card.text
  assert str(tmp_path) not in card.text
  generation = transformers.GenerationConfig.from_pretrained(out)
  assert generation.eos_token_id == list(words.stop_ids)
  assert generation.pad_token_id == words.pad_id
  assert (generation.temperature, generation.top_p) == (0.6, 0.95)


def test_an_absolute_path_in_the_config_is_not_published(tmp_path, workdir):
  root, _, _ = workdir
  hf_folders.edit(root, init="", data={"source": "/home/somebody/rows.parquet"})
  text = (to_hf(root, tmp_path / "out") / "README.md").read_text()
  assert "somebody" not in text and '"rows.parquet"' in text and "random weights" in text


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


@pytest.mark.parametrize(
  "flags, expected",
  [
    (["--to=jax", "--src=Qwen/Qwen3-4B", "--dst=new"], "needs a revision"),
    (["--to=jax", "--src=./nowhere", "--dst=new"], "./nowhere does not exist"),
    (["--to=jax", "--src=source", "--dst=source"], "--dst=source exists: nothing is overwritten"),
    (["--to=jax", "--src=source", "--dst=gs://bucket/new"], "is not a local path"),
    (["--to=hf", "--src=source", "--dst=new"], "is no workdir and no checkpoint"),
    (["--to=jax", "--src=source", "--dst=new", "--dtype=int8"], "invalid choice: 'int8'"),
    (["--to=torch", "--src=source", "--dst=new"], "invalid choice: 'torch'"),
    (["--to=hf", "--src=source"], "required: --dst"),
  ],
)
def test_wrong_commands_get_one_line(capsys, monkeypatch, tmp_path, flags, expected):
  monkeypatch.chdir(tmp_path)
  hf_folders.make(tmp_path / "source")
  with pytest.raises(SystemExit) as stop:
    convert.main(flags)
  error = capsys.readouterr().err.strip()
  assert stop.value.code == 2
  assert expected in error and "\n" not in error
  assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_empty_destination_is_taken_a_full_one_is_not(capsys, tmp_path):
  source = hf_folders.make(tmp_path / "source")
  (tmp_path / "empty").mkdir()
  to_jax(source, tmp_path / "empty")
  with pytest.raises(SystemExit):
    to_jax(source, tmp_path / "empty")
  assert "exists" in capsys.readouterr().err


# --- kills and memory, in processes of their own

KILLED = """
import os, sys, time
from qed_jax import convert
from qed_jax.model import hf_weights
stage, source, destination = sys.argv[1:]

def stop(*_):
  print("here", flush=True)
  time.sleep(600)

if stage == "in a shard":
  real = hf_weights._host_blocks
  def blocks(leaf):
    yield from real(leaf)
    stop()
  hf_weights._host_blocks = blocks
elif stage == "before the card":
  convert.card = stop
else:
  convert.os.rename = stop
convert.main(["--to=hf", f"--src={source}", f"--dst={destination}"])
"""


@pytest.mark.parametrize("stage", ["in a shard", "before the card", "before the rename"])
def test_a_kill_leaves_nothing_that_looks_like_a_model(tmp_path, workdir, stage):
  """kill -9 at three points of an export: no destination; the next export cleans up and works."""
  root, _, _ = workdir
  out = tmp_path / "exports" / "model"
  command = [sys.executable, "-c", KILLED, stage, str(root), str(out)]
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
  )
  try:
    assert "here\n" in iter(process.stdout.readline, "")
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert [p.name for p in out.parent.iterdir()] == [".model.unfinished"]
  to_hf(root, out)
  assert [p.name for p in out.parent.iterdir()] == ["model"]
  transformers.AutoModelForCausalLM.from_pretrained(out)


MEMORY = r"""
import json, re, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from qed_jax import sharding
from qed_jax.model import hf_weights, presets, qwen3

def peak():  # not getrusage: its peak is that of the process that started this one, if higher
  return 1024 * int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])

folder, dtype = sys.argv[1:]
layout = NamedSharding(sharding.make_mesh(1, 1, 1, jax.devices()[:1]), PartitionSpec())
config = presets.from_hf(
  {"model_type": "qwen3", "vocab_size": 65_536, "hidden_size": 512, "intermediate_size": 4096,
   "num_hidden_layers": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
   "rope_theta": 1e4, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
   "tie_word_embeddings": True}, dtype="float32", remat="none", attention="xla")
jnp.ones(8).block_until_ready()
start = peak()
if dtype == "write":
  params = {path: jnp.full(shape, 0.5, "bfloat16") for path, shape in qwen3.shapes(config).items()}
  hf_weights.save(folder, config, qwen3.unflatten(params), "bfloat16", "60MB")
else:
  layouts = qwen3.unflatten(dict.fromkeys(qwen3.shapes(config), layout))
  params = qwen3.flatten(hf_weights.load(folder, config, layouts, dtype))
  assert all(bool((x[-1] == 0.5).all()) for x in params.values())
owned = sum(x.nbytes for x in params.values())
largest = params["embed_tokens"].size * 2
print(json.dumps({"extra": peak() - start - owned, "owned": owned, "largest": largest}))
"""


def test_peak_memory_is_the_parameters_and_a_few_blocks(tmp_path):
  """Over what the process owns, less than 1.5 tensors; the largest is 64 MiB of 290 MiB."""

  def measure(mode):
    run = subprocess.run(
      [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path), mode],
      capture_output=True,
      text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])

  for mode in ("write", "bfloat16", "float32"):
    found = measure(mode)
    assert found["largest"] == 2**26 and found["owned"] > 4 * found["largest"]
    assert found["extra"] < 1.5 * found["largest"], (mode, found)
    print(mode, found)
