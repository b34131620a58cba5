"""Collectives of a compiled program: bytes that a chip sends, by mesh axis, loops multiplied in.

Reads the text of an optimised HLO module (`compiled.as_text()`), as XLA prints it for TPUs and
CPUs. Ids in it are places in the mesh's order of devices.
"""

import dataclasses
import functools
import math
import re

import numpy as np

KINDS = (
  *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"),
  "ragged-all-to-all",
)
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|called_computations|true_computation|false_computation"
  r"|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
ARRAY = re.compile(r"(pred|bf16|[a-z]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
WIDTH = {"pred": 1, "bf16": 2, "f16": 2, "s4": 0.5, "u4": 0.5}


@dataclasses.dataclass(frozen=True)
class Collective:
  """kind: of KINDS. axes: of the mesh, over which it goes. shapes: of what comes out. group: how
  many take part. times: it is run in a step. sent: bytes that a chip sends in one run. op: where in
  the program it comes from."""

  kind: str
  axes: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  group: int
  times: int
  sent: float
  op: str

  @property
  def bytes(self) -> float:
    return self.sent * self.times


def collectives(text: str, mesh_shape: dict[str, int]) -> list[Collective]:
  """All of a module's. mesh_shape: {axis: size} in the mesh's order."""
  bodies = computations(text)
  found = []
  for name, times in runs(bodies).items():
    lines = bodies[name]
    for line in lines:
      match = INSTRUCTION.match(line)
      kind = match and match[3].removesuffix("-start")
      if kind not in KINDS:
        continue
      arrays = shapes_of(match[2])
      if match[3] == "all-gather-start":
        arrays = arrays[len(arrays) // 2 :]  # operands come first
      elif match[3] == "collective-permute-start":
        arrays = arrays[:1]
      groups = groups_of(line, mesh_shape)
      members = max(map(len, groups))
      axes = axes_of(groups, mesh_shape)
      if members <= 1 or not axes:
        continue
      scattered = kind == "all-reduce" and "ROOT" in lines[-1] and " dynamic-slice(" in lines[-1]
      size = sum(bytes_of(*array) for array in arrays)
      found.append(
        Collective(
          "reduce-scatter" if scattered else kind,
          axes,
          tuple(shape for _, shape in arrays),
          members,
          times,
          sent_bytes(kind, size, members, scattered),
          (re.findall(r'op_name="([^"]*)"', line) or [""])[0],
        )
      )
  return found


def sent_bytes(kind: str, size: float, members: int, scattered: bool = False) -> float:
  """What a chip sends around a ring. size: of the result, bytes. scattered: an all-reduce of which
  each chip keeps its part alone."""
  if kind == "collective-permute":
    return size
  if kind == "reduce-scatter":
    return size * (members - 1)
  share = size * (members - 1) / members
  return share * (2 if kind == "all-reduce" and not scattered else 1)


def by_axes(found: list[Collective]) -> dict[str, float]:
  """Bytes that a chip sends in a step, by axes joined with "+"."""
  sums: dict[str, float] = {}
  for c in found:
    sums["+".join(c.axes)] = sums.get("+".join(c.axes), 0.0) + c.bytes
  return sums


# --- the text ----------------------------------------------------------------------------------


def computations(text: str) -> dict[str, list[str]]:
  """Name -> lines; the entry's name is ""."""
  found: dict[str, list[str]] = {}
  current = None
  for line in text.splitlines():
    if match := COMPUTATION.match(line):
      current = found.setdefault("" if match[1] else match[2], [])
    elif line.startswith("}"):
      current = None
    elif current is not None:
      current.append(line)
  return found


def runs(bodies: dict[str, list[str]]) -> dict[str, int]:
  """How often each computation runs in a step, following calls and loops from the entry."""
  total: dict[str, int] = {}

  def visit(name: str, times: int) -> None:
    total[name] = total.get(name, 0) + times
    for called, factor in calls(name):
      if called in bodies:
        visit(called, times * factor)

  @functools.cache
  def calls(name: str) -> tuple[tuple[str, int], ...]:
    found = []
    for line in bodies[name]:
      trips = trip_count(line, bodies) if " while(" in line else 1
      for group in CALLED.findall(line):
        found += [(called, trips) for called in re.findall(r"[\w.\-]+", group)]
    return tuple(found)

  if "" in bodies:
    visit("", 1)
  return total


def trip_count(line: str, bodies: dict[str, list[str]]) -> int:
  """Of a while instruction: what XLA says it knows, or the constant that its counter is below.

  1 where neither is there: a loop that ends by data.
  """
  if known := re.search(r"known_trip_count[^\d}]*(\d+)", line):
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", line)
  lines = bodies.get(condition[1], []) if condition else []
  constants = dict(
    m.groups()
    for x in lines
    if (m := re.search(r"%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)", x))
  )
  compared = next((x for x in lines if "ROOT" in x and "direction=LT" in x), "")
  named = [
    n for n in re.findall(r"%([\w.\-]+)", compared.partition("compare(")[2]) if n in constants
  ]
  return int(constants[named[0]]) if named else 1


def shapes_of(text: str) -> list[tuple[str, tuple[int, ...]]]:
  """Types and shapes of an instruction's result, without the scalars that synchronise."""
  found = [(t, tuple(map(int, filter(None, dims.split(","))))) for t, dims in ARRAY.findall(text)]
  return [(t, shape) for t, shape in found if shape or not text.startswith("(")]


def bytes_of(dtype: str, shape: tuple[int, ...]) -> float:
  width = WIDTH.get(dtype) or int(re.search(r"\d+", dtype)[0]) / 8
  return width * math.prod(shape)


def groups_of(line: str, mesh_shape: dict[str, int]) -> list[list[int]]:
  """Who talks to whom, in any of XLA's four notations."""
  devices = math.prod(mesh_shape.values())
  if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}?[,\s]", line):
    return [[int(a), int(b)] for a, b in re.findall(r"\{?(\d+),(\d+)\}?", pairs[1])]
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    to, dims, order = (tuple(map(int, x.split(","))) if x else None for x in iota.groups())
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose(order) if order else ids).reshape(to).tolist()
  if named := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
    sizes = {name: int(n) for name, n in re.findall(r"'?(\w+)'?=(\d+)", named[1])}
    return mesh_groups(sizes, named[2])
  if listed := re.search(r"replica_groups=\{\{(.*?)\}\}", line):
    return [[int(i) for i in group.split(",")] for group in listed[1].split("},{")]
  return [list(range(devices))]


