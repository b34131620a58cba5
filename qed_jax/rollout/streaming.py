"""Which work may start and which is trained next, so that no trained token is older than max_lag.

A piece of work (a problem with its attempts) that starts under policy version v holds tokens of v
and later, so it must be trained at step v + max_lag at the latest: that is its deadline. Nothing is
ever dropped; instead

- no more work is open than max_lag + 1 steps can train (admission), and
- a step waits until it can take the earliest deadlines among what is done and still leave no more
  of any deadline than the steps up to it can train.

Then every deadline is met, however long an attempt or a judge takes: by induction over steps, the
open work with a deadline up to t is at most what steps up to t train. Long work delays a step
when its deadline comes, and only then.
"""

import itertools
from collections.abc import Sequence

ORDERS = ("admission", "arrival")


class Window:
  """Open work, by number; numbers count up from 0 and are admitted in order.

  per_step: pieces that a step trains. max_lag: policy updates between the oldest token of a batch
  and the policy that trains on it. order: "admission" trains in the order of numbers, which makes
  runs reproducible; "arrival" whatever is done, so that a slow judge holds up nothing.

  On several hosts each has a window of its own, per_step being its share, and starts every
  hosts-th number from `host` on: together they start what one window would.
  """

  def __init__(self, per_step: int, max_lag: int, order: str, *, host: int = 0, hosts: int = 1):
    self.per_step, self.max_lag, self.order = per_step, max_lag, order
    self.host, self.hosts = host, hosts
    self.open: dict[int, int] = {}  # number -> version when it started
    self._done: dict[int, int] = {}  # number -> place in the order of arrival
    self._arrivals = itertools.count()
    self._next = host

  def admit(self, step: int) -> list[int]:
    """Starts what may start under the policy of `step` -> its numbers."""
    if not self.open:
      self._next = max(self._next, step * self.per_step * self.hosts + self.host)
    room = (self.max_lag + 1) * self.per_step - len(self.open)
    started = list(range(self._next, self._next + room * self.hosts, self.hosts))
    self._next += room * self.hosts
    self.open.update(dict.fromkeys(started, step))
    return started

  def finish(self, number: int) -> None:
    """The work is done; what comes of it waits to be trained."""
    if number not in self.open:
      raise ValueError(f"work {number} is not open")
    self._done.setdefault(number, next(self._arrivals))

  def needed(self) -> list[int]:
    """In the order of admission, what the next step trains."""
    return sorted(self.open)[: self.per_step]

  def due(self, step: int) -> list[int] | None:
    """The numbers that `step` trains, ascending; None while it must wait."""
    if self.order == "admission":
      wanted = self.needed()
      return wanted if all(number in self._done for number in wanted) else None
    ready = sorted(self._done, key=lambda n: (self.open[n], self._done[n]))
    chosen = ready[: self.per_step]
    if len(chosen) < self.per_step:
      return None
    left = sorted(self.open[n] for n in self.open.keys() - set(chosen))
    for later in range(self.max_lag + 1):
      late = sum(version + self.max_lag <= step + later for version in left)
      if late > later * self.per_step:
        return None
    return sorted(chosen)

  def take(self, numbers: Sequence[int]) -> None:
    """They are trained: no longer open."""
    for number in numbers:
      del self.open[number], self._done[number]

  def state(self) -> dict:
    """For a checkpoint: what is open will be started again by whoever restores it."""
    return {"next": self._next - self.host, "open": sorted(self.open)}

  def restore(self, state: dict, step: int) -> list[int]:
    """Continues from `state` under the policy of `step` -> the numbers to start again."""
    self._next = state["next"] + self.host
    self.open = dict.fromkeys(state["open"], step)
    self._done = {}
    return sorted(self.open)


def together(states: Sequence[dict]) -> dict:
  """The states of all hosts' windows, in order, as that of one window.

  A host that was stopped before it had started its part of a step counts as having started it.
  """
  latest = max(state["next"] for state in states)
  opened = {number for state in states for number in state["open"]}
  for host, state in enumerate(states):
    opened |= set(range(state["next"] + host, latest + host, len(states)))
  return {"next": latest, "open": sorted(opened)}


def share(state: dict, host: int, hosts: int) -> dict:
  """A host's part of what `together` gave, on any number of hosts.

  By rank and not by number: open work of any kind is then spread evenly, early and late.
  """
  return {"next": state["next"], "open": sorted(state["open"])[host::hosts]}
