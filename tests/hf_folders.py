"""Random Qwen3 folders, saved by transformers itself, and their way through the converter."""

import json
from pathlib import Path

import safetensors.numpy
import torch
import transformers

from qed_jax import convert

transformers.utils.logging.disable_progress_bar()
SIZES = {
  "vocab_size": 67,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "max_position_embeddings": 512,
  "tie_word_embeddings": True,
}


def make(
  folder, *, theta=1e4, dtype="bfloat16", shard="5GB", matrix=0.2, norm=1.0, **sizes
) -> Path:
  """matrix, norm: scales of the random weights; norm weights vary by 30 %, as trained ones do."""
  rope = {"rope_type": "default", "rope_theta": theta}
  config = transformers.Qwen3Config(**{**SIZES, **sizes}, rope_parameters=rope)
  model = transformers.Qwen3ForCausalLM(config)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      parameter.copy_(matrix * noise if parameter.ndim > 1 else norm * (1 + 0.3 * noise))
  model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
  return Path(folder)


def edit(folder: Path, name="config.json", **changes) -> Path:
  """Changes fields of a JSON file; None removes one."""
  value = json.loads((folder / name).read_text()) | changes
  kept = {key: item for key, item in value.items() if item is not None}
  (folder / name).write_text(json.dumps(kept))
  return folder


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