def mesh_groups(sizes: dict[str, int], named: str) -> list[list[int]]:
  """Groups over named axes, or over part of one: 'axis_0':(2)4 is 4 ways behind 2."""
  parts, chosen = [], []
  wanted = {n: (b, s) for n, b, s in re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", named)}
  for name, size in sizes.items():
    before, ways = wanted.get(name, (None, None))
    if name in wanted and before:
      split = [int(before), int(ways), size // (int(before) * int(ways))]
      chosen.append(len(parts) + 1)
      parts += split
    else:
      if name in wanted:
        chosen.append(len(parts))
      parts.append(size)
  ids = np.arange(math.prod(parts)).reshape(parts)
  rest = [i for i in range(len(parts)) if i not in chosen]
  return ids.transpose(*rest, *chosen).reshape(-1, math.prod(parts[i] for i in chosen)).tolist()


def axes_of(groups: list[list[int]], mesh_shape: dict[str, int]) -> tuple[str, ...]:
  """Axes along which the members of a group differ."""
  sizes = tuple(mesh_shape.values())
  differ = np.zeros(len(sizes), bool)
  for group in groups:
    places = np.stack(np.unravel_index(group, sizes))
    differ |= (places != places[:, :1]).any(axis=1)
  return tuple(axis for axis, d in zip(mesh_shape, differ, strict=True) if d)
