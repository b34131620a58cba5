"""The trainer on the tiny world: resume is exact, bad input is one line, bad steps are skipped."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_endpoint
import jax
import numpy as np
import pytest

from configs import cache_rl, rl, sft
from qed_jax import checkpoint, flags, sharding, train
from qed_jax.model import presets
from qed_jax.rollout import experience, jobs, policy, step_log

ROOT = Path(__file__).parents[1]
HOW = {"dtype": "float32", "remat": "none", "attention": "xla"}


def small(config, steps: int):
  """A config of the same shape that takes seconds."""
  config.steps = steps
  config.optimizer.warmup_steps = 1
  config.checkpoint.every = 2
  config.log.every = 1
  config.mesh.fsdp = 8
  config.data.size = 64
  if config.job == "sft":
    config.batch.update(row_length=192, rows=8)
  else:
    config.batch.update(row_length=128, rows=8)
    config.rollout.update(problems=2, attempts=4, slots=8, lanes=1, prefill_rows=8, max_length=128)
    config.rollout.update(max_tokens=12, chunk=8)
  if config.job == "cache_rl":
    config.cache.update(turns=2, states=2, max_tokens=6)
  flags.check(config)
  return config


def weights(folder) -> dict:
  """All parameters of a workdir as numpy."""
  model = presets.from_preset("tiny", **HOW)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  return jax.device_get(
    checkpoint.read_params(folder, policy.abstract_params(model, mesh, "float32"))
  )


def assert_bitwise(a: dict, b: dict) -> None:
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x.view(np.uint32), y.view(np.uint32))


def rows_of(folder, name="metrics.jsonl") -> list[dict]:
  return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


class Interrupted(Exception):
  """Stands for a kill between two steps."""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
  """A workdir with an SFT run of four steps, which the RL tests start from."""
  folder = tmp_path_factory.mktemp("sft")
  train.main(small(sft.get_config("tiny"), 4), str(folder))
  return folder


def interrupt_at(monkeypatch, step: int) -> None:
  """Make the next run raise before it takes this step."""
  original = step_log.Health.check

  def check(self, at, info, batch):
    if at == step:
      raise Interrupted
    original(self, at, info, batch)

  monkeypatch.setattr(step_log.Health, "check", check)


def train_whole_and_cut(config, tmp_path, monkeypatch) -> None:
  """Runs config() twice: in `whole` without a break, in `cut` interrupted at step 3 and rerun."""
  train.main(config(), str(tmp_path / "whole"))
  with monkeypatch.context() as patch:
    interrupt_at(patch, 3)
    with pytest.raises(Interrupted):
      train.main(config(), str(tmp_path / "cut"))
  assert checkpoint.Checkpoints(tmp_path / "cut" / "checkpoints", keep=9).latest_step() == 2
  train.main(config(), str(tmp_path / "cut"))


@pytest.mark.slow
@pytest.mark.parametrize("job", ["rl", "cache_rl"])
def test_rl_resumes_to_the_same_weights_and_samples(job, started, tmp_path, monkeypatch):
  """Interrupted after step 3 and rerun: bitwise the uninterrupted run, its logs without repeats."""
  configs = {"rl": rl, "cache_rl": cache_rl}

  def config():
    c = small(configs[job].get_config("tiny"), 4)
    c.init = str(started)
    if job == "cache_rl":
      c.cache.replay = True
    return c

  train_whole_and_cut(config, tmp_path, monkeypatch)
  assert_bitwise(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
  whole, cut = (rows_of(tmp_path / x, "samples.jsonl") for x in ("whole", "cut"))
  assert whole == cut and whole
  assert [r["step"] for r in rows_of(tmp_path / "cut")] == [1, 2, 3, 4]
  for a, b in zip(rows_of(tmp_path / "whole"), rows_of(tmp_path / "cut"), strict=True):
    assert (a["reward"], a["loss"], a["grad_norm"]) == (b["reward"], b["loss"], b["grad_norm"])
  expected = {"entropy", "kl_behavior", "ratio", "clip_share", "ess", "dead_group_share"}
  expected |= {"truncation_share", "invalid_share", "lag/max", "length/mean", "reward_turn_1"}
  assert expected <= rows_of(tmp_path / "cut")[-1].keys()


def streaming(started, **changes):
  """An RL config whose work overlaps training."""
  c = small(rl.get_config("tiny"), 5)
  c.init = str(started)
  c.objective.drop_dead_groups = False
  c.rollout.update(max_lag=2, max_tokens=24, chunk=4, **changes)
  return c


def slow_judge(monkeypatch, seed: int) -> None:
  """Grades that come when they like."""
  rng, grade = np.random.default_rng(seed), jobs.grader

  def grader(judge, root):
    exact = grade(judge, root)

    async def late(problem, proof):
      await asyncio.sleep(float(rng.exponential(0.03)))
      return await exact(problem, proof)

    return late

  monkeypatch.setattr(jobs, "grader", grader)


@pytest.mark.slow
def test_streaming_in_the_order_of_admission_is_reproducible(started, tmp_path, monkeypatch):
  """Later work is sampled while a step's is graded, and how far it gets depends on no clock."""
  for name, seed in (("one", 1), ("other", 2)):
    with monkeypatch.context() as patch:
      slow_judge(patch, seed)
      train.main(streaming(started, order="admission"), str(tmp_path / name))
  one, other = (rows_of(tmp_path / name) for name in ("one", "other"))
  same = ("reward", "loss", "grad_norm", "lag/mean", "lag/max", "entropy", "share_lag_0")
  assert [[row[k] for k in same] for row in one] == [[row[k] for k in same] for row in other]
  assert_bitwise(weights(tmp_path / "one"), weights(tmp_path / "other"))
  assert 0 < max(row["lag/max"] for row in one) <= 2
  assert any(0 < row["share_lag_0"] < 1 and 0 < row["ess_lag_1"] <= 1 for row in one[1:])
  assert all(row["open_problems"] == 4 for row in one)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["colocated", "split"])
