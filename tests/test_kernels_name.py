"""The folder kernels/ does not get in the way of transformers, which asks for a module `kernels`.

Each case is a fresh interpreter, because what `kernels` is gets decided at import.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import import_utils

ROOT = Path(__file__).parents[1]

# What transformers takes from the package `kernels` where it finds a version that it knows.
NAMES = (
  "CUDAProperties", "Device", "KernelizeFallback", "LayerRepository", "LocalLayerRepository",
  "Mode", "ROCMProperties", "get_kernel", "kernelize", "register_kernel_mapping",
  "replace_kernel_forward_from_hub", "use_kernel_forward_from_hub", "use_kernel_mapping",
  "use_kernelized_func",
)  # fmt: skip

PROGRAM = """
import importlib.util, sys
import jax, jax.numpy as jnp
import qed_kernels
from qed_jax.model import qwen3

config = qwen3.Qwen3Config(
  vocab_size=32, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
  head_dim=8, rope_theta=1e4, max_position=64, rms_norm_eps=1e-6, tie_word_embeddings=True,
  dtype="float32", remat="none", attention="xla",
)
params = qwen3.init_params(config, jax.random.key(0), jnp.float32)
ones_BT = jnp.ones((1, 4), jnp.int32)
print("qed_jax", qwen3.hidden(config, params, ones_BT, jnp.arange(4)[None], ones_BT).shape)

from transformers import AutoTokenizer, Qwen3Config
from transformers.utils import is_kernels_available

if importlib.util.find_spec("torch"):
  from transformers import AutoModelForCausalLM, Qwen3ForCausalLM
  tiny = Qwen3Config(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8,
  )
  Qwen3ForCausalLM(tiny).save_pretrained(sys.argv[1])
  AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
  Qwen3Config(vocab_size=32).save_pretrained(sys.argv[1])
  Qwen3Config.from_pretrained(sys.argv[1])
found = getattr(importlib.import_module("kernels"), "__file__", None)
print("kernels", is_kernels_available(), found)
"""


def install(site: Path, version: str) -> None:
  """A distribution called kernels, of names that do nothing."""
  (site / "kernels").mkdir(parents=True)
  body = [f"__version__ = {version!r}", "class Stub:"]
  body += [
    "  def __init__(self, *args, **kwargs): pass",
    "  def __getattr__(self, name): return Stub()",
  ]
  body += ["  def __call__(self, *args, **kwargs): return args[0] if args else self"]
  body += [f"{name} = Stub" for name in NAMES if name[0].isupper()]
  body += [
    f"def {name}(*args, **kwargs): return lambda x: x" for name in NAMES if name[0].islower()
  ]
  (site / "kernels" / "__init__.py").write_text("\n".join(body) + "\n")
  info = site / f"kernels-{version}.dist-info"
  info.mkdir()
  (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
  (info / "top_level.txt").write_text("kernels\n")


@pytest.mark.parametrize("where", ["root", "elsewhere"])
@pytest.mark.parametrize("version", [None, import_utils.KERNELS_MIN_VERSION])
def test_transformers_and_qed_jax_live_side_by_side(tmp_path, where, version):
  """A tiny Qwen3 loads and qed_jax runs, from the root and from elsewhere, without a distribution
  called kernels and with one of a version that transformers takes."""
  site = tmp_path / "site"
  if version:
    install(site, version)
  cwd = ROOT if where == "root" else tmp_path
  paths = [str(ROOT), str(ROOT / "kernels"), str(site)]
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  env |= {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, str(tmp_path / "model")],
    cwd=cwd, env=env, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  *_, ours, theirs = done.stdout.splitlines()
  assert ours == "qed_jax (1, 4, 16)"
  found = site / "kernels" / "__init__.py" if version else None
  assert theirs == f"kernels {version is not None} {found}"


def test_the_folder_has_no_init():
  """With one it would be a regular package, and win over the installed one from the root."""
  assert not (ROOT / "kernels" / "__init__.py").exists()
  assert not (ROOT / "tests" / "kernels").exists()
