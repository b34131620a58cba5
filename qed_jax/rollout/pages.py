"""Which page belongs to whom: reference counts, and an index of what pages hold.

Host only, no arrays of the device. A page is held by the attempts whose tables name it and by the
index; it is free when nobody holds it. The index is a radix tree whose edges are the tokens of a
page, so that prompts of a group, chat turns and states of the reasoning cache share what they have
in common, to the token: the last, partly filled page is copied by whoever goes on from it.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Sequence

import numpy as np

NOBODY = 0  # as in model/kv_cache.py


class Pages:
  """Reference counts of pages 1 .. count - 1; page 0 is nobody's."""

  def __init__(self, count: int):
    self.count = count
    self._free = list(range(count - 1, NOBODY, -1))
    self._holders = [0] * count

  @property
  def total(self) -> int:
    """Pages that can be taken at all."""
    return self.count - 1

  @property
  def free(self) -> int:
    return len(self._free)

  def take(self, number: int) -> list[int]:
    """That many free pages, held once each. Raises ValueError when there are fewer."""
    if number > len(self._free):
      raise ValueError(f"{number} pages are wanted, {len(self._free)} are free")
    taken = [self._free.pop() for _ in range(number)]
    for page in taken:
      self._holders[page] = 1
    return taken

  def hold(self, pages: Sequence[int]) -> None:
    """One more holder of each."""
    for page in pages:
      if not self._holders[page]:
        raise ValueError(f"page {page} is free: it cannot be shared")
      self._holders[page] += 1

  def release(self, pages: Sequence[int]) -> None:
    """One holder less of each; a page that nobody holds is free."""
    for page in pages:
      if not self._holders[page]:
        raise ValueError(f"page {page} is free: it cannot be released")
      self._holders[page] -= 1
      if not self._holders[page]:
        self._free.append(page)

  def holders(self, page: int) -> int:
    return self._holders[page]


@dataclasses.dataclass(eq=False)
class Node:
  """A page in the index. tokens: int32 bytes of what it holds, a whole page unless it is a leaf."""

  tokens: bytes
  page: int
  parent: "Node | None"
  used: int = 0
  children: dict = dataclasses.field(default_factory=dict)  # by their tokens


@dataclasses.dataclass(frozen=True)
class Match:
  """The longest prefix in the index: whole pages, and `rest` tokens of one more page to copy."""

  pages: tuple[int, ...] = ()
  rest: int = 0
  partial: int = NOBODY


class PrefixIndex:
  """The radix tree over `pages`; holds each page that it names once."""

  def __init__(self, pages: Pages, page: int):
    self.pages, self.page = pages, page
    self._root = Node(b"", NOBODY, None)
    self._clock = itertools.count(1)
    self._size = 0

  def __len__(self) -> int:
    """Pages that it names."""
    return self._size

  def match(self, tokens: np.ndarray) -> Match:
    """The longest prefix of `tokens` (int32) that pages hold; nothing is held for the caller."""
    data, step = np.asarray(tokens, np.int32).tobytes(), 4 * self.page
    node, found, now = self._root, [], next(self._clock)
    for start in range(0, len(data), step):
      piece = data[start : start + step]
      child = node.children.get(piece) if len(piece) == step else None
      if child is None:
        rest, partial = _longest(piece, node.children.values())
        if partial is not None:
          partial.used = now
          return Match(tuple(found), rest, partial.page)
        break
      child.used = now
      found.append(child.page)
      node = child
    return Match(tuple(found))

  def insert(self, tokens: np.ndarray, pages: Sequence[int]) -> None:
    """Says that `pages` hold `tokens` (int32), in order; what is known already stays."""
    data, step = np.asarray(tokens, np.int32).tobytes(), 4 * self.page
    node, now = self._root, next(self._clock)
    for start, page in zip(range(0, len(data), step), pages, strict=False):
      piece = data[start : start + step]
      child = node.children.get(piece)
      if child is None:
        child = self._add(node, piece, page)
        if child is None:
          return
      child.used = now
      node = child

  def _add(self, parent: Node, piece: bytes, page: int) -> Node | None:
    """A child for `piece`; None when it is part of a page and another page already holds it."""
    whole = len(piece) == 4 * self.page
    for child in list(parent.children.values()):
      if not whole and child.tokens.startswith(piece):
        return None
      if piece.startswith(child.tokens) and not child.children:  # what was partly filled is fuller
        self._remove(child)
    node = Node(piece, page, parent)
    parent.children[piece] = node
    self.pages.hold([page])
    self._size += 1
    return node

  def evict(self, wanted: int) -> int:
    """Lets go of leaves, the longest unused first, until `wanted` pages are free -> pages freed.

    Pages that an attempt holds too stay in the index: letting go of them would free nothing.
    """
    before = self.pages.free
    leaves = [(n.used, id(n), n) for n in self._nodes() if self._evictable(n)]
    heapq.heapify(leaves)
    while leaves and self.pages.free < wanted:
      node = heapq.heappop(leaves)[2]
      parent = node.parent
      self._remove(node)
      if parent is not self._root and self._evictable(parent):
        heapq.heappush(leaves, (parent.used, id(parent), parent))
    return self.pages.free - before

  def evictable(self) -> int:
    """Pages that nobody but the index holds: an upper bound of what evict can free."""
    return sum(self.pages.holders(n.page) == 1 for n in self._nodes())

  def clear(self) -> None:
    """Forgets everything: what pages hold no longer belongs to the policy."""
    for node in list(self._nodes()):
      self.pages.release([node.page])
    self._root.children.clear()
    self._size = 0

  def _evictable(self, node: Node) -> bool:
    return not node.children and self.pages.holders(node.page) == 1

  def _nodes(self):
    stack = list(self._root.children.values())
    while stack:
      node = stack.pop()
      yield node
      stack.extend(node.children.values())

  def _remove(self, node: Node) -> None:
    del node.parent.children[node.tokens]
    self.pages.release([node.page])
    self._size -= 1


def _longest(piece: bytes, nodes) -> tuple[int, Node | None]:
  """The node that begins with the most tokens of `piece`, and how many they are."""
  best, found = 0, None
  wanted = np.frombuffer(piece, np.int32)
  for node in nodes:
    held = np.frombuffer(node.tokens, np.int32)
    n = min(len(wanted), len(held))
    differs = np.flatnonzero(wanted[:n] != held[:n])
    common = int(differs[0]) if len(differs) else n
    if common > best:
      best, found = common, node
  return best, found
