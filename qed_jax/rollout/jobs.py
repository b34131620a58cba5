"""What each job trains on: its data, its tokenizer, and its stream of Batches."""

import dataclasses
import tempfile

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from qed_jax import hosts, metrics, prompts, records, sharding
from qed_jax.data import problems, sft, tiny_world
from qed_jax.data import tokenizer as tokenizers
from qed_jax.rollout import judging, policy, weights
from qed_jax.rollout.device import Shapes
from qed_jax.rollout.engine import Engine
from qed_jax.rollout.engine_chat import EngineChat
from qed_jax.rollout.experience import Experience
from qed_jax.rollout.judging import grader
from qed_jax.scaffolds.proof import split_proof

TINY_WORLD = "tiny_world"


def tokenizer(config, start: policy.Start, root: epath.Path) -> tokenizers.Tokenizer:
  """config.tokenizer, or the one beside the parameters, or the tiny world's, trained here."""
  if config.tokenizer:
    return tokenizers.load(config.tokenizer, config.tokenizer_revision)
  if start.folder is not None:
    return tokenizers.load(start.folder)
  if config.data.source != TINY_WORLD:
    raise ValueError("config.tokenizer is empty and config.init brings none: set it to a folder")
  # Hosts share the workdir, and one of them writes it.
  folder = root / policy.DESCRIPTION if hosts.index() == 0 else tempfile.mkdtemp()
  return tokenizers.train_sentencepiece(
    tiny_world.corpus(), folder, vocab_size=64, vocab_multiple=64
  )


def data(config):
  """SFT: rows. RL: problems. Raises ValueError, one line, when the source cannot be read."""
  block = config.data
  if block.source == TINY_WORLD:
    if config.job == "sft":
      return tiny_world.sft_rows(config.seed, block.size)
    return tiny_world.problems(config.seed, block.size, "train")
  where = {"revision": block.revision, "split": block.split, "max_bad_share": block.max_bad_share}
  if config.job == "sft":
    return sft.load(block.source, config=block.subset, **where)[0]
  wanted = {"rubric": ("rubric",), "answer": ("answer",), "exact": ("rubric",)}
  reward_range = (block.min_reward_mean, block.max_reward_mean)
  return problems.load(
    block.source,
    config="default",
    require=wanted[config.judge.reward],
    reward_range=None if reward_range == (0.0, 1.0) else reward_range,
    **where,
  )[0]


class Rows:
  """The SFT stream: Grain's iterator behind the interface of Experience.

  Every host packs the whole stream and trains on its own rows of each batch, so that neither
  batches nor the position in the data depend on the number of hosts.
  """

  lag = 1  # the next batch does not wait for what this step measured

  def __init__(self, config, tokenizer: tokenizers.Tokenizer, rows, stopped):
    self.stopped = stopped
    self.dataset, self.too_long = sft.dataset(
      rows,
      tokenizer,
      template=prompts.load(config.data.prompt),
      row_length=config.batch.row_length,
      rows=config.batch.rows,
      seed=config.seed,
      epochs=None,
      process_index=0,
      process_count=1,
      read_threads=config.data.read_threads,
    )
    self.iterator = iter(self.dataset)
    own = config.batch.rows // hosts.count()
    self.own = slice(hosts.index() * own, (hosts.index() + 1) * own)

  def next(self, params, step: int):
    """(this host's rows, metrics, no rollouts), or None when the program should stop."""
    if any(hosts.gather(bool(self.stopped()))):
      return None
    batch = next(self.iterator)
    share = float(np.mean(batch.segments_BT > 0))
    batch = jax.tree.map(lambda x: x[self.own], batch)
    return batch, {"packing_efficiency": share, "rows_too_long": len(self.too_long)}, []

  def state(self) -> dict:
    return {"data": self.iterator.get_state()}

  def restore(self, state: dict) -> None:
    self.iterator.set_state(state["data"])

  def close(self) -> None:
    pass


def check_shares(config) -> None:
  """Raises ValueError, one line, for a number of the config that this run's hosts cannot share."""
  numbers = {"batch.rows": config.batch.rows}
  if config.job != "sft":
    rollout = config.rollout
    numbers |= {"rollout.problems": rollout.problems, "rollout.slots": rollout.slots}
    numbers |= {"rollout.pages": rollout.pages}
    numbers |= {"rollout.sampling_devices": rollout.sampling_devices}
  for name, value in numbers.items():
    if value % hosts.count():
      raise ValueError(
        f"config.{name} is {value} and {hosts.count()} hosts have equal shares of it: give a "
        f"multiple of {hosts.count()}"
      )


def meshes(config):
  """The mesh that trains and this host's mesh that samples: the same devices, or with placement
  "split" the last of each host's devices, rollout.sampling_devices in all. Raises ValueError, one
  line."""
  rows, at_once = config.batch.rows, config.batch.microbatch_rows
  if at_once and rows % at_once:
    raise ValueError(
      f"config.batch.microbatch_rows is {at_once} and config.batch.rows {rows}: give a divisor, "
      "since microbatches are of equal size"
    )
  devices, number = jax.devices(), config.rollout.sampling_devices if config.job != "sft" else 0
  if config.job == "sft" or config.rollout.placement == "colocated":
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    if config.job == "sft" or hosts.count() == 1:
      return mesh, mesh
    everyone = sharding.within_hosts(devices, config.mesh.tensor)
    return mesh, sharding.this_hosts_rows(everyone)
  if not 0 < number < len(devices):
    raise ValueError(
      f"config.rollout.sampling_devices is {number} and this run has {len(devices)} devices: "
      'placement "split" needs at least one to sample and one to train'
    )
  rows = sharding.by_host(devices)
  own = number // len(rows)
  training = sharding.make_mesh(**config.mesh.to_dict(), devices=rows[:, :-own].ravel().tolist())
  if len(rows) > 1:
    everyone = sharding.within_hosts(rows[:, -own:].ravel(), config.mesh.tensor)
    sharding.within_hosts(training.devices.flat, config.mesh.tensor)  # weights leave by them
    return training, sharding.this_hosts_rows(everyone)
  return training, sharding.make_mesh(1, -1, config.mesh.tensor, devices=devices[-number:])