def test_streaming_in_the_order_of_arrival_keeps_the_lag(placement, started, tmp_path, monkeypatch):
  """Half of the devices sample, or all take turns; what was open is begun again after a stop."""

  def config():
    c = streaming(started, order="arrival", placement=placement)
    c.mesh.fsdp = -1
    c.rollout.sampling_devices = 4 if placement == "split" else 0
    return c

  slow_judge(monkeypatch, 3)
  train_whole_and_cut(config, tmp_path, monkeypatch)
  for name in ("whole", "cut"):
    rows = rows_of(tmp_path / name)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["lag/max"] <= 2 and row["skipped"] == 0 for row in rows)
    assert all(row["seconds/set_params"] > 0 for row in rows)


@pytest.mark.slow
def test_kl_is_to_the_policy_that_the_run_began_from(started, tmp_path, monkeypatch):
  """Zero at the first step, more after it, and a run that was cut keeps the same reference."""

  def config():
    c = small(rl.get_config("tiny"), 4)
    c.init = str(started)
    c.optimizer.lr = 1e-2
    # The entropy bonus moves a policy whose groups have no advantage.
    c.objective.update(kl_coef=0.1, entropy_coef=1.0, drop_dead_groups=False)
    return c

  train_whole_and_cut(config, tmp_path, monkeypatch)
  kl = [row["kl_reference"] for row in rows_of(tmp_path / "whole")]
  assert abs(kl[0]) < 1e-6 and min(kl[1:]) > 1e-6, kl
  assert kl == [row["kl_reference"] for row in rows_of(tmp_path / "cut")]


@pytest.mark.slow
def test_microbatches_give_the_same_update(started, tmp_path):
  """Rows four at a time or all at once: equal weights to 1e-6."""
  for at_once in (0, 4):
    config = small(sft.get_config("tiny"), 2)
    config.mesh.fsdp = 4
    config.mesh.data = 2
    config.batch.microbatch_rows = at_once * 2
    train.main(config, str(tmp_path / str(at_once)))
  a, b = weights(tmp_path / "0"), weights(tmp_path / "4")
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.slow
def test_non_finite_steps_are_skipped_and_then_stop_the_run(tmp_path, monkeypatch):
  """A NaN in the weights of the loss changes nothing; after k of them in a row the batch is
  kept."""
  config = small(sft.get_config("tiny"), 20)
  config.max_skipped_steps = 3
  put = sharding.put

  def poisoned(mesh, batch, *how):
    weight_BT = np.where(batch.weight_BT > 0, np.float32(np.nan), 0)
    weight_BT[batch.weight_BT > 0] = np.inf
    return put(mesh, type(batch)(**{**vars(batch), "weight_BT": weight_BT}), *how)

  monkeypatch.setattr(sharding, "put", poisoned)
  with pytest.raises(ValueError, match="3 steps in a row") as error:
    train.main(config, str(tmp_path))
  assert "\n" not in str(error.value) and list(tmp_path.glob("not_finite_*.npz"))
  model = presets.from_preset("tiny", **HOW)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  abstract = policy.abstract_params(model, mesh, "float32")
  fresh = policy.load_params(policy.Start("random", ""), model, abstract, config.seed)
  assert_bitwise(jax.device_get(fresh), weights(tmp_path))


