"""Marking schemes of seven points: written out from lists, and checked that they add up.

The scheme that a model writes for a problem (prompts/marking_scheme.md) has three sections:
checkpoints, which earn points, zero-credit items and deductions. Its grammar, a line each:

  ## 1. Checkpoints (7 points total)
  - [2 points] ...          the lines below an item, up to the next one, belong to it
  ### Chain A: ...          a way to earn points; those of one chain add up, chains do not
  Total (max 7)
  ## 2. Zero-credit items
  - ...
  ## 3. Deductions
  - [-1] ...   - [-2] ...   - [cap 5] ...

Points stand outside of the chains, which count for every solution, plus those of one chain: 7. The
published rubrics have the same three sections in a looser form and are not held to this grammar.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

POINTS = 7
_SECTION = re.compile(r"^\s{0,3}#{1,6}\s*\**\s*([123])[.)]\s*(.*)$")
_CHAIN = re.compile(r"^\s{0,3}#{2,6}\s*\**\s*Chain\s+(\w+)", re.IGNORECASE)
_ITEM = re.compile(r"^\s*[-*]\s+(.*)$")
_EARNED = re.compile(r"^\**\[\s*(\d{1,2})\s*(?:points?|pts?)\.?\s*\]\**\s*(.*)$", re.IGNORECASE)
_TAKEN = re.compile(r"^\**\[\s*(?:[-\u2212\u2013]\s*([12])|cap\s+([0-6]))\s*\]\**\s*(.*)$", re.I)
_TOTAL = re.compile(r"^\s*\**Total\s*\(max\s+(\d+)\)", re.IGNORECASE)
_NAMES = {"1": "checkpoint", "2": "zero", "3": "deduction"}


@dataclasses.dataclass(frozen=True)
class Scheme:
  """common: points outside of the chains. chains: points of each chain by its name."""

  common: tuple[int, ...]
  chains: Mapping[str, tuple[int, ...]]
  zero_credit: int
  deductions: int


def parse(text: str) -> Scheme:
  """The parts of a scheme of the grammar above. Raises ValueError(why) in one line."""
  section, chain, total = "", None, None
  common, chains, counts = [], {}, {"2": 0, "3": 0}
  for line in text.splitlines():
    if match := _SECTION.match(line):
      expected = str(int(section or 0) + 1)
      if match[1] != expected or _NAMES[expected] not in match[2].lower():
        raise ValueError(f"section {line.strip()[:60]!r} stands where section {expected} should")
      section, chain = expected, None
    elif not section:
      if line.strip():
        raise ValueError(f"text stands before section 1: {line.strip()[:60]!r}")
    elif section == "1" and (match := _CHAIN.match(line)):
      chain = match[1].upper()
      if chain in chains:
        raise ValueError(f"chain {chain} comes twice")
      chains[chain] = []
    elif section == "1" and (match := _TOTAL.match(line)):
      total = int(match[1])
    elif match := _ITEM.match(line):
      item = match[1].strip()
      if section == "1":
        if earned := _EARNED.match(item):
          (common if chain is None else chains[chain]).append(int(earned[1]))
        elif not line.startswith((" ", "\t")):  # an indented one explains the item above it
          raise ValueError(f"a checkpoint has no [N points]: {item[:60]!r}")
      else:
        if section == "3" and not line.startswith((" ", "\t")) and not _TAKEN.match(item):
          raise ValueError(f"a deduction is not [-1], [-2] or [cap N]: {item[:60]!r}")
        counts[section] += 1
  if section != "3":
    raise ValueError(f"it has {section or 'no'} of the three sections")
  if total != POINTS:
    raise ValueError(f"it has no line 'Total (max {POINTS})'")
  named = {name: tuple(points) for name, points in chains.items()}
  return Scheme(tuple(common), named, counts["2"], counts["3"])


def check(text: str) -> Scheme:
  """`parse`, and the checkpoints add up to seven points. Raises ValueError(why) in one line."""
  scheme = parse(text)
  everything = [*scheme.common, *(p for chain in scheme.chains.values() for p in chain)]
  if not everything:
    raise ValueError("it has no checkpoint")
  if min(everything) < 1:
    raise ValueError("a checkpoint of 0 points belongs to the zero-credit items")
  for name, points in (scheme.chains or {"": ()}).items():
    if (found := sum(scheme.common) + sum(points)) != POINTS:
      where = f" with chain {name}" if name else ""
      raise ValueError(f"its checkpoints{where} add up to {found} points, not {POINTS}")
  if not scheme.zero_credit or not scheme.deductions:
    empty = "zero-credit items" if not scheme.zero_credit else "deductions"
    raise ValueError(f"its section of {empty} is empty")
  return scheme


def items_of(value: Any) -> list[Mapping[str, Any]] | None:
  """The items of a scheme that is a list of {title, desc, points}, or its JSON; else None."""
  if isinstance(value, str) and value.lstrip().startswith("["):
    try:
      value = json.loads(value)
    except (ValueError, RecursionError):
      return None
  if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
    return value
  return None


def from_items(items: Sequence[Mapping[str, Any]]) -> str:
  """A list of {"points", "title", "desc"} as text, an item a line.

  Raises ValueError(why) in one line when an item has no whole points or all do not add up to 7.
  """
  lines, total = [], 0
  for i, item in enumerate(items, 1):
    points = item.get("points", item.get("max_points"))
    if isinstance(points, bool) or not isinstance(points, int | float) or points != points // 1:
      raise ValueError(f"item {i} of its marking scheme has points {points!r}, not a whole number")
    parts = (item.get("title"), item.get("desc", item.get("description")))
    words = [part.strip() for part in parts if isinstance(part, str) and part.strip()]
    lines.append(f"- [{int(points)} point{'s' * (points != 1)}] {': '.join(words)}")
    total += int(points)
  if total != POINTS:
    raise ValueError(
      f"the items of its marking scheme add up to {total} points, not {POINTS}: mend the scheme"
    )
  return "\n".join(lines)
