"""The processes of bench_train.py: torch transformers, tunix and this trainer, one library in each.

A process opens the folder that bench_train.py wrote: config.json (Hugging Face's), run.json (Run),
tokens.npy and, unless the weights are random, model.safetensors. Names of work:

  update    loss and gradient of rows of tokens, clipped, and a step of AdamW
  grpo      attempts at prompts, a reward of each, advantages by prompt, one update on all of them
"""

import argparse
import dataclasses
import json
import queue
import sys
import threading
from pathlib import Path

import numpy as np
from bench_cpu import ROOT
from engine_workers import OURS, TORCH, TUNIX, Ids, work_for_parent

LR, B1, B2, EPS, CLIP = 1e-6, 0.9, 0.95, 1e-8, 1.0


@dataclasses.dataclass(frozen=True)
class Run:
  """What is trained. dtype: of weights and products. remat: of this trainer; torch checkpoints each
  layer unless it is "none". attention: of this trainer. group: attempts at a prompt."""

  rows: int
  length: int
  prompt: int
  new: int
  group: int
  dtype: str
  remat: str
  attention: str
  chunk: int


def read(folder: Path) -> tuple[Run, np.ndarray]:
  return Run(**json.loads((folder / "run.json").read_text())), np.load(folder / "tokens.npy")


def reward(tokens) -> float:
  """Something that differs between attempts: how many of the first tokens are even, 0 to 7."""
  return float(sum(int(token) % 2 == 0 for token in tokens[:7]))


class Transformers:
  """torch, eager, with its fused AdamW and the attention that it picks (SDPA)."""

  packages = ("torch", "transformers")

  def __init__(self, folder: Path):
    import torch
    import transformers

    self.torch = torch
    self.run_, tokens = read(folder)
    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, self.run_.dtype)
    if (folder / "model.safetensors").exists():
      model = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
      config = transformers.AutoConfig.from_pretrained(folder)
      model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    self.model = model.to(self.device).train()
    if self.run_.remat != "none":
      self.model.gradient_checkpointing_enable({"use_reentrant": False})
    arguments = {"lr": LR, "betas": (B1, B2), "eps": EPS, "weight_decay": 0.0, "fused": True}
    self.optimizer = torch.optim.AdamW(self.model.parameters(), **arguments)
    self.tokens = torch.tensor(tokens[: self.run_.rows], device=self.device)

  def prepare(self, work: str) -> None:
    """Nothing comes before the clock starts."""

  def run(self, work: str) -> dict:
    torch = self.torch
    self.optimizer.zero_grad(set_to_none=True)
    loss = self.model(self.tokens, labels=self.tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
    self.optimizer.step()
    if self.device == "cuda":
      torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
    return {"loss": float(loss.detach()), "peak_bytes": peak}


class Tunix:
  """google-tunix's GRPO learner with its vanilla sampler, no KL term, a cache just long enough.

  Its loop asks for the next prompts when a step is done; that is where it waits for its turn.
  """

  packages = ("google-tunix", "jax")

  def __init__(self, folder: Path):
    import jax
    import optax
    from tunix.models.qwen3 import model, params
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    self.device = jax.devices()[0].platform
    run, tokens = read(folder)
    described = json.loads((folder / "config.json").read_text())
    config = model.ModelConfig(
      num_layers=described["num_hidden_layers"],
      vocab_size=described["vocab_size"],
      embed_dim=described["hidden_size"],
      hidden_dim=described["intermediate_size"],
      num_heads=described["num_attention_heads"],
      head_dim=described["head_dim"],
      num_kv_heads=described["num_key_value_heads"],
      rope_theta=int(described["rope_parameters"]["rope_theta"]),
      norm_eps=described["rms_norm_eps"],
      use_tied_embedding=described["tie_word_embeddings"],
    )
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), devices=jax.devices()[:1], axis_types=automatic)
    actor = params.create_model_from_safe_tensors(str(folder), config, mesh)
    optimizer = optax.chain(
      optax.clip_by_global_norm(CLIP), optax.adamw(LR, b1=B1, b2=B2, eps=EPS, weight_decay=0.0)
    )
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT, rl_cluster.Role.REFERENCE)
    cluster = rl_cluster.RLCluster(
      actor=actor,
      tokenizer=Ids(),
      cluster_config=rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh),
        training_config=rl_cluster.RLTrainingConfig(
          actor_optimizer=optimizer, eval_every_n_steps=10**9, max_steps=10**9
        ),
        rollout_config=base_rollout.RolloutConfig(
          max_tokens_to_generate=run.new,
          max_prompt_length=run.prompt,
          kv_cache_size=run.prompt + run.new,
          temperature=1.0,
          top_p=1.0,
          eos_tokens=[Ids().eos_id()],
        ),
      ),
    )
    learner = grpo_learner.GRPOLearner(
      cluster,
      grpo_learner.GRPOConfig(num_generations=run.group, num_iterations=1, beta=0.0),
      reward_fns=lambda prompts, completions, **_: [reward(Ids().encode(c)) for c in completions],
    )
    self.turns, self.done, self.failed = queue.Queue(), queue.Queue(), None
    texts = np.array([Ids().decode(row) for row in tokens[: run.rows, : run.prompt].tolist()])

    def batches():
      while True:
        self.turns.get()
        yield {"prompts": texts}
        self.done.put(None)

    def train():
      try:
        learner.train(batches())
      except Exception as error:  # the parent is told, whatever it was
        self.failed = error
      self.done.put(None)

    threading.Thread(target=train, daemon=True).start()

  def prepare(self, work: str) -> None:
    """Nothing comes before the clock starts."""

  def run(self, work: str) -> dict:
    self.turns.put(None)
    self.done.get()
    if self.failed is not None:
      raise self.failed
    return {}


