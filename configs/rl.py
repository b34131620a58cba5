"""RL with rubric rewards: stage 2 of QED-Nano.

  python -m qed_jax.train --config=configs/rl.py --workdir=gs://bucket/rl --config.init=gs://bucket/sft
  python -m qed_jax.train --config=configs/rl.py:tiny --workdir=runs/rl --config.init=runs/sft

The published recipe: FineProofs-RL (5,227 problems with 0-7 rubrics), 64 prompts x 16 attempts =
1,024 rollouts a step, 150 steps, at most 49,152 new tokens at T = 0.8, judge gpt-oss-20b (medium
effort, T = 1), constant lr 1e-6, AdamW, weight decay 0.01, PPO surrogate with epsilon 4 (only a
ratio over 5 with A > 0 is clipped), A = r - mean of the group, token sum / rollouts, entropy 1e-4,
no KL, tokens at most 5 updates old. 96 H100, 4 days. The clip norm 0.3 of the release acted on a
gradient divided by 64 (qed_nano.md 3.5), that is 19.2 in the units of this loss.

Variants: `:tiny` the tiny world; `:colab` one 16 GB TPU chip, LoRA; `:gpu` one H200.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
  c = common.base()
  c.job = "rl"
  c.steps = 150
  c.optimizer.clip_norm = 19.2
  c.mesh.tensor = 4
  c.batch.update(row_length=49_920, rows=64, microbatch_rows=16)
  c.checkpoint.every = 5
  c.data = ConfigDict({
    "source": "lm-provers/FineProofs-RL",
    "revision": "main",
    "split": "train",
    "min_reward_mean": 0.0,
    "max_reward_mean": 1.0,
    "max_bad_share": 0.01,
    "size": 0,  # problems to make, where the source makes them
  })  # fmt: skip
  c.judge = common.rubric_judge()
  c.rollout = ConfigDict({
    "problems": 64,
    "attempts": 16,
    "prompt": "prove",
    "max_tokens": 49_152,
    "temperature": 0.8,
    "top_p": 1.0,
    "top_k": 0,
    **common.engine(slots=256, max_length=49_920),
    **common.streaming(max_lag=5, order="arrival"),
  })  # fmt: skip
  c.rollout.pages = 16_384  # 16,384 tokens a slot on average
  c.objective = ConfigDict({
    "policy_loss": "ppo",
    "eps_low": 4.0,
    "eps_high": 4.0,
    "kl_coef": 0.0,
    "entropy_coef": 1e-4,
    "clamp_log_ratio": 5.0,
    "baseline": "mean",
    "normalize_std": False,
    "normalizer": "rollouts",
    "overlong_filter": False,
    "drop_dead_groups": False,  # leave out groups without advantage; they hold entropy bonus only
  })  # fmt: skip
  if variant == "tiny":
    common.tiny(c)
    c.steps = 60
    c.optimizer.update(lr=5e-4, warmup_steps=5)
    c.checkpoint.every = 20
    c.log.every = 1
    c.data.update(source="tiny_world", revision="", size=20_000)
    c.judge = common.exact_judge()
    c.rollout.update(problems=16, attempts=8, prompt="tiny_reason", max_tokens=22, temperature=1.0)
    c.rollout.update(common.tiny_engine() | common.streaming(max_lag=0, order="admission"))
    c.rollout.pages = 0
    c.objective.drop_dead_groups = True
  elif variant == "gpu":
    c.mesh.tensor = 1
    c.rollout.max_lag = 1
    c.rollout.update(problems=16, attempts=8, max_tokens=16_384, slots=48, max_length=20_480)
    c.rollout.pages = 1_024  # 39 GB; a slot holds 5,461 tokens on average, the longest 20,480
    c.optimizer.update(mu_dtype="bfloat16", second_moment="bfloat16")  # 16 GB of 141 saved
    c.batch.update(row_length=20_480, rows=4, microbatch_rows=1)
  elif variant == "colab":
    common.colab(c, lr=1e-5)
    c.rollout.update(common.streaming(max_lag=0, order="admission"))
    c.rollout.update(problems=2, attempts=8, max_tokens=3_072, slots=8, max_length=4_096)
    c.rollout.pages = 96  # 3.4 GiB; a slot holds 3,072 tokens on average, the longest 4,096
    c.batch.update(row_length=4_096, rows=4, microbatch_rows=1)
  elif variant:
    raise ValueError(f"this config has no variant {variant!r}: use tiny, colab or gpu")
  return c
