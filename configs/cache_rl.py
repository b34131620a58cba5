"""RL with a reasoning cache: stage 3 of QED-Nano, rl.py with another source of prompts.

  python -m qed_jax.train --config=configs/cache_rl.py --workdir=gs://bucket/cache_rl
  python -m qed_jax.train --config=configs/cache_rl.py:tiny --workdir=runs/cache_rl \
      --config.init=runs/sft

The published recipe (qed_nano_rc.yaml): every problem rolls in 3 turns of reason (49,152 tokens, T
= 0.8) and summarise (2,048 tokens, T = 0.7, top-p 0.8, top-k 20, by a frozen
Qwen3-4B-Instruct-2507); of the 4 states seen (before each turn and after the last) 2 are drawn; 16
attempts each; group = (problem, state); 32 problems x 2 x 16 = 1,024 rollouts a step, sequences to
53,000 tokens; the rest as rl.py. The clip norm 0.3 acted on a gradient divided by 256: 76.8 here.
No replay buffer of summaries there (`replay` turns on that of the reasoning-cache paper, section
6).

Fits 64 chips of a v5p or a v6e (docs/scale.md): each group of four holds a row of the backward
pass, and a replica of the policy and of the summariser with 1,280 and 256 pages.

Variants: `:tiny` the tiny world; `:colab` one 16 GB TPU chip, LoRA; `:gpu` one H200.
"""

from ml_collections import ConfigDict

from configs import common, rl, scaffolds


def get_config(variant: str = "") -> ConfigDict:
  c = rl.get_config(variant)
  c.job = "cache_rl"
  c.rollout.prompt = "reason"
  c.cache = ConfigDict({
    "turns": 3,
    "states": 2,  # drawn of the turns + 1 states of a problem
    "final_state": True,  # the state after the last summary can be drawn too
    "summariser": common.QWEN3_INSTRUCT,  # a workdir, HF folder or hub id; "" is the policy
    "summariser_revision": "main",
    "slots": 128,  # of a frozen summariser's engine, and its pages: beside the policy's own
    "pages": 4_096,
    "summarise": "summarise",
    "max_tokens": 2_048,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "replay": False,
    "summaries": 1,  # over 1: that many a drawn state are compared, and the summariser trained
  })  # fmt: skip
  c.eval.scaffold = scaffolds.get("reasoning_cache", tiny=variant == "tiny")
  if variant == "tiny":
    c.rollout.prompt = "tiny_reason"
    c.rollout.problems = 16
    c.cache.update(summariser="init", summariser_revision="", summarise="tiny_summarise")
    c.cache.update(max_tokens=26, slots=c.rollout.slots, pages=0)
  elif variant in ("gpu", "colab"):
    c.rollout.problems //= 2
    c.cache.summariser, c.cache.summariser_revision = "", ""  # one model in memory
    c.cache.max_tokens = {"gpu": 2_048, "colab": 512}[variant]
  else:
    c.rollout.problems = 32
    c.mesh.tensor = 4
    c.batch.update(row_length=53_248, microbatch_rows=16)
    c.rollout.update(max_length=53_248, pages=20_480)  # 20,480 tokens a slot on average
    c.optimizer.clip_norm = 76.8
  return c
