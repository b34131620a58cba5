"""Data building: one job a command, rows in, rows and a card out.

  python -m qed_jax.curate --config=configs/curate.py:teacher --workdir=runs/data/teacher \\
      --config.data.source=AI-MO/olympiads --config.endpoint.model=deepseek-ai/DeepSeek-Math-V2
  python -m qed_jax.curate --config=configs/curate.py:filter --workdir=runs/data/filter \\
      --config.data.source=runs/data/teacher --config.endpoint.model=openai/gpt-5-nano

Jobs: teacher, filter, rubrics, difficulty, select, decontaminate, deduplicate; the source of each
may be the workdir of the one before. Models are asked at the address in `endpoint.base_url_env`, or
`policy` names one to sample from in this process.

The numbers are QED-Nano's where it printed them: teacher DeepSeek-Math-V2 at T = 1, at most 124,928
tokens, 256 at once, a trace a problem; filter gpt-5-nano, 32 at once; schemes by Gemini 3 Pro;
difficulty from 128 attempts of Qwen3-4B-Thinking-2507 under gpt-oss-20b; problems with a mean
reward over 0.7 dropped, and those never solved. Not published, so ours: which labels of the filter
reject, the n-grams and thresholds of (de)contamination (4-grams: among the 105,570 pairs of
IMO-AnswerBench's and IMO-ProofBench's 460 problems none is over 0.42), max_missing_share.
"""

from ml_collections import ConfigDict

from configs import common

JOBS = ("teacher", "filter", "rubrics", "difficulty", "select", "decontaminate", "deduplicate")


def get_config(variant: str = "") -> ConfigDict:
  if variant not in JOBS:
    raise ValueError(f"configs/curate.py has no job {variant!r}: use one of {', '.join(JOBS)}")
  c = ConfigDict()
  c.task = variant
  c.seed = 42
  c.data = ConfigDict({
    "source": "",  # a file, a folder such as another job's workdir, or a hub id
    "revision": "main",  # of a hub id
    "subset": "default",
    "split": "train",
    "max_bad_share": 0.01,
  })  # fmt: skip
  c.output = ConfigDict({
    "format": "parquet",  # or "jsonl"
    "license": "",  # of the card; "" takes that of the source
    "title": "",  # of the card; "" takes the workdir's name
  })  # fmt: skip
  c.max_missing_share = 0.01  # of what was asked for; more, and nothing is written yet
  if variant in ("teacher", "filter", "rubrics", "difficulty"):
    asking(c)
  if variant == "teacher":
    c.prompt = "bare"  # what the teacher is asked
    c.train_prompt = "prove"  # the question in the column `messages`
    c.samples_per_problem = 1
    c.concurrency = 256
    c.endpoint.stream = True
    c.rollout.update(max_tokens=124_928, max_length=131_072)
  elif variant == "filter":
    c.prompt = "quality"
    c.attempts = 3  # replies asked for while they cannot be read
    c.concurrency = 32
    c.rollout.update(max_tokens=16_384)
    c.filter = ConfigDict({
      "reject": ("incomplete", "gaps", "wrong", "disagreement", "computational"),
      "min_difficulty": 3,  # of 1 to 10
      "max_difficulty": 10,
    })  # fmt: skip
  elif variant == "rubrics":
    c.prompt = "marking_scheme"
    c.attempts = 5  # replies asked for until the checkpoints add up to 7
    c.concurrency = 32
    c.rollout.update(max_tokens=32_768)
  elif variant == "difficulty":
    c.prompt = "prove"
    c.samples_per_problem = 128
    c.concurrency = 256
    c.rollout.update(max_tokens=49_152, temperature=0.8)
    c.judge = common.rubric_judge()
  elif variant == "select":
    c.select = ConfigDict({
      "min_reward_mean": 0.0,
      "max_reward_mean": 0.7,
      "drop_never_solved": True,  # whether a mean of 0 is dropped
      "min_grades": 62,  # FineProofs-RL has 62 to 256 a problem
    })  # fmt: skip
  elif variant == "decontaminate":
    hub = {"revision": "main", "split": "train"}
    c.decontaminate = ConfigDict({
      "benchmarks": {  # a source of "" is left out
        "imo_proofbench": {"source": "lm-provers/IMOProofBench", **hub},
        "proofbench": {"source": "lm-provers/ProofBench", **hub},
        "imo_answerbench": {"source": "lm-provers/IMOBench-FinalAnswer", **hub},
        "fine_proofs_test": {
          "source": "lm-provers/FineProofs-RL-test", "revision": "f2f55ba", "split": "test"
        },
      },
      "ngram": 4,
      "threshold": 0.45,
      "exclude": r"\b2025\b",  # regular expression of competitions and sources; "" excludes none
    })  # fmt: skip
  elif variant == "deduplicate":
    c.deduplicate = ConfigDict({"ngram": 4, "threshold": 0.5})
  return c


def asking(c: ConfigDict) -> None:
  """Whom a job asks, and how."""
  c.concurrency = 32  # items at once
  c.max_failures = 20  # in a row before the job stops; what is finished stays
  c.endpoint = ConfigDict({
    "model": "",  # the name that the server knows; "" asks the policy below
    "base_url_env": "TEACHER_BASE_URL",
    "api_key_env": "TEACHER_API_KEY",  # the name of the variable, never the key
    "api": "chat",
    "stream": False,  # pieces as they come: a long reply is not lost to a proxy's time-out
    "idle_s": 600.0,  # without a piece of a stream
    "timeout_s": 7_200.0,  # of a request
    "deadline_s": 21_600.0,  # of a reply, its retries and waits included
    "retries": 3,
    "token_budget": 0,  # read and written before nothing more is sent; 0 is no limit
    "omit": (),  # sampling fields that the server rejects
    "hides_thinking": False,
    "reasoning_effort": "",
  })  # fmt: skip
  c.policy = ""  # a workdir, a Hugging Face folder or hub id, sampled in this process
  c.policy_revision = "main"
  c.model = ConfigDict({"dtype": "bfloat16", "remat": "none", "attention": "auto"})
  c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
  c.rollout = ConfigDict({
    "max_tokens": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    **common.engine(slots=64, max_length=53_248),
  })  # fmt: skip
  c.rollout.pages = 8_192  # 77 GB at 4B; 8,192 tokens a slot on average
