"""What each job trains on: its data, its tokenizer, and its stream of Batches."""

import dataclasses
import functools
import os

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from qed_jax import metrics, prompts, records, sharding
from qed_jax.chat import Endpoint, HttpChat
from qed_jax.data import problems, sft, tiny_world
from qed_jax.data import tokenizer as tokenizers
from qed_jax.rewards import answer, exact, rubric
from qed_jax.rollout import policy
from qed_jax.rollout.device import Shapes
from qed_jax.rollout.engine import Engine
from qed_jax.rollout.engine_chat import EngineChat
from qed_jax.rollout.experience import Experience
from qed_jax.scaffolds.proof import split_proof

TINY_WORLD = "tiny_world"
COMPARISON_S = 10.0  # for one final answer against another


def tokenizer(config, start: policy.Start, root: epath.Path) -> tokenizers.Tokenizer:
  """config.tokenizer, or the one beside the parameters, or the tiny world's, trained here."""
  if config.tokenizer:
    return tokenizers.load(config.tokenizer, config.tokenizer_revision)
  if start.folder is not None:
    return tokenizers.load(start.folder)
  if config.data.source != TINY_WORLD:
    raise ValueError("config.tokenizer is empty and config.init brings none: set it to a folder")
  return tokenizers.train_sentencepiece(
    tiny_world.corpus(), root / policy.DESCRIPTION, vocab_size=64, vocab_multiple=64
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
  """The SFT stream: Grain's iterator behind the interface of Experience."""

  lag = 1  # the next batch does not wait for what this step measured

  def __init__(self, config, tokenizer: tokenizers.Tokenizer, rows, stopped):
    self.stopped = stopped
    self.dataset, self.too_long = sft.dataset(
      rows,
      tokenizer,
      template=prompts.load(config.data.prompt),
      row_length=config.batch.row_length,
      rows=config.batch.rows // jax.process_count(),
      seed=config.seed,
      epochs=None,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      read_threads=config.data.read_threads,
    )
    self.iterator = iter(self.dataset)

  def next(self, params, step: int):
    """(Batch, metrics, no rollouts), or None when the program should stop."""
    if self.stopped():
      return None
    batch = next(self.iterator)
    if jax.process_count() > 1:  # the mean is over the targets of all hosts
      targets = np.array(np.count_nonzero(batch.weight_BT))
      total = int(multihost_utils.process_allgather(targets).sum())
      batch = dataclasses.replace(batch, weight_BT=sft.normalise(batch.weight_BT, total))
    share = float(np.mean(batch.segments_BT > 0))
    return batch, {"packing_efficiency": share, "rows_too_long": len(self.too_long)}, []

  def state(self) -> dict:
    return {"data": self.iterator.get_state()}

  def restore(self, state: dict) -> None:
    self.iterator.set_state(state["data"])

  def close(self) -> None:
    pass


def meshes(config):
  """The mesh that trains and the one that samples: the same, or with placement "split" the last
  rollout.sampling_devices of this host's devices for sampling. Raises ValueError, one line."""
  rows, at_once = config.batch.rows, config.batch.microbatch_rows
  if at_once and rows % at_once:
    raise ValueError(
      f"config.batch.microbatch_rows is {at_once} and config.batch.rows {rows}: give a divisor, "
      "since microbatches are of equal size"
    )
  if config.job == "sft" or config.rollout.placement == "colocated":
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    return mesh, mesh
  devices, number = jax.devices(), config.rollout.sampling_devices
  if not 0 < number < len(devices):
    raise ValueError(
      f"config.rollout.sampling_devices is {number} and this run has {len(devices)} devices: "
      'placement "split" needs at least one to sample and one to train'
    )
  training = sharding.make_mesh(**config.mesh.to_dict(), devices=devices[:-number])
  return training, sharding.make_mesh(1, -1, config.mesh.tensor, devices=devices[-number:])


def stream(config, model, mesh, tokenizer, examples, start, params_layout, root, stopped):
  """The stream of Batches of config.job. mesh: the one that samples."""
  if config.job == "sft":
    return Rows(config, tokenizer, examples, stopped)
  if jax.process_count() > 1:
    raise ValueError(
      f"job {config.job!r} on {jax.process_count()} hosts: RL runs on one host, SFT on many"
    )
  if config.rollout.max_length > config.batch.row_length:
    raise ValueError(
      f"config.rollout.max_length is {config.rollout.max_length} and config.batch.row_length "
      f"{config.batch.row_length}: a row must hold the longest rollout"
    )
  engine = make_engine(model, mesh, config.rollout, tokenizer)
  summariser = None
  if config.job == "cache_rl" and config.cache.summariser:
    summariser = frozen_summariser(config, model, mesh, tokenizer, start, params_layout)
  templates = {"reason": prompts.load(config.rollout.prompt)}
  if config.job == "cache_rl":
    templates["summarise"] = prompts.load(config.cache.summarise)
  grade = grader(config.judge, root)
  return Experience(config, examples, engine, tokenizer, summariser, grade, templates, stopped)


def make_engine(model, mesh, block, tokenizer: tokenizers.Tokenizer) -> Engine:
  """The engine that config.rollout describes."""
  fields = (field.name for field in dataclasses.fields(Shapes))
  return Engine(
    model,
    mesh=mesh,
    shapes=Shapes(**{name: block[name] for name in fields}),
    lanes=block.lanes,
    prefill_budget=block.prefill_budget,
    stop_ids=tokenizer.stop_ids,
    truncated_logp=False,
    keep_prefixes=block.keep_prefixes,
  )


def frozen_summariser(config, model, mesh, tokenizer, start, params_layout):
  """A chat on parameters that are never updated: another checkpoint, or where this run began."""
  name = config.cache.summariser
  if name == "init":
    frozen, sizes, words = start, model, tokenizer
  else:
    frozen = policy.locate(name, config.cache.summariser_revision, "config.cache.summariser")
    sizes, words = policy.sizes(frozen, config.model), tokenizers.load(frozen.folder)
    params_layout = policy.abstract_params(sizes, mesh, config.model.dtype)
  block = ConfigDict(config.rollout.to_dict())
  block.slots, block.pages = config.cache.slots, config.cache.pages
  engine = make_engine(sizes, mesh, block, words)
  engine.set_params(policy.load_params(frozen, sizes, params_layout, config.seed), 0)
  return EngineChat(engine, words, config.seed).chat


def grader(judge, root: epath.Path):
  """async (problem, proof) -> Grade, by the kind that config.judge.reward names."""
  if judge.reward == "answer":
    return functools.partial(answer.grade, checker=answer.Checker(COMPARISON_S))
  if judge.reward == "rubric":
    return rubric_grader(judge, root)

  async def grade(problem, proof):
    return exact.grade(problem, proof)

  return grade


def rubric_grader(judge, root: epath.Path):
  """A judge model over HTTP. Raises ValueError when its environment variables are not set."""
  base_url = os.environ.get(judge.base_url_env)
  if not base_url:
    raise ValueError(
      f"the judge needs an endpoint: set {judge.base_url_env} (and {judge.api_key_env}), "
      "for example to a `python -m qed_jax.serve` or vLLM server"
    )
  effort = {"responses": {"reasoning": {"effort": judge.reasoning_effort}}}.get(
    judge.api, {"reasoning_effort": judge.reasoning_effort}
  )
  chat = HttpChat(
    Endpoint(
      base_url=base_url,
      model=judge.model,
      api=judge.api,
      key_env=judge.api_key_env if judge.api_key_env in os.environ else "",
      hides_thinking=True,
      extra_body=effort if judge.reasoning_effort else {},
    ),
    concurrency=judge.concurrency,
    timeout=judge.timeout_s,
    deadline=judge.deadline_s,
    attempts=judge.retries,
    token_budget=judge.token_budget,
    cache=str(root / judge.cache) if judge.cache and "://" not in str(root) else judge.cache,
  )
  return functools.partial(
    rubric.grade,
    chat=chat,
    template=prompts.load(judge.template),
    scale=tuple(judge.scale),
    attempts=judge.samples,
    on_invalid=judge.on_invalid,
    max_tokens=judge.max_tokens,
    temperature=judge.temperature,
  )


class SampleLog:
  """samples.jsonl: a few graded rollouts a step, to be read by people and by report.py."""

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
