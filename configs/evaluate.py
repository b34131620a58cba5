"""Held-out evaluation: benchmark x scaffold x model x judge -> a table with errors.

  python -m qed_jax.evaluate --config=configs/evaluate.py --workdir=runs/eval \\
      --config.policy=runs/cache_rl --config.label="cache RL"
  python -m qed_jax.evaluate --config=configs/evaluate.py:tiny --workdir=runs/demo/eval/sft \\
      --config.policy=runs/demo/sft --config.label=SFT
  python -m qed_jax.evaluate --config=configs/evaluate.py:proofbench,rsa --workdir=runs/rsa ...
  python -m qed_jax.evaluate --config=configs/evaluate.py:judge --workdir=runs/judge

A variant is a list of words in any order: `tiny`, a benchmark (imo_proofbench, the plain one;
proofbench, imo_answerbench), a scaffold of configs/scaffolds.py (reasoning_cache, the plain one),
or `judge`, where the judge marks proofs that people have marked (438 solutions of MathArena).

Every turn of the reasoning cache is graded, so one run gives the single pass (turn 1) and the score
by turn. The published tables are avg@3 under Gemini 3 Pro ($2 and $12 per million tokens); scores
under two judges are not comparable. The policy may also be a served model (`endpoint.model`, its
address in the variable that `endpoint.base_url_env` names).
"""

from ml_collections import ConfigDict

from configs import common, scaffolds

IMO_SCALE = {"style": "imo"}
BENCHMARKS = {
  "imo_proofbench": ({"source": "lm-provers/IMOProofBench", "problems": 60}, IMO_SCALE),
  "proofbench": ({"source": "lm-provers/ProofBench", "split": "24_25", "problems": 145}, {}),
  "imo_answerbench": (
    {"source": "lm-provers/IMOBench-FinalAnswer", "problems": 400},
    {"reward": "answer"},
  ),
}


def get_config(variant: str = "") -> ConfigDict:
  words = [word for word in variant.split(",") if word]
  tiny, study = "tiny" in words, "judge" in words
  words = [word for word in words if word not in ("tiny", "judge")]
  benchmark = next((word for word in words if word in BENCHMARKS), "imo_proofbench")
  rest = [word for word in words if word not in BENCHMARKS]
  if len(rest) > 1 or (tiny and (study or len(words) > len(rest))):
    raise ValueError(f"configs/evaluate.py has no variant {variant!r}: see its first lines")

  c = ConfigDict()
  c.study = "judge" if study else "proofs"
  c.seed = 1_000
  c.label = ""  # the name of the row in tables and pictures; "" takes the policy's
  c.policy = ""  # a workdir, a Hugging Face folder or hub id
  c.policy_revision = "main"
  c.untrained = False  # random parameters of the policy's sizes: the floor to compare with
  c.summariser = ""  # another policy that writes the reasoning cache's summaries; "" is the policy
  c.summariser_revision = "main"
  c.endpoint = ConfigDict({
    "model": "",  # set to ask a server instead of loading a policy
    "base_url_env": "POLICY_BASE_URL",
    "api_key_env": "POLICY_API_KEY",
    "concurrency": 64,
    "timeout_s": 3600.0,
    "deadline_s": 18_000.0,
    "retries": 5,
    "cache": "policy.jsonl",  # replies; a stopped attempt asks for none of them again
  })  # fmt: skip
  c.model = ConfigDict({"dtype": "bfloat16", "remat": "none", "attention": "auto"})
  c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
  c.data = ConfigDict({
    "name": "",  # of the benchmark in tables; "" takes the source's
    "source": "",
    "revision": "main",
    "split": "train",
    "max_bad_share": 0.01,
    "problems": 60,  # at most
  })  # fmt: skip
  c.samples_per_problem = 3
  c.pass_score = 6  # from here on a proof counts as correct in pass@k
  c.problems_at_once = 64  # attempts in flight
  c.journal = (
    "calls.jsonl"  # answers of engines in this process, for a run that goes on; "" is none
  )
  c.failures_in_a_row = 8  # attempts, before the run stops
  c.scaffold = scaffolds.get((rest or ["reasoning_cache"])[0], tiny=tiny)
  c.rollout = ConfigDict(common.engine(slots=64, max_length=53_248))
  c.rollout.pages = 8_192  # 77 GB at 4B; 8,192 tokens a slot on average
  c.judge = common.rubric_judge()
  c.prices = ConfigDict({  # US dollars per million tokens
    "read": 0.0, "write": 0.0, "judge_read": 0.0, "judge_write": 0.0
  })  # fmt: skip
  data, judge = BENCHMARKS[benchmark]
  c.data.update(data)
  c.judge.update(judge)
  if study:
    c.data.update(source="lm-provers/matharena-gradingbench", problems=438)
    c.judge.style = "strict"
  if tiny:
    if c.scaffold.name == "reasoning_cache":
      c.scaffold.turns = 6  # twice those of training
    c.model.dtype = "float32"
    c.data.update(source="tiny_world", revision="", split="heldout", problems=512)
    c.samples_per_problem = 1
    c.problems_at_once = 256
    c.rollout.update(common.tiny_engine() | {"pages": 0})
    c.judge = common.exact_judge()
  return c
