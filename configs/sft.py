"""SFT on distilled proofs: stage 1 of QED-Nano.

  python -m qed_jax.train --config=configs/sft.py --workdir=gs://bucket/sft   # every host of a pod
  python -m qed_jax.train --config=configs/sft.py:tiny --workdir=runs/sft     # a laptop, minutes

The published recipe: Qwen3-4B-Thinking-2507, FineProofs-SFT (one trace a problem, 4,281 rows), 620
steps = 5 epochs at a global batch of 32 sequences of up to 45,056 tokens, lr 3e-5 cosine, bf16,
gradient checkpointing, 8 H100. The card prints a warm-up ratio of 0.03 (the paper 10 %): 19 steps
here. Optimizer and weight decay are not published: AdamW without decay, as TRL's default. The
sequences are not packed there; here rows are packed with no attention across examples, so 32 rows
hold more than 32 examples, and `batch.rows` is the field to lower if an epoch should stay 124
steps. IMO-ProofBench 39.5 %, ProofBench 33.3 % are the published results of this stage.

Fits 64 chips of a v5e (docs/scale.md): four hold a row, and a batch takes two backward passes.

Variants: `:tiny` the tiny world; `:colab` one 16 GB TPU chip, LoRA; `:kaggle` all of 4B on eight of
them, with batches of 8 rows, moments in bfloat16 and layers' inputs on the host; `:gpu` one H200.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
  c = common.base()
  c.job = "sft"
  c.steps = 620
  c.optimizer.lr = 3e-5
  c.optimizer.schedule = "cosine"
  c.optimizer.warmup_steps = 19
  c.optimizer.weight_decay = 0.0
  c.mesh.sequence = 4
  c.batch.update(row_length=45_056, rows=32, microbatch_rows=16)
  c.checkpoint.every = 62
  c.data = ConfigDict({
    "source": "lm-provers/FineProofs-SFT",  # hub id, folder, Parquet/JSONL file, "tiny_world"
    "revision": "main",
    "subset": "default",  # "all": several traces a problem
    "split": "train",
    "prompt": "prove",
    "max_bad_share": 0.01,
    "size": 0,  # rows to make, where the source makes them
    "read_threads": 4,
  })  # fmt: skip
  if variant == "tiny":
    common.tiny(c)
    c.data.update(source="tiny_world", revision="", size=20_000, prompt="tiny_reason")
  elif variant == "gpu":
    c.mesh.sequence = 1
    c.batch.update(row_length=32_768, rows=8, microbatch_rows=1)
  elif variant == "kaggle":
    c.mesh.sequence = 8
    c.batch.update(rows=8, microbatch_rows=1)
    c.model.remat = "offload"
    c.optimizer.update(mu_dtype="bfloat16", second_moment="bfloat16")
    c.checkpoint.every = 25
  elif variant == "colab":
    common.colab(c, lr=3e-4)
    c.batch.update(row_length=8_192, rows=8, microbatch_rows=1)
  elif variant:
    raise ValueError(f"configs/sft.py has no variant {variant!r}: use tiny, colab, kaggle or gpu")
  return c
