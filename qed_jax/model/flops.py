"""Floating-point operations of Qwen3 from its sizes: 2 a multiply-add, causal halves only."""

import math

import numpy as np

from qed_jax.model.qwen3 import Qwen3Config, shapes


def keys_per_token(config: Qwen3Config) -> float:
  """How many seen keys cost a token as much as its matrix products."""
  return forward(config, 1, 0) / forward(config, 0, 1)


def forward(config: Qwen3Config, tokens: int, context: int) -> float:
  """tokens: scored or decoded. context: sum over them of the keys that each one sees."""
  matrices = sum(
    math.prod(shape)
    for path, shape in shapes(config).items()
    if path.split(".")[-1].endswith("_proj") or path == "lm_head"
  )
  if config.tie_word_embeddings:
    matrices += config.vocab_size * config.hidden_size
  return 2.0 * matrices * tokens + attention(config, context)


def attention(config: Qwen3Config, context: int) -> float:
  """The part of `forward` that is not a product with a weight."""
  return float(2 * 2 * config.num_layers * config.num_heads * config.head_dim) * context


def training(config: Qwen3Config, positions_BT, segments_BT, frozen: bool = False) -> float:
  """Forward and backward of packed rows; the backward pass is twice the forward.

  frozen: weights get no gradient of their own (LoRA), so their part is once the forward's.
  """
  real_BT = np.asarray(segments_BT) > 0
  context = int(np.sum((np.asarray(positions_BT) + 1) * real_BT))
  done = forward(config, int(real_BT.sum()), context)
  return 2.0 * done + attention(config, context) if frozen else 3.0 * done
