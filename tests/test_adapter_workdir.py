"""A workdir with an adapter: what it holds, whose it is, and what it is for others."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lora import random_adapter
from test_train import assert_bitwise, rows_of, small, train_whole_and_cut, weights

from configs import cache_rl, rl, sft
from qed_jax import checkpoint, sharding, train, workdir
from qed_jax.data import tokenizer as tokenizers
from qed_jax.model import flops, lora, presets, qwen3
from qed_jax.rollout import policy

TWO = lora.parse(2, 8.0, "q_proj,down_proj")


def one_device():
  return sharding.make_mesh(1, 1, 1, jax.devices()[:1])


def save(folder, config, tokenizer, state):
  policy.save_description(folder / "model", config, tokenizer)
  checkpoints = checkpoint.Checkpoints(folder / "checkpoints", keep=2)
  checkpoints.save((checkpoints.latest_step() or 0) + 1, state, {})
  checkpoints.close()


def locate(folder):
  return policy.locate(str(folder), "")


def load(folder, config, dtype="float32", mesh=None):
  abstract = policy.abstract_params(config, mesh or one_device(), dtype)
  return policy.load_params(locate(folder), config, abstract, seed=0)


@pytest.fixture
def runs(tmp_path, tiny):
  """(config, folder of a base, folder of an adapter of it, the adapter, the base's tokenizer)."""
  config, params = tiny
  words = tokenizers.train_sentencepiece(
    ["a b c d : ="], tmp_path / "words", vocab_size=64, vocab_multiple=64
  )
  save(tmp_path / "base", config, words, {"params": params})
  frozen, base = policy.load_frozen(TWO, locate(tmp_path / "base"), config, one_device(), 0)
  assert_bitwise(jax.device_get(frozen), jax.device_get(params))
  trained = random_adapter(TWO, config)
  policy.save_adapter(policy.epath.Path(tmp_path / "tuned" / "model"), TWO, base)
  save(tmp_path / "tuned", config, words, {"params": trained, "opt_state": trained})
  return config, tmp_path / "base", tmp_path / "tuned", trained, words


def test_a_workdir_with_an_adapter_is_a_policy(runs, tiny):
  """Loaded, it is base + scale b a, in the dtype and on the mesh that are asked for."""
  config, _, tuned, trained, _ = runs
  expected = lora.merge(lora.attach(tiny[1], trained, 4.0), jnp.float32)
  assert_bitwise(jax.device_get(load(tuned, config)), jax.device_get(expected))
  low = load(tuned, config, "bfloat16", sharding.make_mesh(2, 2, 2))
  for path, x in qwen3.flatten(low).items():
    assert x.dtype == jnp.bfloat16
    wanted = qwen3.flatten(expected)[path].astype(jnp.bfloat16)
    np.testing.assert_allclose(x.astype(jnp.float32), wanted.astype(jnp.float32), rtol=2**-7)


def test_checkpoints_hold_the_adapter_alone(runs):
  """The arrays of a step are the factors; the record beside them names the base."""
  config, base, tuned, trained, _ = runs
  own = policy.abstract_adapter(TWO, config, one_device(), "float32")
  assert_bitwise(jax.device_get(checkpoint.read_params(tuned, own)), jax.device_get(trained))
  with pytest.raises(ValueError, match="checkpoint only"):
    checkpoint.read_params(tuned, policy.abstract_params(config, one_device(), "float32"))
  record = json.loads((tuned / "model" / "adapter.json").read_text())
  assert (record["rank"], record["alpha"], record["targets"]) == (2, 8.0, list(TWO.targets))
  assert record["base"]["name"] == str(base) and len(record["base"]["fingerprint"]) == 16


def test_another_base_is_refused_in_one_line(runs, tiny):
  """A base that was trained further, one that is gone, and one that has moved."""
  config, base, tuned, _, words = runs
  shutil.copytree(base, base.parent / "kept")
  save(base, config, words, {"params": jax.tree.map(lambda x: x * 1.001, tiny[1])})
  with pytest.raises(ValueError, match=r"tuned is an adapter of .*fingerprint") as error:
    load(tuned, config)
  assert "\n" not in str(error.value) and "it has changed since" in str(error.value)
  shutil.rmtree(base)
  with pytest.raises(ValueError, match=r"the base of .*tuned is .*adapter\.json") as error:
    load(tuned, config)
  assert "\n" not in str(error.value)
  record = tuned / "model" / "adapter.json"
  record.write_text(record.read_text().replace(str(base), str(base.parent / "kept")))
  load(tuned, config)


def test_a_run_cannot_go_on_with_another_base(runs):
  config, base, tuned, _, _ = runs
  folder = policy.epath.Path(tuned / "model")
  _, right = policy.load_frozen(TWO, locate(base), config, one_device(), 0)
  policy.save_adapter(folder, TWO, right)
  wrong = policy.dataclasses.replace(right, name="other", fingerprint="0" * 16)
  with pytest.raises(
    ValueError, match="has an adapter of .*, and config.init is now other"
  ) as error:
    policy.save_adapter(folder, TWO, wrong)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"rank": 2, "alpha": 1, "targets": ["nope"]}'])