def stream(config, model, mesh, tokenizer, examples, start, params_layout, root, stopped):
  """The stream of Batches of config.job. mesh: the one that samples."""
  if config.job == "sft":
    return Rows(config, tokenizer, examples, stopped)
  if config.rollout.max_length > config.batch.row_length:
    raise ValueError(
      f"config.rollout.max_length is {config.rollout.max_length} and config.batch.row_length "
      f"{config.batch.row_length}: a row must hold the longest rollout"
    )
  engine = make_engine(model, mesh, config.rollout, tokenizer)
  here = (config, model, mesh, tokenizer, start, params_layout)
  summariser = None
  if config.job == "cache_rl" and config.cache.summariser:
    name, revision = config.cache.summariser, config.cache.summariser_revision
    block = ConfigDict(config.rollout.to_dict())
    block.slots, block.pages = config.cache.slots, config.cache.pages
    summariser = frozen_chat(name, revision, "config.cache.summariser", block, *here)
  templates = {"reason": prompts.load(config.rollout.prompt)}
  if config.job == "cache_rl":
    templates["summarise"] = prompts.load(config.cache.summarise)
  if config.judge.reward != "rubric" or not config.judge.engine:
    grade = grader(config.judge, root)
    judging.check(grade)
    return Experience(config, examples, engine, tokenizer, summariser, grade, templates, stopped)
  name, revision, own = config.judge.engine, config.judge.engine_revision, None
  if name != "policy":
    own = frozen_chat(name, revision, "config.judge.engine", config.rollout, *here)
  made = Experience(config, examples, engine, tokenizer, summariser, None, templates, stopped)
  made.grade = grader(config.judge, root, own or made.chat)
  return made


def make_engine(model, mesh, block, tokenizer: tokenizers.Tokenizer) -> Engine:
  """This host's part of the engine that config.rollout describes: slots and pages are shared."""
  shapes = {field.name: block[field.name] for field in dataclasses.fields(Shapes)}
  shapes |= {name: block[name] // hosts.count() for name in ("slots", "pages")}
  return Engine(
    model,
    mesh=mesh,
    shapes=Shapes(**shapes),
    lanes=block.lanes,
    prefill_budget=block.prefill_budget,
    stop_ids=tokenizer.stop_ids,
    truncated_logp=False,
    keep_prefixes=block.keep_prefixes,
  )


def frozen_chat(name, revision, field, block, config, model, mesh, tokenizer, start, params_layout):
  """A chat on parameters that are never updated: another checkpoint, or ("init") where this run
  began. name, revision: the values of `field` and of its revision. block: of its engine."""
  if name == "init":
    frozen, sizes, words = start, model, tokenizer
  else:
    frozen = policy.locate(name, revision, field)
    sizes, words = policy.sizes(frozen, config.model), tokenizers.load(frozen.folder)
    if hosts.count() > 1:  # read by all together, each its part, like what is trained
      mesh_of_all = jax.tree.leaves(params_layout)[0].sharding.mesh
      params_layout = policy.abstract_params(sizes, mesh_of_all, config.model.dtype)
    else:
      params_layout = policy.abstract_params(sizes, mesh, config.model.dtype)
  engine = make_engine(sizes, mesh, block, words)
  params = policy.load_params(frozen, sizes, params_layout, config.seed)
  engine.set_params(weights.on_this_host(sizes, params), 0)
  return EngineChat(engine, words, config.seed).chat


class SampleLog:
  """samples.jsonl: a few graded rollouts a step, to be read by people and by report.py.

  On several hosts they are those of host 0.
  """

  def __init__(self, path: epath.Path, first: int, per_step: int):
    """first: the step that the run resumes from; rows of later steps will be written again."""
    self.file, self.per_step = metrics.JsonLines(path, first), per_step

  def write(self, step: int, rollouts: list[records.Rollout]) -> None:
    """Attempts spread evenly over the step's rollouts."""
    if rollouts and self.per_step:
      stride = max(1, len(rollouts) // self.per_step)
      for rollout in rollouts[::stride][: self.per_step]:
        self.file.write({"step": step, **readable(rollout)})

  def close(self) -> None:
    self.file.close()


def readable(rollout: records.Rollout) -> dict:
  """A rollout as a row of text for samples.jsonl."""
  reasoning, proof = split_proof(rollout.completion.text)
  return {
    "problem_id": rollout.problem.id,
    "problem": rollout.problem.statement,
    "rubric": rollout.problem.rubric,
    "messages": list(rollout.messages),
    "turn": rollout.turn,
    "summary": rollout.summary,
    "attempt": rollout.attempt,
    "reasoning": reasoning,
    "proof": proof,
    "score": rollout.grade.score,
    "reason": rollout.grade.reason,
    "feedback": rollout.grade.feedback,
    "finish_reason": rollout.completion.finish_reason,
    "tokens": len(rollout.completion.tokens),
  }