class Ours:
  """qed_jax.train's update, and the engine in front of it."""

  packages = ("jax", "flax", "optax")

  def __init__(self, folder: Path):
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    import jax

    from configs import rl, sft
    from qed_jax import host_memory, optim, sharding, train
    from qed_jax.model import hf_weights, presets, qwen3

    host_memory.share_one_arena()  # as the programs do
    self.run_, self.tokens = read(folder)
    run, self.device = self.run_, jax.devices()[0].platform
    how = {"dtype": run.dtype, "remat": run.remat, "attention": run.attention}
    self.model = presets.from_hf(hf_weights.read_config(folder), **how)
    self.mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    self.configs = {"update": sft.get_config("tiny"), "grpo": rl.get_config("tiny")}
    for config in self.configs.values():
      config.model.score_chunk = run.chunk
      config.optimizer.update(lr=LR, warmup_steps=0, b1=B1, b2=B2, eps=EPS, clip_norm=CLIP)
      config.optimizer.mu_dtype = run.dtype
    self.configs["grpo"].batch.update(row_length=run.prompt + run.new, rows=run.rows * run.group)
    optimizer = optim.make_optimizer(**train.optimizer_arguments(self.configs["update"]))
    abstract = train.abstract_state(self.model, optimizer, self.mesh, run.dtype)
    layout = train.layout(abstract)
    if (folder / "model.safetensors").exists():
      params = hf_weights.load(folder, self.model, layout["params"], run.dtype)
    else:
      make = lambda key: qwen3.init_params(self.model, key, run.dtype)  # noqa: E731
      params = jax.jit(make, out_shardings=layout["params"])(jax.random.key(0))
    start = jax.jit(optimizer.transform.init, out_shardings=layout["opt_state"])
    self.state = {"params": params, "opt_state": start(params)}
    self.update = {
      name: jax.jit(
        train.make_update(config, self.model, optimizer),
        donate_argnums=0,
        out_shardings=(layout, None),
      )
      for name, config in self.configs.items()
    }
    self.engine, self.step = None, 0

  def prepare(self, work: str) -> None:
    if work == "grpo" and self.engine is None:
      self.engine = self._engine()

  def run(self, work: str) -> dict:
    import jax

    from qed_jax import sharding

    batch = self._rows() if work == "update" else self._experience()
    with jax.set_mesh(self.mesh):
      on_device = sharding.put(self.mesh, batch, "BT")
      self.state, measured = self.update[work](self.state, on_device)
    self.step += 1
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"loss": float(measured["loss"]), "peak_bytes": peak}

  def _rows(self):
    from qed_jax.records import Batch

    tokens_BT = self.tokens[: self.run_.rows].astype(np.int32)
    positions_BT = np.tile(np.arange(tokens_BT.shape[1], dtype=np.int32), (len(tokens_BT), 1))
    weight_BT = (positions_BT > 0) / np.float32(len(tokens_BT) * (tokens_BT.shape[1] - 1))
    return Batch(tokens_BT, positions_BT, np.ones_like(tokens_BT), weight_BT.astype(np.float32))

  def _experience(self):
    from qed_jax.records import Grade, Problem, Rollout
    from qed_jax.rollout.assembly import assemble, marks
    from qed_jax.rollout.engine import Request

    run = self.run_
    self.engine.set_params(self.state["params"], self.step)
    prompts = self.tokens[: run.rows, : run.prompt].tolist()
    ids = [(i, attempt) for i in range(run.rows) for attempt in range(run.group)]
    asked = [Request(prompts[i], i, attempt, run.new, 1.0) for i, attempt in ids]
    completions = self.engine.generate(asked)
    rollouts = [
      Rollout(
        Problem(str(i), ""), (), completion, Grade(int(reward(completion.tokens))), str(i), attempt
      )
      for (i, attempt), completion in zip(ids, completions, strict=True)
    ]
    groups = [rollouts[i : i + run.group] for i in range(0, len(rollouts), run.group)]
    everyone = [marks(groups, self.step)]
    return assemble(self.configs["grpo"], groups, [], self.step, everyone)[0]

  def _engine(self):
    from qed_jax.rollout.device import Shapes
    from qed_jax.rollout.engine import Engine

    run = self.run_
    lanes = 2 if self.device == "cpu" else 1
    return Engine(
      self.model,
      mesh=self.mesh,
      shapes=Shapes(
        slots=run.rows * run.group,
        max_length=run.prompt + run.new,
        page=16,
        pages=0,
        chunk=run.new,
        prefill_rows=4,
        prefill_tokens=run.prompt,
        kv_dtype="",
      ),
      lanes=lanes,
      prefill_budget=run.rows * run.prompt,
      stop_ids=(),
      truncated_logp=False,
      keep_prefixes=False,
    )


LIBRARIES = {OURS: Ours, TORCH: Transformers, TUNIX: Tunix}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("library", choices=tuple(LIBRARIES))
  parser.add_argument("folder", type=Path)
  args = parser.parse_args()
  work_for_parent(lambda: LIBRARIES[args.library](args.folder))


if __name__ == "__main__":
  main()