def test_a_damaged_record_is_one_line(runs, text):
  config, _, tuned, _, _ = runs
  (tuned / "model" / "adapter.json").write_text(text)
  with pytest.raises(ValueError, match=r"adapter\.json cannot be read") as error:
    load(tuned, config)
  assert "\n" not in str(error.value)


def test_the_same_adapter_goes_on_and_another_begins_on_the_merged_one(runs, tiny):
  """Stages chain: rank, alpha and targets alike keep one adapter of one base, others stack up."""
  config, base, tuned, trained, _ = runs
  mesh = one_device()
  frozen, of = policy.load_frozen(TWO, locate(tuned), config, mesh, 0)
  assert of.name == str(base)
  assert_bitwise(jax.device_get(frozen), jax.device_get(tiny[1]))
  own = policy.abstract_adapter(TWO, config, mesh, "float32")
  again = policy.load_trained(TWO, locate(tuned), config, own, 0)
  assert_bitwise(jax.device_get(again), jax.device_get(trained))

  other = lora.parse(3, 8.0, "q_proj,down_proj")
  frozen, of = policy.load_frozen(other, locate(tuned), config, mesh, 0)
  assert of.name == str(tuned)
  assert_bitwise(jax.device_get(frozen), jax.device_get(load(tuned, config)))
  own = policy.abstract_adapter(other, config, mesh, "float32")
  fresh = policy.load_trained(other, locate(tuned), config, own, 0)
  assert all(not x.any() for path, x in qwen3.flatten(fresh).items() if path.endswith(".b"))
  # What stands for a merged policy is made of what was stored, not of the sums of some device.
  wide = sharding.make_mesh(2, 2, 2)
  assert policy.load_frozen(other, locate(tuned), config, wide, 0)[1] == of


@pytest.mark.parametrize("sampler", ["unmerged", "merged"])
def test_what_the_sampler_is_given(tiny, sampler):
  """The frozen arrays themselves with the adapter beside them, or plain weights of the same sum."""
  model, frozen = tiny
  config = rl.get_config("tiny")
  config.lora.sampler = sampler
  trained = random_adapter(TWO, model)
  given = qwen3.flatten(train.sampler_view(config, TWO, frozen)(trained))
  up, q = (given[f"layers.{name}"] for name in ("mlp.up_proj", "self_attn.q_proj"))
  if sampler == "unmerged":
    assert up is frozen["layers"]["mlp"]["up_proj"]
    assert q.w is frozen["layers"]["self_attn"]["q_proj"] and q.scale == 4.0
  else:
    merged = lora.merge(lora.attach(frozen, trained, 4.0), jnp.float32)
    np.testing.assert_allclose(q, merged["layers"]["self_attn"]["q_proj"], atol=1e-6)
  everything = train.sampler_view(config, None, {})
  assert everything(frozen) is frozen


# --- before any device work


def test_an_adapter_of_random_weights_is_refused(tiny):
  with pytest.raises(ValueError, match="config.lora.rank is 2 and config.init is empty") as error:
    policy.check_adapter(TWO, policy.Start("random", ""), tiny[0])
  assert "\n" not in str(error.value)


