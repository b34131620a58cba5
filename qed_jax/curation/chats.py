"""Whom a job asks: an OpenAI-compatible endpoint, streamed or not, or an engine in this process."""

import os
import pathlib

from qed_jax import sharding
from qed_jax.chat import Endpoint, HttpChat
from qed_jax.curation.streams import StreamingChat
from qed_jax.data import tokenizer as tokenizers
from qed_jax.replies import END_THINK
from qed_jax.rollout import jobs, policy
from qed_jax.rollout.engine_chat import EngineChat

BROKEN = "broken_streams.jsonl"


def open_chat(config, root: pathlib.Path):
  """The chat that config.endpoint or config.policy names. Raises ValueError in one line."""
  block = config.endpoint
  if block.model and config.policy:
    raise ValueError("config.endpoint.model and config.policy are both set: set one of them")
  if block.model:
    return _over_http(config, root)
  if not config.policy:
    raise ValueError(
      "no model to ask: set config.endpoint.model to a served one, or config.policy to a workdir, "
      "a Hugging Face folder or a hub id"
    )
  start = policy.locate(config.policy, config.policy_revision, "config.policy")
  model = policy.sizes(start, config.model)
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  tokenizer = tokenizers.load(start.folder)
  engine = jobs.make_engine(model, mesh, config.rollout, tokenizer)
  abstract = policy.abstract_params(model, mesh, config.model.dtype)
  engine.set_params(policy.load_params(start, model, abstract, config.seed), 0)
  return EngineChat(engine, tokenizer, config.seed).chat


def told(config) -> str:
  """The model's name for a card."""
  return config.endpoint.model or f"{config.policy} at {config.policy_revision}"


def answer_of(completion) -> str:
  """The answer behind the reasoning; "" when it was cut."""
  if completion.finish_reason != "stop":
    return ""
  return completion.text.rpartition(END_THINK)[2].strip()


async def close(chat) -> None:
  """Closes the connections of an HTTP chat."""
  if isinstance(chat, HttpChat):
    await chat.close()


def _over_http(config, root: pathlib.Path) -> HttpChat:
  block = config.endpoint
  base_url = os.environ.get(block.base_url_env)
  if not base_url:
    raise ValueError(
      f"config.endpoint.model is set, but {block.base_url_env} is not: export the address of its "
      "server, as in http://localhost:8000/v1"
    )
  endpoint = Endpoint(
    base_url,
    block.model,
    api=block.api,
    key_env=block.api_key_env if block.api_key_env in os.environ else "",
    omit=tuple(block.omit),
    hides_thinking=block.hides_thinking,
    extra_body={"reasoning_effort": block.reasoning_effort} if block.reasoning_effort else {},
  )
  options = {
    "concurrency": config.concurrency,
    "timeout": block.timeout_s,
    "deadline": block.deadline_s,
    "attempts": block.retries,
    "token_budget": block.token_budget,
  }
  if block.stream:
    return StreamingChat(endpoint, idle_s=block.idle_s, broken=root / BROKEN, **options)
  return HttpChat(endpoint, **options)
