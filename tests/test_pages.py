"""Pages and what they hold, against a model: none leaks, none is shared under a wrong name."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
  Bundle,
  RuleBasedStateMachine,
  consumes,
  invariant,
  multiple,
  rule,
)

from qed_jax.rollout.pages import NOBODY, Match, Pages, PrefixIndex

PAGE, COUNT = 3, 14
# Few different tokens, so that random texts have prefixes in common.
TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=10).map(tuple)


def pages_for(tokens) -> int:
  return -(-len(tokens) // PAGE)


def common(one, other) -> int:
  """Tokens that two texts begin with alike."""
  n = min(len(one), len(other))
  return next((i for i in range(n) if one[i] != other[i]), n)


class Attempt:
  """What the engine keeps of one: its text and the pages that hold it, shared ones first."""

  def __init__(self, text, pages):
    self.text, self.pages = text, pages


class Sharing(RuleBasedStateMachine):
  """Attempts that start, grow, are remembered and leave, beside a dict of what the index holds.

  `held` maps a prefix to the page of its last tokens; `written` is what is physically in a page.
  """

  attempts = Bundle("attempts")

  def __init__(self):
    super().__init__()
    self.pages = Pages(COUNT)
    self.index = PrefixIndex(self.pages, PAGE)
    self.held: dict[tuple, int] = {}
    self.written: dict[int, list] = {}
    self.alive: list[Attempt] = []

  # --- what attempts do

  @rule(target=attempts, text=TEXTS)
  def start(self, text):
    """Shares what the index has, copies the rest of a page, computes what is missing."""
    match = self.found(text)
    borrowed = [*match.pages, *([match.partial] if match.rest else [])]
    self.pages.hold(borrowed)
    wanted = pages_for(text) - len(match.pages)
    self.let_go(wanted)
    if self.pages.free < wanted:
      with pytest.raises(
        ValueError, match=f"{wanted} pages are wanted, {self.pages.free} are free"
      ):
        self.pages.take(wanted)
      self.pages.release(borrowed)
      return multiple()
    own = self.pages.take(wanted)
    assert NOBODY not in own
    for page in own:
      self.written[page] = []
    if match.rest:
      self.written[own[0]] = self.written[match.partial][: match.rest]
      self.pages.release([match.partial])
    attempt = Attempt((), [*match.pages, *own])
    self.alive.append(attempt)
    self.compute(attempt, text, len(match.pages) * PAGE + match.rest)
    return attempt

  @rule(attempt=attempts, more=TEXTS)
  def grow(self, attempt, more):
    """Samples on, into pages of its own."""
    text = attempt.text + more
    missing = pages_for(text) - len(attempt.pages)
    self.let_go(missing)
    if missing <= self.pages.free:
      new = self.pages.take(max(0, missing))
      self.written |= {page: [] for page in new}
      attempt.pages += new
      self.compute(attempt, text, len(attempt.text))

  def compute(self, attempt, text, first):
    """Writes text[first:], behind what the pages hold."""
    for position in range(first, len(text)):
      written = self.written[attempt.pages[position // PAGE]]
      assert len(written) == position % PAGE
      written.append(text[position])
    attempt.text = text

  @rule(attempt=attempts, data=st.data())
  def remember(self, attempt, data):
    """Tells the index of a prefix; of two pages with the same tokens the first stays."""
    text = attempt.text[: data.draw(st.integers(0, len(attempt.text)))]
    self.index.insert(np.array(text, np.int32), attempt.pages[: pages_for(text)])
    for number, page in zip(range(1, pages_for(text) + 1), attempt.pages, strict=False):
      prefix = text[: number * PAGE]
      parent = prefix[: (number - 1) * PAGE]
      beside = [t for t in self.held if len(t) > len(parent) and t[: len(parent)] == parent]
      if any(t[: len(prefix)] == prefix for t in beside):
        continue
      for shorter in [t for t in beside if prefix[: len(t)] == t]:
        del self.held[shorter]
      self.held[prefix] = page

  @rule(attempt=consumes(attempts))
  def leave(self, attempt):
    self.pages.release(attempt.pages)
    self.alive.remove(attempt)

  # --- what is asked of the index

  @rule(text=TEXTS)
  def ask(self, text):
    self.found(text)

  def found(self, text) -> Match:
    """The longest prefix there is, to the token, and pages that do hold it."""
    match = self.index.match(np.array(text, np.int32))
    length = len(match.pages) * PAGE + match.rest
    assert length == max((common(text, t) for t in self.held), default=0)
    content = [token for page in match.pages for token in self.written[page][:PAGE]]
    if match.rest:
      content += self.written[match.partial][: match.rest]
    assert tuple(content) == text[:length]
    return match

  @rule(wanted=st.integers(0, COUNT))
  def let_go(self, wanted):
    """Frees what is wanted or all it can, and nothing that an attempt holds."""
    before = self.pages.free
    owned = {page for attempt in self.alive for page in attempt.pages}
    assert self.index.evict(wanted) == self.pages.free - before
    gone = [t for t, page in self.held.items() if not self.pages.holders(page)]
    assert not owned & {self.held[t] for t in gone}
    for t in gone:
      del self.held[t]
    assert all(t[: (len(t) - 1) // PAGE * PAGE] in {*self.held, ()} for t in self.held)
    if before >= wanted:
      assert not gone
    if self.pages.free < wanted:
      parents = {t[: (len(t) - 1) // PAGE * PAGE] for t in self.held}
      leaves = [t for t in self.held if t not in parents]
      assert all(self.pages.holders(self.held[t]) > 1 for t in leaves)

  @rule()
  def clear(self):
    self.index.clear()
    self.held.clear()

  @rule(data=st.data())
  def misuse(self, data):
    """A free page is neither shared nor released; nothing changes."""
    free = [p for p in range(COUNT) if not self.pages.holders(p)]
    page = data.draw(st.sampled_from(free))
    with pytest.raises(ValueError, match=f"page {page} is free: it cannot be shared"):
      self.pages.hold([page])
    with pytest.raises(ValueError, match=f"page {page} is free: it cannot be released"):
      self.pages.release([page])

  # --- what is always true

  @invariant()
  def every_holder_is_known(self):
    """Attempts whose table names it, and the index once: no count leaks, no page is lost."""
    owners = [page for attempt in self.alive for page in attempt.pages]
    owners += list(self.held.values())
    counts = np.bincount(np.array(owners, int), minlength=COUNT)
    assert [self.pages.holders(p) for p in range(COUNT)] == counts.tolist()
    assert self.pages.free + np.count_nonzero(counts) == self.pages.total == COUNT - 1
    assert len(self.index) == len(self.held)

  def teardown(self):
    """When everybody has left and the index is cleared, every page is free and can be had."""
    for attempt in self.alive:
      self.pages.release(attempt.pages)
    self.index.clear()
    assert len(self.index) == 0
    assert self.pages.free == self.pages.total
    assert sorted(self.pages.take(self.pages.total)) == list(range(1, COUNT))


Sharing.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestSharing = Sharing.TestCase


# --- cases that are worth their own line


def tokens(*values) -> np.ndarray:
  return np.array(values, np.int32)


def an_index(count=COUNT) -> tuple[Pages, PrefixIndex]:
  pages = Pages(count)
  return pages, PrefixIndex(pages, PAGE)


def remember(pages, index, text) -> list[int]:
  """Pages that the index alone holds, of an attempt that came and went."""
  own = pages.take(pages_for(text))
  index.insert(tokens(*text), own)
  pages.release(own)
  return own


def test_taking_more_than_is_free_takes_nothing():
  pages = Pages(4)
  pages.take(1)
  with pytest.raises(ValueError, match="3 pages are wanted, 2 are free"):
    pages.take(3)
  assert pages.free == 2
  assert len(pages.take(2)) == 2


def test_a_page_is_free_when_its_last_holder_lets_go():
  pages = Pages(2)
  [page] = pages.take(1)
  pages.hold([page])
  pages.release([page])
  assert (pages.holders(page), pages.free) == (1, 0)
  pages.release([page])
  assert (pages.holders(page), pages.free) == (0, 1)


def test_the_first_page_is_nobodys():
  pages = Pages(9)
  assert NOBODY not in pages.take(pages.total)


def test_texts_share_to_the_token():
  """Whole pages by name, and of the next page what is common: at its middle and at its end."""
  pages, index = an_index()
  first, second, third = remember(pages, index, (1, 2, 3, 4, 5, 6, 7, 8))
  whole = (first, second)
  assert index.match(tokens(1, 2, 3, 4, 5, 6, 7, 8, 9)) == Match(whole, 2, third)
  assert index.match(tokens(1, 2, 3, 4, 5, 6, 7)) == Match(whole, 1, third)
  assert index.match(tokens(1, 2, 3, 4, 5, 6)) == Match(whole)
  assert index.match(tokens(1, 2, 3, 4, 9, 6)) == Match((first,), 1, second)
  assert index.match(tokens(1, 2, 3, 4)) == Match((first,), 1, second)
  assert index.match(tokens(1, 9)) == Match((), 1, first)
  assert index.match(tokens(9)) == index.match(tokens()) == Match()


def test_of_several_pages_the_one_with_most_in_common_is_copied():
  """Wherever it stands among the others."""
  pages, index = an_index()
  held = {t: remember(pages, index, t)[0] for t in ((1, 9, 9), (1, 2, 9), (1, 8, 8), (2, 2, 3))}
  assert index.match(tokens(1, 2, 3)) == Match((), 2, held[1, 2, 9])
  assert index.match(tokens(2, 2)) == Match((), 2, held[2, 2, 3])


def test_tokens_of_several_bytes_are_told_apart():
  """Ids that share bytes across their borders, 256 and 1: no prefix but the common tokens."""
  pages, index = an_index()
  [page] = remember(pages, index, (1, 256, 65_536))
  assert index.match(tokens(1, 256, 65_537)) == Match((), 2, page)
  assert index.match(tokens(257, 256, 65_536)) == Match()
  assert index.match(np.array([1, 256, 65_536])) == Match((page,))  # int64 is as good


def test_a_fuller_page_replaces_the_same_page_less_full():
  """What an attempt adds to its last page is known under the longer name alone."""
  pages, index = an_index()
  own = pages.take(2)
  for length in (4, 5, 6):
    index.insert(tokens(*range(length)), own)
    assert len(index) == 2
    assert pages.holders(own[1]) == 2
  assert index.match(tokens(*range(6))) == Match(tuple(own))


def test_what_is_known_already_takes_no_second_page():
  pages, index = an_index()
  first = remember(pages, index, (1, 2, 3, 4, 5))
  free = pages.free
  for text in ((1, 2, 3, 4, 5), (1, 2, 3, 4), (1, 2, 3)):
    remember(pages, index, text)
    assert (pages.free, len(index)) == (free, 2)
  assert index.match(tokens(1, 2, 3, 4, 5)) == Match((first[0],), 2, first[1])


def test_the_longest_unused_goes_first_and_no_more_than_needed():
  """A match of whole pages or of a part is a use, an insert too; of a text the end goes first."""
  pages, index = an_index(6)
  [whole] = remember(pages, index, (0, 0, 0))
  [again] = remember(pages, index, (1, 1, 1))
  [part] = remember(pages, index, (2, 2, 2))
  start, end = index.pages.take(2)
  index.insert(tokens(3, 3, 3, 3), [start, end])
  pages.release([start, end])
  index.match(tokens(2, 2))
  index.match(tokens(0, 0, 0))
  index.insert(tokens(1, 1, 1), [again])
  gone = []
  for wanted in range(1, pages.total + 1):
    assert index.evict(wanted) == 1
    gone += [p for p in (whole, again, part, start, end) if not pages.holders(p) and p not in gone]
    assert len(gone) == pages.free == wanted
  assert gone == [end, start, part, whole, again]


def test_pages_of_an_attempt_are_not_let_go():
  """Neither its pages nor those before them, whose prefix they go on from."""
  pages, index = an_index(5)
  remember(pages, index, (1, 1, 1, 2, 2, 2, 3, 3, 3))
  match = index.match(tokens(1, 1, 1, 2, 2, 2))
  pages.hold(match.pages)
  assert index.evictable() == 1
  assert index.evict(4) == 1
  assert index.match(tokens(1, 1, 1, 2, 2, 2, 3, 3, 3)) == match
  pages.release(match.pages)
  assert index.evict(4) == 2
  assert len(index) == 0
