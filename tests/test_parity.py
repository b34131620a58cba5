"""Logits and greedy tokens equal those of torch transformers, on models it made itself."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import hf_folders
import jax.numpy as jnp
import numpy as np
import pytest

from qed_jax.model import hf_weights, presets, qwen3

TOOL = Path(__file__).parents[1] / "tools" / "check_parity.py"
FAR = {"max_position_embeddings": 262_144}
MODELS = {
  "tied, 4:1, theta 5e6, bf16 in shards": {
    **FAR,
    "num_attention_heads": 8,
    "head_dim": 32,
    "theta": 5e6,
    "shard": "20KB",
  },
  "untied, 1:1, theta 1e4, one layer": {
    "tie_word_embeddings": False,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "head_dim": 8,
    "dtype": "float32",
  },
  "tied, 8:1, head_dim 20": {
    **FAR,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "theta": 1e6,
    "dtype": "float32",
  },
  "untied, head_dim 128, theta 5e6": {
    **FAR,
    "tie_word_embeddings": False,
    "num_hidden_layers": 1,
    "head_dim": 128,
    "theta": 5e6,
  },
  "small weights": {"matrix": 1e-3},
}


@pytest.fixture(scope="module")
def tool():
  spec = importlib.util.spec_from_file_location("check_parity", TOOL)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def figures(tool, capsys, folder, status=0):
  assert tool.main([str(folder)]) == status
  return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("model", MODELS)
def test_logits_and_greedy_tokens_equal_torch(tool, capsys, tmp_path, model):
  folder = hf_folders.make(tmp_path / "m", **MODELS[model])
  found = figures(tool, capsys, folder)
  assert found["max_abs_diff"] <= 2e-4
  assert found["over_limit"] == []
  assert found["tokens_equal"] == found["tokens"] == 72
  far = [case for case in found["cases"] if case in ("from position 40896", "spread over 65536")]
  assert len(far) == (2 if "max_position_embeddings" in MODELS[model] else 0)


@pytest.mark.slow
def test_one_row_of_33k_tokens_equals_torch(tool, capsys, tmp_path):
  sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
  folder = hf_folders.make(tmp_path / "m", head_dim=8, theta=1e6, **sizes, **FAR)
  assert figures(tool, capsys, folder)["cases"]["one long row"] <= 2e-4


def test_over_the_limit_torchs_own_rounding_is_named(tool, capsys, tmp_path):
  """Weights too large for float32: status 1, and what torch itself loses stands beside it."""
  folder = hf_folders.make(tmp_path / "m", norm=8.0, dtype="float32")
  assert tool.main([str(folder)]) == 1
  out = capsys.readouterr().out
  found = json.loads(out.splitlines()[-1])
  assert found["over_limit"] and found["max_abs_diff"] > found["limit"] and not found["ok"]
  pattern = r"(\S+)  over the limit \(torch's own float32 error: (\S+)\)"
  ours, torchs = re.search(pattern, out).groups()
  assert 2e-4 < float(ours) < 4 * float(torchs)


@pytest.mark.slow
def test_a_wrong_theta_fails(tool, capsys, monkeypatch, tmp_path):
  """The tool can fail: our side reads another theta than torch's."""
  folder = hf_folders.make(tmp_path / "m", theta=1e6)
  real = presets.from_hf

  def wrong(described, **how):
    return real(described | {"rope_parameters": {"rope_theta": 1.01e6}}, **how)

  monkeypatch.setattr(presets, "from_hf", wrong)
  assert "spread over 512" in figures(tool, capsys, folder, status=1)["over_limit"]


def test_theta_matters(tmp_path):
  """The logits at far positions change with rope_theta: reading it wrong could not go unseen."""
  folder = hf_folders.make(tmp_path / "m", theta=5e6, dtype="float32", **FAR)
  logits = []
  for theta in (5e6, 1e6):
    how = {"dtype": "float32", "remat": "none", "attention": "xla"}
    described = hf_weights.read_config(folder) | {"rope_parameters": {"rope_theta": theta}}
    config = presets.from_hf(described, **how)
    params = load(folder, config)
    tokens_BT = np.arange(48, dtype=np.int32)[None]
    positions_BT = 1000 * tokens_BT
    x_BTD = qwen3.hidden(config, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    logits.append(np.asarray(qwen3.logits(config, params, x_BTD)))
  assert np.abs(logits[0] - logits[1]).max() > 0.1


def load(folder, config):
  import jax
  from jax.sharding import NamedSharding, PartitionSpec

  from qed_jax.sharding import make_mesh

  layout = NamedSharding(make_mesh(1, 1, 1, jax.devices()[:1]), PartitionSpec())
  return hf_weights.load(
    folder, config, qwen3.unflatten(dict.fromkeys(qwen3.shapes(config), layout)), None
  )


OLD_ROPE = {"rope_parameters": None, "rope_theta": 777.25, "rope_scaling": None}
CONFIGS = {
  "flat rope_theta": OLD_ROPE,
  "rope_scaling of the default type": {
    "rope_parameters": None,
    "rope_theta": 777.25,
    "rope_scaling": {"type": "default"},
  },
  "num_key_value_heads absent": {"num_key_value_heads": None},
  "head_dim absent": {"head_dim": None},
  "layer_types absent": {"layer_types": None, "max_window_layers": None},
}


@pytest.mark.parametrize("change", CONFIGS)
def test_configs_of_other_times_read_alike(tmp_path, change):
  """Fields in their old homes, or left out, mean what they mean to transformers or the weights."""
  folder = hf_folders.make(
    tmp_path / "m", theta=777.25, num_key_value_heads=4, head_dim=24, max_position_embeddings=96
  )
  how = {"dtype": "float32", "remat": "none", "attention": "xla"}
  before = presets.from_hf(hf_weights.read_config(folder), **how)
  hf_folders.edit(folder, **CONFIGS[change])
  assert presets.from_hf(hf_weights.read_config(folder), **how) == before
  assert before.rope_theta == 777.25 and before.num_kv_heads == 4 and before.head_dim == 24


@pytest.mark.slow
def test_an_old_config_without_kv_heads_passes_the_tool(tool, capsys, tmp_path):
  """1:1 heads, flat theta, no num_key_value_heads: torch gets the number that the weights show."""
  folder = hf_folders.make(tmp_path / "m", theta=777.25, num_key_value_heads=4, head_dim=24)
  hf_folders.edit(folder, **OLD_ROPE, num_key_value_heads=None, layer_types=None)
  assert figures(tool, capsys, folder)["max_abs_diff"] <= 2e-4


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
  """A malformed folder: status 2, one line, no traceback. The same command documents itself."""
  folder = hf_folders.make(tmp_path / "m", tie_word_embeddings=False)
  hf_folders.edit(folder, intermediate_size=49)
  run = subprocess.run([sys.executable, TOOL, folder], capture_output=True, text=True)
  assert run.returncode == 2
  line = run.stderr.strip().splitlines()
  assert line == [
    "error: model.layers.0.mlp.gate_proj.weight has shape [48, 32], config.json asks for "
    "[49, 32]: correct config.json or the weights"
  ]
