"""Blocks that the configs share.

A config is a flat page of numbers: `get_config(arg)` in each file, `arg` the part after the colon
in `--config=configs/sft.py:tiny`. Every default lives here or in the config files, none in the
code.
"""

from ml_collections import ConfigDict

from configs import scaffolds

QWEN3 = "Qwen/Qwen3-4B-Thinking-2507"
QWEN3_INSTRUCT = "Qwen/Qwen3-4B-Instruct-2507"


def base() -> ConfigDict:
  """What every training job has, at 4B size; the job's file sets the rest."""
  c = ConfigDict()
  c.seed = 42
  c.steps = 0
  # Where the parameters come from: a workdir of this program, a Hugging Face folder or hub id; ""
  # makes random ones of the preset's sizes. Ignored where the workdir has a checkpoint to resume.
  c.init = QWEN3
  c.init_revision = "main"
  c.tokenizer = ""  # a folder or hub id; "" takes the one that comes with init
  c.tokenizer_revision = "main"
  c.model = ConfigDict({
    "preset": "",  # "" reads the sizes from init's config.json
    "dtype": "bfloat16",
    "param_dtype": "float32",
    "remat": "layer",
    "attention": "auto",
    "score_chunk": 1024,
  })  # fmt: skip
  # LoRA: an adapter is trained, and init's parameters stay as they are, in model.dtype. 0 is off.
  c.lora = ConfigDict({
    "rank": 0,
    "alpha": 32.0,  # the change is scaled by alpha / rank
    "targets": "all-linear",  # or ends of names with commas between: "q_proj,v_proj", "mlp.*"
    "sampler": "unmerged",  # or "merged": a second copy of the weights for the sampler
  })  # fmt: skip
  # Rows are split over data and fsdp, the tokens of a row over sequence, heads over tensor.
  c.mesh = ConfigDict({"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1})
  c.optimizer = ConfigDict({
    "lr": 1e-6,
    "schedule": "constant",  # after the warm-up: "constant" or "cosine" (to zero)
    "warmup_steps": 0,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "decay_norms": False,
    "clip_norm": 1.0,
    "mu_dtype": "float32",  # of the first moment
    "second_moment": "float32",  # or "bfloat16", stochastically rounded; or "factored" (Adafactor)
  })  # fmt: skip
  c.batch = ConfigDict({
    "row_length": 0,  # tokens of a packed row
    "rows": 0,  # rows a step; RL pads what it has up to a multiple of this
    "microbatch_rows": 0,  # rows at once in the backward pass; 0 is all of them
  })  # fmt: skip
  c.checkpoint = ConfigDict({"every": 50, "keep": 2})
  c.log = ConfigDict({"every": 1, "samples": 4})
  c.eval = held_out()
  c.profile = ConfigDict({"steps": ()})  # (10, 13): a jax.profiler trace of steps 10, 11 and 12
  c.max_skipped_steps = 5  # non-finite updates in a row before the run stops
  return c


def held_out() -> ConfigDict:
  """Evaluation during training, on the test set of the release (qed_nano_rl.yaml)."""
  return ConfigDict({
    "interval": 0,  # updates between two evaluations, the first before any; 0 is never
    "data": {
      "source": "lm-provers/FineProofs-RL-test",
      "revision": "main",
      "split": "test",
      "max_bad_share": 0.01,
      "problems": 128,  # at most
    },
    "samples_per_problem": 1,
    "pass_score": 6,
    "problems_at_once": 64,
    "failures_in_a_row": 8,
    "scaffold": scaffolds.get("direct"),
    "judge": rubric_judge(),
    "rollout": engine(slots=64, max_length=49_920) | {"pages": 4_096},  # 39 GB at 4B, meanwhile
  })  # fmt: skip


def engine(slots: int, max_length: int) -> dict:
  """The rollout engine's fields, at 4B size."""
  return {
    "slots": slots,  # attempts at once
    "max_length": max_length,  # prompt and completion
    "page": 256,  # tokens of a page of keys and values: a MiB of Qwen3-4B, a step of the TPU kernel
    "pages": 0,  # of all replicas; 0 is as many as the slots could need
    "kv_dtype": "",  # of the pages: "" is the compute dtype; "int8" holds twice as many tokens
    "chunk": 64,  # tokens decoded per host call
    "prefill_rows": 8,  # pieces of prompts computed at once ...
    "prefill_tokens": 128,  # ... of so many tokens each
    "prefill_budget": 4096,  # prompt tokens before a chunk of decoding that waits for them
    "keep_prefixes": False,  # whether cached prompts outlive the policy that computed them
    "lanes": 1,  # engines on each set of devices
  }


def streaming(max_lag: int, order: str) -> dict:
  """How sampling and training take turns."""
  return {
    "max_lag": max_lag,  # policy updates that a token may be old when it is trained; 0 is in step
    "order": order,  # "admission" is reproducible bit by bit; "arrival" waits for no slow judge
    "placement": "colocated",  # or "split": some devices sample while the others train
    "sampling_devices": 0,  # how many, with "split"
  }


def tiny_engine() -> dict:
  """The same for the tiny world on two cores."""
  return engine(slots=128, max_length=128) | {
    "page": 16,
    "chunk": 14,
    "prefill_tokens": 64,
    "lanes": 2,  # a program of this size keeps one core busy
  }


def rubric_judge() -> ConfigDict:
  """gpt-oss-20b, medium effort, over the endpoint that OPENAI_BASE_URL names (qed_nano_rl.yaml)."""
  return ConfigDict({
    "reward": "rubric",  # "rubric" (a judge model), "answer" (math-verify), "exact" (tiny world)
    # "" asks the endpoint below; "policy" the policy itself; "init" (where the run began), a
    # workdir, a Hugging Face folder or hub id: an engine of its own in this process.
    "engine": "",
    "engine_revision": "main",
    "model": "openai/gpt-oss-20b",
    "api": "responses",  # "responses" or "chat"
    "base_url_env": "OPENAI_BASE_URL",
    "api_key_env": "OPENAI_API_KEY",  # the name of the variable, never the key
    "style": "strict",  # or "reference", "imo" (0, 1, 6, 7), "parity" (reads as QED-Nano did)
    "template": "",  # another text for the style: a file of qed_jax/prompts, or a path
    "temperature": 1.0,
    "max_tokens": 81_920,
    "reasoning_effort": "medium",
    "min_chars": 100,  # of a proof; a shorter or longer one is a 0 without a call; 0 is no limit
    "max_chars": 40_000,  # what the judge's context of 98,304 tokens has room for
    "samples": 3,  # replies asked for while they cannot be parsed
    "votes": 1,  # independent readings of a proof
    "aggregate": "median",  # what becomes of them: "median" (the lower one), "mean", "min"
    "retries": 3,  # requests for one reply
    "timeout_s": 900.0,  # of a request
    "deadline_s": 3600.0,  # of a reply, its retries and waits included
    "outage_after": 16,  # failures in a row that make it ask whether the endpoint is down
    "patience_s": 7200.0,  # of an outage, while sampling and grading wait; then the run stops
    "concurrency": 256,
    "token_budget": 0,  # read and written before the run stops; 0 is no limit
    "price_read": 0.0,  # dollars for a million tokens
    "price_written": 0.0,
    "money_budget": 0.0,  # dollars before the run stops; 0 is no limit
    "on_invalid": "mask",  # "zero" reproduces the original
    "cache": "judge.jsonl",
    "canary_share": 0.01,  # of proofs that bring one of known score along
    "canaries": "",  # JSONL of {statement, rubric, proof, score}; "" takes ours
    "canary_window": 16,  # the last so many are looked at ...
    "max_canary_error": 2.0,  # ... and stop the run where they are off by more points on average
    "audit_share": 0.01,  # of gradings whose conversations are kept to be read
    "audit": "judge_audit.jsonl",
  })  # fmt: skip


def exact_judge() -> ConfigDict:
  """The tiny world's grader; the judge's other fields stand by, unused."""
  c = rubric_judge()
  c.reward = "exact"
  return c


def tiny(c: ConfigDict) -> None:
  """The tiny world: a Qwen3 of 0.6 million parameters on two CPU cores."""
  c.init, c.init_revision = "", ""
  c.model.update(preset="tiny", dtype="float32", remat="none", score_chunk=128)
  c.mesh.update(sequence=1, tensor=1)
  c.steps = 1_300
  c.optimizer.update(lr=3e-3, warmup_steps=20, b2=0.95, weight_decay=0.0, clip_norm=1.0)
  c.batch.update(row_length=128, rows=16, microbatch_rows=0)
  c.checkpoint.every = 100
  c.log.every = 10
  c.eval.data.update(source="tiny_world", revision="", split="heldout", problems=64)
  c.eval.scaffold = scaffolds.get("direct", tiny=True)
  c.eval.judge = exact_judge()
  c.eval.rollout.update(tiny_engine() | {"slots": 64, "pages": 0})


def colab(c: ConfigDict, lr: float) -> None:
  """One 16 GB TPU chip: an adapter of rank 16 for Qwen3-4B, whose own weights stay in bfloat16.

  lr: an adapter takes ten times that of full fine-tuning (Thinking Machines 2025, "LoRA Without
  Regret").
  """
  c.mesh.update(sequence=1, tensor=1)
  c.lora.rank = 16
  c.optimizer.lr = lr
  c.checkpoint.every = 5  # a free session may end at any time, and an adapter is small
  c.eval.rollout.update(slots=8, max_length=4_096, pages=0)
  c.eval.scaffold.reason.max_tokens = 2_048
