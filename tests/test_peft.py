"""Adapters in PEFT's form: peft opens ours with equal logits, and we open peft's, bit for bit."""

import json
import shutil

import hf_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from etils import epath
from test_lora import random_adapter

from qed_jax import checkpoint, convert, sharding
from qed_jax.model import hf_weights, lora, peft_folder, presets, qwen3
from qed_jax.rollout import policy

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[test]'")

HOW = {"dtype": "float32", "remat": "none", "attention": "auto"}
SOME = lora.parse(3, 6.0, "q_proj,o_proj,down_proj")
TOKENS = np.arange(40)[None] % 67


def one_device():
  return sharding.make_mesh(1, 1, 1, jax.devices()[:1])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
  """(HF folder of the base, workdir with an adapter of it, its model, the adapter's arrays)."""
  root = tmp_path_factory.mktemp("peft")
  source = hf_folders.make(root / "base", dtype="float32", matrix=0.1)
  start = policy.locate(str(source), "main")
  described = hf_weights.read_config(source)
  model = presets.from_hf(described, **HOW)
  _, base = policy.load_frozen(SOME, start, model, one_device(), 0)
  trained = jax.tree.map(lambda x: 0.2 * x, random_adapter(SOME, model))
  folder = root / "run"
  policy.save_adapter(epath.Path(folder / "model"), SOME, base)
  shutil.copyfile(source / "config.json", folder / "model" / "config.json")
  record = {"job": "sft", "init": str(source), "data": {"source": "someone/proofs"}}
  (folder / "config.json").write_text(json.dumps(record))
  checkpoints = checkpoint.Checkpoints(folder / "checkpoints", keep=2)
  checkpoints.save(1, {"params": jax.tree.map(jnp.zeros_like, trained)})
  checkpoints.save(2, {"params": trained})
  checkpoints.close()
  return source, folder, model, trained


def run(*flags):
  convert.main([*flags])


def torch_logits(model):
  with torch.no_grad():
    return model(input_ids=torch.from_numpy(TOKENS)).logits.numpy()


def opened(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def our_logits(model, params):
  ones = np.ones_like(TOKENS)
  return qwen3.logits(
    model, params, qwen3.hidden(model, params, TOKENS, TOKENS * 0 + np.arange(40), ones)
  )


def test_peft_opens_the_export_with_equal_logits(tuned, tmp_path):
  """Against torch: PEFT on the export, the merged export, and our forward pass, unmerged."""
  source, folder, model, trained = tuned
  run("--to=peft", f"--src={folder}", f"--dst={tmp_path / 'adapter'}")
  base = opened(source)
  plain = torch_logits(base)
  theirs = torch_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
  assert np.abs(theirs - plain).max() > 0.1
  params = policy.load_params(
    policy.locate(str(source), ""), model, policy.abstract_params(model, one_device(), "float32"), 0
  )
  ours = our_logits(model, lora.attach(params, trained, SOME.scale))
  np.testing.assert_allclose(ours, theirs, atol=2e-4)
  run("--to=hf", f"--src={folder}", f"--dst={tmp_path / 'merged'}", "--dtype=float32")
  np.testing.assert_allclose(torch_logits(opened(tmp_path / "merged")), theirs, atol=2e-4)
  names = {path.name for path in (tmp_path / "adapter").iterdir()}
  assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
  card = (tmp_path / "adapter" / "README.md").read_text()
  assert "library_name: peft" in card and "PeftModel" in card and str(tmp_path) not in card


def test_one_step_of_the_checkpoints_is_exported(tuned, tmp_path):
  """Step 1 held zeros: merged, it is the base bit for bit; as an adapter it is zeros."""
  source, folder, model, _ = tuned
  step = folder / "checkpoints" / "1"
  run("--to=hf", f"--src={step}", f"--dst={tmp_path / 'merged'}", "--dtype=float32")
  assert hf_folders.bits(tmp_path / "merged") == hf_folders.bits(source)
  run("--to=peft", f"--src={step}", f"--dst={tmp_path / 'adapter'}")
  _, arrays = peft_folder.load(tmp_path / "adapter", model)
  assert not any(x.any() for x in jax.tree.leaves(arrays))


def test_there_and_back_is_bitwise(tuned, tmp_path):
  """Export, import, export: the same adapter of the same base, and the same file."""
  source, folder, model, trained = tuned
  run("--to=peft", f"--src={folder}", f"--dst={tmp_path / 'a'}")
  adapter, arrays = peft_folder.load(tmp_path / "a", model)
  assert adapter == SOME
  for ours, theirs in zip(jax.tree.leaves(arrays), jax.tree.leaves(trained), strict=True):
    np.testing.assert_array_equal(ours.view(np.uint32), np.asarray(theirs).view(np.uint32))
  run("--to=jax", f"--src={tmp_path / 'a'}", f"--dst={tmp_path / 'back'}", f"--base={source}")
  records = [policy.read_adapter(policy.locate(str(f), "")) for f in (tmp_path / "back", folder)]
  assert records[0] == records[1]
  run("--to=peft", f"--src={tmp_path / 'back'}", f"--dst={tmp_path / 'b'}")
  assert hf_folders.bits(tmp_path / "b") == hf_folders.bits(tmp_path / "a")


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_made_is_a_policy_here(tuned, tmp_path, rslora):
  """peft's own folder -> a workdir -> the logits that peft computes; rank-stabilised ones too."""
  source, _, model, _ = tuned
  torch.manual_seed(0)
  settings = peft.LoraConfig(
    r=4, lora_alpha=16, target_modules=["v_proj", "gate_proj"], init_lora_weights=False,
    use_rslora=rslora, task_type="CAUSAL_LM",
  )  # fmt: skip
  made = peft.get_peft_model(opened(source), settings)
  made.save_pretrained(tmp_path / "theirs")
  run("--to=jax", f"--src={tmp_path / 'theirs'}", f"--dst={tmp_path / 'run'}", f"--base={source}")
  abstract = policy.abstract_params(model, one_device(), "float32")
  params = policy.load_params(policy.locate(str(tmp_path / "run"), ""), model, abstract, 0)
  np.testing.assert_allclose(our_logits(model, params), torch_logits(made.eval()), atol=2e-4)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"use_dora": True}, "use_dora=True: only False is supported"),
    ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"r": 0}, "r=0: need a number above 0"),
    ({"r": 5}, "this model and r=5 ask for [5, 32]"),
  ],
)
def test_what_is_no_plain_adapter_is_one_line(tuned, tmp_path, changes, said):
  _, folder, model, _ = tuned
  run("--to=peft", f"--src={folder}", f"--dst={tmp_path / 'a'}")
  hf_folders.edit(tmp_path / "a", "adapter_config.json", **changes)
  with pytest.raises(ValueError) as error:
    peft_folder.load(tmp_path / "a", model)
  assert said in str(error.value) and "\n" not in str(error.value)


