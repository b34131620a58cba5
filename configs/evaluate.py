"""Held-out evaluation: problems x turns of a scaffold -> grades -> a table with intervals.

  python -m qed_jax.evaluate --config=configs/evaluate.py --workdir=runs/eval \\
      --config.policy=runs/cache_rl --config.label="cache RL"
  python -m qed_jax.evaluate --config=configs/evaluate.py:tiny --workdir=runs/demo/eval/sft \\
      --config.policy=runs/demo/sft --config.label=SFT

Every turn of the reasoning cache is graded, so one run gives the single pass (turn 1) and the score
by turn. The plain config is IMO-ProofBench under the rubric judge with QED-Nano's sampling; the
policy may also be a served model (`endpoint.model`, `endpoint.base_url_env`).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
  c = ConfigDict()
  c.seed = 1_000
  c.label = ""  # the name of the row in tables and pictures; "" takes the policy's
  c.policy = ""  # a workdir, a Hugging Face folder or hub id
  c.policy_revision = "main"
  c.untrained = False  # random parameters of the policy's sizes: the floor to compare with
  c.endpoint = ConfigDict({
    "model": "",  # set to ask a server instead of loading a policy
    "base_url_env": "POLICY_BASE_URL",
    "api_key_env": "POLICY_API_KEY",
    "concurrency": 64,
    "timeout_s": 3600.0,
    "deadline_s": 18_000.0,
    "retries": 5,
  })  # fmt: skip
  c.model = ConfigDict({"dtype": "bfloat16", "remat": "none", "attention": "auto"})
  c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
  c.data = ConfigDict({
    "source": "lm-provers/IMOProofBench",
    "revision": "main",
    "split": "train",
    "max_bad_share": 0.01,
    "problems": 60,  # at most
  })  # fmt: skip
  c.samples_per_problem = 3
  c.problems_at_once = 20  # results are on disk after each such block
  c.cache = ConfigDict({
    "turns": 3,
    "prompt": "reason",
    "summarise": "summarise",
    "summariser": "",  # another policy that writes the summaries; "" is the policy itself
    "summariser_revision": "main",
    "max_tokens": 2_048,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
  })  # fmt: skip
  c.rollout = ConfigDict({
    "max_tokens": 49_152,
    "temperature": 0.8,
    "top_p": 0.95,
    "top_k": 20,
    **common.engine(slots=64, max_length=53_248),
  })  # fmt: skip
  c.rollout.pages = 8_192  # 77 GB at 4B; 8,192 tokens a slot on average
  c.judge = common.rubric_judge()
  if variant == "tiny":
    c.model.dtype = "float32"
    c.data.update(source="tiny_world", revision="", split="heldout", problems=512)
    c.samples_per_problem = 1
    c.problems_at_once = 256
    c.cache.update(turns=6, prompt="tiny_reason", summarise="tiny_summarise", max_tokens=26)
    c.rollout.update(max_tokens=22)
    c.rollout.update(common.tiny_engine() | {"pages": 0})
    c.judge = common.exact_judge()
  elif variant:
    raise ValueError(f"configs/evaluate.py has no variant {variant!r}: use tiny")
  return c
