"""Chips and how many of them: what `--topology=v5p:4x4x4` or `h200:1` names."""

import dataclasses
import difflib
import math

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One jax device.

  device_kind: as jax names it, the key of metrics.PEAK_FLOPS. memory: bytes that a program may use,
  as the compiler says when one needs more. bandwidth: of that memory, bytes a second. link: bytes a
  second that a chip sends around a ring of its neighbours, both directions of one axis of the torus
  (for a GPU: NVLink). network: bytes a second and chip between slices. host: to and from the host's
  memory. attention: share of the peak that products with heads of 128 can reach.
  """

  device_kind: str
  memory: int
  bandwidth: float
  link: float
  network: float
  host: float
  attention: float = 1.0


# Peaks and links: Google Cloud's TPU pages and "How to scale your model" (jax-ml.github.io); the
# limits of memory are those of libtpu 0.0.42.1's own messages. A v6e multiplies by 256 columns, of
# which heads of 128 fill half. An H200's limit leaves 6 % to the driver and to fragments.
CHIPS = {
  "v5e": Chip("TPU v5 lite", int(15.75 * GIB), 819e9, 90e9, 3.1e9, 8e9),
  "v5p": Chip("TPU v5", int(95.74 * GIB), 2765e9, 180e9, 6.25e9, 16e9),
  "v6e": Chip("TPU v6 lite", int(31.25 * GIB), 1640e9, 180e9, 12.5e9, 16e9, attention=0.5),
  "h100": Chip("NVIDIA H100", 80_000_000_000, 3350e9, 450e9, 50e9, 50e9),
  "h200": Chip("NVIDIA H200", 141_000_000_000, 4800e9, 450e9, 50e9, 50e9),
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = (
  *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
  "16x16x16",
)
SHAPES = {"v5e": FLAT, "v6e": FLAT, "v5p": DEEP}
GPUS = ("1", "2", "4", "8")


@dataclasses.dataclass(frozen=True)
class Topology:
  """`slices` of `chips` chips each; name: as libtpu knows a slice."""

  name: str
  generation: str
  chips: int
  slices: int = 1

  @property
  def chip(self) -> Chip:
    return CHIPS[self.generation]

  @property
  def devices(self) -> int:
    return self.chips * self.slices

  @property
  def is_tpu(self) -> bool:
    return self.generation in SHAPES


def parse(name: str, slices: int = 1) -> Topology:
  """ "v5p:4x4x4", "h200:1", or Cloud's "v5p-128" (of cores), "v6e-64", "v5litepod-64" (of chips).

  Raises ValueError, one line, with the nearest names that exist.
  """
  generation, colon, shape = name.replace("v5litepod", "v5e").partition(":")
  if not colon and "-" in generation:
    generation, _, count = generation.partition("-")
    if generation in SHAPES and count.isdigit():
      chips = int(count) // (2 if generation == "v5p" else 1)
      shape = next((s for s in SHAPES[generation] if size(s) == chips), f"{chips} chips")
  if generation not in CHIPS:
    near = difflib.get_close_matches(generation, CHIPS, 1, 0) or list(CHIPS)
    example = f"{near[0]}:{choices(near[0])[-1]}"
    raise ValueError(
      f"no chip {generation!r} in --topology={name!r}: use {', '.join(CHIPS)} ({example})"
    )
  if shape not in choices(generation):
    wanted = size(shape)
    near = sorted(choices(generation), key=lambda s: abs(math.log(size(s) / max(1, wanted))))[:3]
    near = ", ".join(f"{generation}:{s}" for s in near)
    raise ValueError(f"no topology {shape!r} of {generation} in --topology={name!r}: try {near}")
  if slices < 1:
    raise ValueError(f"--slices is {slices}: give 1 or more")
  return Topology(f"{generation}:{shape}", generation, size(shape), slices)


def choices(generation: str) -> tuple[str, ...]:
  return SHAPES.get(generation, GPUS)


def size(shape: str) -> int:
  """Chips of "4x4x4"; 1 where it is no shape."""
  parts = shape.split(" ")[0].split("x")
  return math.prod(map(int, parts)) if all(p.isdigit() for p in parts) else 1
