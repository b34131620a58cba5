"""Shapes that decode attention has to serve, for compilers and benchmarks: Qwen3-4B's heads."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
  """B sequences of `length` tokens in pages of `page`; N query heads, K key heads of H."""

  B: int
  length: int
  N: int = 32
  K: int = 8
  H: int = 128
  page: int = 256


# Many answers of moderate length, some long ones, and what cache RL samples at its longest.
REAL = {
  "64 x 4k": Shape(64, 4096),
  "16 x 32k": Shape(16, 32_768),
  "16 x 48k": Shape(16, 49_152),
}
