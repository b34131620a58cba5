"""Hugging Face folders come in and go out unchanged, damaged ones not at all."""

import json
import os
import signal
import subprocess
import sys

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
from hf_folders import bits, to_hf, to_jax

from qed_jax import convert
from qed_jax.checkpoint import Checkpoints
from qed_jax.data import tokenizer
from qed_jax.model import presets, qwen3


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


# --- what is refused


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
import json, re, sys, tempfile
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from qed_jax import sharding
from qed_jax.model import hf_weights, presets, qwen3

def peak():  # not getrusage: its peak is that of the process that started this one, if higher
  return 1024 * int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])

folder, dtype = sys.argv[1:]
layout = NamedSharding(sharding.make_mesh(1, 1, 1, jax.devices()[:1]), PartitionSpec())

def config_of(vocab, width, mlp, layers):
  return presets.from_hf(
    {"model_type": "qwen3", "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp,
     "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
     "head_dim": 128, "rope_theta": 1e4, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
     "tie_word_embeddings": True}, dtype="float32", remat="none", attention="xla")

def write(config, folder):
  params = {path: jnp.full(shape, 0.5, "bfloat16") for path, shape in qwen3.shapes(config).items()}
  hf_weights.save(folder, config, qwen3.unflatten(params), "bfloat16", "60MB")
  return params

def read(config, folder, dtype):
  layouts = qwen3.unflatten(dict.fromkeys(qwen3.shapes(config), layout))
  return qwen3.flatten(hf_weights.load(folder, config, layouts, dtype))

with tempfile.TemporaryDirectory() as small:  # what the libraries need the first time
  write(config_of(64, 32, 64, 2), small)
  read(config_of(64, 32, 64, 2), small, "float32")
config = config_of(131_072, 512, 4096, 16)
start = peak()
params = write(config, folder) if dtype == "write" else read(config, folder, dtype)
highest = peak()
assert all(bool((x[-1] == 0.5).all()) for x in params.values())
owned = sum(x.nbytes for x in params.values())
largest = params["embed_tokens"].size * 2
print(json.dumps({"extra": highest - start - owned, "owned": owned, "largest": largest}))
"""


@pytest.mark.slow
def test_peak_memory_is_the_parameters_and_a_few_blocks(tmp_path):
  """Over what the process owns, less than 1.5 tensors; the largest is 128 MiB of 340."""

  def measure(mode):
    run = subprocess.run(
      [sys.executable, "-c", MEMORY, str(tmp_path), mode],
      capture_output=True,
      text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])

  for mode in ("write", "bfloat16", "float32"):
    found = measure(mode)
    assert found["largest"] == 2**27 and found["owned"] > 2.5 * found["largest"]
    assert found["extra"] < 1.5 * found["largest"], (mode, found)
    print(mode, found)