@pytest.mark.slow
def test_another_config_in_the_same_workdir_is_refused(started):
  config = small(sft.get_config("tiny"), 4)
  config.optimizer.lr = 1e-4
  with pytest.raises(ValueError, match=r"optimizer\.lr: 0\.003 there, 0\.0001 here") as error:
    train.main(config, str(started))
  assert "\n" not in str(error.value)


def command(folder, *overrides) -> list[str]:
  return [
    sys.executable, "-m", "qed_jax.train", "--config=configs/sft.py:tiny", f"--workdir={folder}",
    "--config.steps=24", "--config.optimizer.warmup_steps=1", "--config.checkpoint.every=2",
    "--config.log.every=1", "--config.data.size=64", "--config.batch.rows=8",
    "--config.batch.row_length=192", "--config.mesh.fsdp=-1", *overrides,
  ]  # fmt: skip


def launch(arguments) -> subprocess.Popen:
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
  return subprocess.Popen(
    arguments, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )


def wait_for(folder: Path, step: int, process: subprocess.Popen) -> None:
  """Until metrics.jsonl has this step."""
  path = folder / "metrics.jsonl"
  for _ in range(3000):
    if path.exists() and f'"step": {step},' in path.read_text():
      return
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.05)
  raise AssertionError(f"step {step} did not come")