def test_missing_and_foreign_tensors_are_named(tuned, tmp_path):
  """A layer too few, a layer too many, a file cut short, none at all."""
  _, folder, model, _ = tuned
  run("--to=peft", f"--src={folder}", f"--dst={tmp_path / 'a'}")
  file = tmp_path / "a" / "adapter_model.safetensors"
  whole, tensors = file.read_bytes(), safetensors.numpy.load_file(file)
  name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
  few = {k: v for k, v in tensors.items() if k != name}
  many = tensors | {name.replace(".1.", ".2."): tensors[name]}
  odd = tensors | {"base_model.model.lm_head.lora_A.weight": tensors[name]}
  for content, said in ((few, f"{name} is missing"), (many, "layers.2"), (odd, "lm_head")):
    safetensors.numpy.save_file(content, file)
    with pytest.raises(ValueError) as error:
      peft_folder.load(tmp_path / "a", model)
    assert said in str(error.value) and "\n" not in str(error.value)
  file.write_bytes(whole[:-100])
  with pytest.raises(ValueError, match="is not whole"):
    peft_folder.load(tmp_path / "a", model)
  file.unlink()
  with pytest.raises(FileNotFoundError, match="adapter_model.safetensors does not exist"):
    peft_folder.load(tmp_path / "a", model)


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--to=peft", "--src=BASE"], "is no workdir"),
    (["--to=peft", "--src=RUN", "--dst=TAKEN"], "nothing is overwritten"),
    (["--to=jax", "--src=ADAPTER", "--base=/nowhere"], "--base is '/nowhere'"),
  ],
)
def test_mistakes_of_the_command_are_one_line(tuned, tmp_path, capsys, flags, said):
  source, folder, *_ = tuned
  run("--to=peft", f"--src={folder}", f"--dst={tmp_path / 'a'}")
  places = {"BASE": source, "RUN": folder, "TAKEN": folder, "ADAPTER": tmp_path / "a"}
  filled = [flag for flag in flags]
  for name, path in places.items():
    filled = [flag.replace(f"={name}", f"={path}") for flag in filled]
  with pytest.raises(SystemExit) as stop:
    run(f"--dst={tmp_path / 'new'}", *filled)
  err = capsys.readouterr().err
  assert stop.value.code == 2 and said in err and err.count("\n") == 1
  assert not (tmp_path / "new").exists()
