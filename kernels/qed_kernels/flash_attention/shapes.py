"""Shapes that flash attention has to serve, for tests and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
  """B rows of T tokens in `segments` segments, N query heads, K key heads of H dimensions."""

  B: int
  T: int
  N: int
  K: int
  H: int
  segments: int


# Qwen3-4B: SFT rows, RL rows, a reasoning-cache rollout with its prompt, a short packed batch.
REAL = {
  "sft 4k": Shape(1, 4096, 32, 8, 128, 4),
  "dense 16k": Shape(1, 16_384, 32, 8, 128, 1),
  "packed 16k": Shape(1, 16_384, 32, 8, 128, 8),
  "rollout 49k": Shape(1, 49_152, 32, 8, 128, 1),
  "smoke 0.6B": Shape(2, 2048, 16, 8, 128, 6),
}

# Small enough for an interpreter: below, at and off the sizes of blocks; every way to group heads.
SMALL = {
  "one token": Shape(2, 1, 2, 1, 64, 1),
  "short": Shape(2, 77, 4, 2, 64, 3),
  "a block": Shape(1, 128, 2, 2, 128, 1),
  "two query blocks": Shape(1, 512, 4, 1, 64, 5),
  "off every block": Shape(2, 700, 8, 2, 128, 4),
  "several key blocks": Shape(1, 2100, 2, 1, 64, 3),
}