def test_memory_counts_frozen_weights_once(monkeypatch):
  """4B: 8.0 GB in bfloat16 and 0.53 of adapter; everything in float32 would be 64; a merged copy
  for the sampler is another 8."""

  def needed(config) -> float:
    monkeypatch.setattr(policy.os, "sysconf", lambda name: 1)
    with pytest.raises(ValueError) as error:
      policy.check_memory(config)
    assert "\n" not in str(error.value)
    return float(str(error.value).split(" need ")[1].split(" GB")[0])

  config = rl.get_config("gpu")
  config.init = "Qwen/Qwen3-4B"
  assert needed(config) == 64
  config.lora.rank = 16
  assert needed(config) == 9
  config.lora.sampler = "merged"
  assert needed(config) == 17
  config.job = "sft"
  assert needed(config) == 9


@pytest.mark.parametrize("job", [sft, rl, cache_rl])
def test_old_workdirs_resume(tmp_path, job):
  """A config.json from before the block resumes; one that turns it on does not."""
  config = job.get_config("tiny")
  before = {k: v for k, v in config.to_dict().items() if k != "lora"}
  (tmp_path / "config.json").write_text(json.dumps(before))
  workdir.check_same_config(tmp_path, config.to_dict())
  config.lora.rank = 8
  with pytest.raises(ValueError, match=r"lora\.rank: 0 there, 8 here"):
    workdir.check_same_config(tmp_path, config.to_dict())


def test_frozen_weights_have_no_gradient_to_count():
  """Matrices: forward and the tokens' gradient; attention: all of its backward pass."""
  model = presets.from_preset("qwen3-4b", dtype="bfloat16", remat="layer", attention="auto")
  positions, segments = np.arange(4096)[None], np.ones((1, 4096), np.int32)
  whole = flops.training(model, positions, segments)
  frozen = flops.training(model, positions, segments, frozen=True)
  context = 4096 * 4097 // 2
  attention = flops.attention(model, context)
  assert attention == 4.0 * 36 * 32 * 128 * context
  assert whole / 3 == pytest.approx((frozen - attention) / 2) == flops.forward(model, 4096, context)


# --- whole runs


@pytest.fixture(scope="module")
def started(tmp_path_factory):
  """An SFT run of the tiny world that has begun to learn."""
  folder = tmp_path_factory.mktemp("sft")
  config = small(sft.get_config("tiny"), 40)
  config.checkpoint.every = 40
  train.main(config, str(folder))
  return folder


@pytest.mark.slow
def test_sft_of_an_adapter_learns_resumes_and_leaves_the_base_alone(started, tmp_path, monkeypatch):
  """Rank 8 from an SFT checkpoint: the loss falls; a run that is cut is bitwise the whole one."""
  before = weights(started)

  def config(steps=12):
    c = small(sft.get_config("tiny"), steps)
    c.init, c.lora.rank, c.seed = str(started), 8, 7
    c.optimizer.lr = 1e-2
    return c

  train_whole_and_cut(config, tmp_path, monkeypatch)
  losses = [row["loss"] for row in rows_of(tmp_path / "whole")]
  full = config(2)
  full.lora.rank = 0
  train.main(full, str(tmp_path / "full"))
  assert losses[0] == pytest.approx(rows_of(tmp_path / "full")[0]["loss"], rel=1e-6)
  assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
  adapter = lora.from_config(config().lora)
  model = policy.sizes(policy.locate(str(started), ""), config().model)
  own = policy.abstract_adapter(adapter, model, one_device(), "float32")
  whole, cut = (
    jax.device_get(checkpoint.read_params(tmp_path / name, own)) for name in ("whole", "cut")
  )
  assert_bitwise(whole, cut)
  assert_bitwise(before, weights(started))


@pytest.mark.slow
def test_rl_of_an_adapter_samples_from_what_it_trains(started, tmp_path):
  """The sampler's log-probs are the trainer's at every step in step; the frozen summariser and the
  KL's reference are the policy that the run began from."""
  config = small(cache_rl.get_config("tiny"), 3)
  config.init, config.lora.rank = str(started), 4
  config.objective.update(kl_coef=0.1, drop_dead_groups=False)
  config.optimizer.lr = 1e-2
  train.main(config, str(tmp_path / "rl"))
  rows = rows_of(tmp_path / "rl")
  assert len(rows) == 3
  for row in rows:
    assert row["ratio"] == pytest.approx(1, abs=1e-4) and abs(row["kl_behavior"]) < 1e-4
    assert row["skipped"] == 0 and row["grad_norm"] > 0
  assert abs(rows[0]["kl_reference"]) < 1e-6 < rows[-1]["kl_reference"]