@pytest.mark.slow
def test_kill_9_in_the_middle_of_sft_changes_nothing(tmp_path):
  """Killed twice and rerun with the same command: final weights bitwise those of a run left
  alone."""
  whole = launch(command(tmp_path / "whole"))
  assert whole.wait(300) == 0, whole.communicate()[1]
  for step in (5, 14):
    process = launch(command(tmp_path / "killed"))
    wait_for(tmp_path / "killed", step, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
  last = launch(command(tmp_path / "killed"))
  out, err = last.communicate(timeout=300)
  assert last.returncode == 0, err
  assert "resuming" in out
  assert_bitwise(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
  assert [r["step"] for r in rows_of(tmp_path / "killed")] == list(range(1, 25))


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_code_0(tmp_path):
  """With checkpoints far apart, the step that was reached is saved, and the next run goes on
  there."""
  arguments = command(tmp_path, "--config.checkpoint.every=1000", "--config.steps=2000")
  process = launch(arguments)
  wait_for(tmp_path, 3, process)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0 and "stopped at step" in out, err
  reached = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=9).latest_step()
  assert reached >= 3
  assert rows_of(tmp_path)[-1]["step"] == reached


BAD = [
  ("--config.optimzer.lr=1", "optimizer"),
  ("--config.optimizer.lr=nan", "finite"),
  ("--config.steps=many", "many"),
  ("--config.model.dtype=float8", "choose one of"),
  ("--config.optimizer.lrr=1", "no field 'lrr' Did you mean \"lr\""),
  ("--config=configs/sft.py:tny", "error: --config: configs/sft.py has no variant 'tny': use"),
  ("--config=configs/nope.py", "error: --config: [Errno 2] No such file"),
  ("--config.init=/nowhere", "config.init is '/nowhere': neither a workdir"),
  ("--config.data.source=/nowhere.jsonl", "nowhere"),
  ("--steps=3", "steps"),
]


@pytest.mark.slow
def test_every_bad_field_is_one_line_before_any_work(tmp_path):
  """Misspelt, mistyped, impossible and missing values: exit code 2, one line, no workdir made."""
  running = [
    (flag, said, launch(command(tmp_path / f"w{i}", flag))) for i, (flag, said) in enumerate(BAD)
  ]
  for i, (flag, said, process) in enumerate(running):
    _, err = process.communicate(timeout=300)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert process.returncode == 2, (flag, err)
    assert len(lines) == 1 and said in lines[0], (flag, err)
    assert "Traceback" not in err, (flag, err)
    assert not (tmp_path / f"w{i}" / "config.json").exists(), flag


@pytest.mark.parametrize("job", [sft, rl, cache_rl])
def test_the_published_recipe_stops_at_once_on_a_small_machine(job):
  """One line that says what 4B needs and names :tiny and :colab."""
  config = job.get_config()
  config.init = "Qwen/Qwen3-32B"  # too large for any machine that runs the tests
  with pytest.raises(ValueError, match=r"GB.*:tiny.*:colab") as error:
    policy.check_memory(config)
  assert "\n" not in str(error.value)


def test_a_missing_checkpoint_names_the_way_out():
  """No hub within reach: the line says what was wanted and which variants need no download."""
  with pytest.raises(ValueError, match=r"Qwen3-4B-Thinking-2507.*:tiny.*:colab") as error:
    policy.locate("Qwen/Qwen3-4B-Thinking-2507", "main")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", [sft, rl, cache_rl])
@pytest.mark.parametrize("variant", ["", "tiny", "colab", "gpu"])
def test_every_variant_is_a_valid_config(module, variant):
  flags.check(module.get_config(variant))


@pytest.mark.parametrize(
  ("field", "value", "said"),
  [
    ("lr", -1.0, "above 0"),
    ("lr", float("inf"), "finite"),
    ("b2", -0.5, "0 or more"),
    ("schedule", "linear", "choose one of constant, cosine"),
    ("clip_norm", 0.0, "above 0"),
  ],
)
def test_impossible_values_are_named(field, value, said):
  config = sft.get_config("tiny")
  config.optimizer[field] = value
  with pytest.raises(ValueError, match=rf"config\.optimizer\.{field} is .*{said}"):
    flags.check(config)


def test_an_unknown_variant_is_refused():
  with pytest.raises(ValueError, match="no variant 'huge'"):
    rl.get_config("huge")


def test_the_published_numbers():
  """The plain configs are the recipe: facts of the original's released configs and card."""
  a, b, c = sft.get_config(), rl.get_config(), cache_rl.get_config()
  assert (a.steps, a.optimizer.lr, a.batch.row_length) == (620, 3e-5, 45_056)
  assert (b.steps, b.optimizer.lr, b.rollout.problems, b.rollout.attempts) == (150, 1e-6, 64, 16)
  assert (b.rollout.max_tokens, b.rollout.temperature, b.objective.eps_high) == (49_152, 0.8, 4.0)
  assert (c.cache.turns, c.cache.states, c.cache.max_tokens) == (3, 2, 2_048)
  assert c.rollout.problems * c.cache.states * c.rollout.attempts == 1_024


def judged(folder, url: str, monkeypatch, **changes):
  """An RL config with a judge model, random weights and a prompt that its engine has room for."""
  monkeypatch.setenv("OPENAI_BASE_URL", url)
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  (folder / "short.md").write_text("{problem} {marker} {submission}")
  c = small(rl.get_config("tiny"), 3)
  c.judge.reward = "rubric"
  c.judge.update(api="chat", style="parity", template=str(folder / "short.md"), canary_share=0.0)
  c.judge.update(changes)
  c.objective.drop_dead_groups = False
  return c


@pytest.mark.slow
def test_a_judge_that_is_gone_saves_the_run_and_stops_it_with_one_line(tmp_path, monkeypatch):
  """It answers for two steps and refuses then; mended, the same command goes on after them."""
  mended = []

  def script(number, request):
    if mended or number <= 2 * 8:  # the check, and eight proofs a step
      return fake_endpoint.said(f"<score>{number % 8}</score>")
    return fake_endpoint.error(401, "the key was withdrawn")

  with fake_endpoint.serve(script) as server:
    c = judged(tmp_path, server.url, monkeypatch)
    c.checkpoint.every = 100
    # All proofs are graded: an empty one would need no call.
    monkeypatch.setattr(experience, "split_proof", lambda text: ("", f"proof {text}"))
    with pytest.raises(ValueError, match="HTTP 401.*OPENAI_API_KEY") as caught:
      train.main(c, str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    saved = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", keep=9).latest_step()
    assert saved == 2
    mended.append(True)
    train.main(c, str(tmp_path / "run"))
  rows = rows_of(tmp_path / "run")
  assert [row["step"] for row in rows] == [1, 2, 3]
  assert all(row["judge/calls"] == 8 and row["invalid_share"] == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["policy", "init"])
def test_a_run_may_judge_itself(engine, tmp_path, monkeypatch):
  """On the engine that samples, or on one with the parameters that it began with."""
  c = judged(tmp_path, "", monkeypatch, engine=engine, max_tokens=8)
  monkeypatch.setattr(experience, "split_proof", lambda text: ("", f"proof {text[:20]}"))
  train.main(c, str(tmp_path / "run"))
  rows = rows_of(tmp_path / "run")
  assert [row["step"] for row in rows] == [1, 2, 3]
  assert all(row["judge/calls"] == 8 and "judge/dollars" not in row for row in rows)
