"""What each training step measured, written once the device has done the step.

Reading a step's metrics waits for the device. A job that needs nothing of a step to prepare the
next one reads them a step late, so that the device always has the next step to do.
"""

import collections
import dataclasses
import time

import jax
import numpy as np
from etils import epath

from qed_jax import hosts, metrics
from qed_jax.model import flops, qwen3
from qed_jax.objectives import finalise
from qed_jax.records import Batch, Rollout
from qed_jax.rollout.jobs import SampleLog


@dataclasses.dataclass(frozen=True)
class Step:
  """A step that was dispatched. number counts from 0; `measured` may still be on the device;
  dispatched: when, by time.perf_counter."""

  number: int
  batch: Batch
  info: dict[str, float]
  rollouts: list[Rollout]
  measured: dict
  dispatched: float


class StepLog:
  """metrics.jsonl, TensorBoard, samples.jsonl, the progress display, and the count of bad steps.

  Every host makes the same calls; host 0 writes.
  """

  def __init__(self, root: epath.Path, config, model: qwen3.Qwen3Config, first: int, lag: int):
    """first: the step that the run goes on from. lag: dispatched steps whose metrics may wait."""
    self.model, self.lag, self.frozen = model, lag, config.lora.rank > 0
    self.every, self.last = config.log.every, config.steps
    self.writer = metrics.MetricWriter(root, first)
    self.samples = SampleLog(root / "samples.jsonl", first, config.log.samples)
    self.progress = metrics.Progress(config.job, first, config.steps)
    self.health = Health(root, config.max_skipped_steps)
    self.pending: collections.deque[Step] = collections.deque()
    self.done = 0.0  # when the device had done the step before

  def add(self, step: Step) -> None:
    """Takes a step that was just dispatched and writes those that are `lag` behind it."""
    self.pending.append(step)
    while len(self.pending) > self.lag:
      self._write(self.pending.popleft())

  def settle(self) -> None:
    """Waits for every step that was dispatched, and writes it."""
    while self.pending:
      self._write(self.pending.popleft())

  def _write(self, step: Step) -> None:
    info = step.info | finalise(step.measured)
    now = time.perf_counter()
    seconds, self.done = now - max(step.dispatched, self.done), now
    batch = step.batch
    tokens, work = hosts.totals(
      int(np.sum(batch.segments_BT > 0)),
      flops.training(self.model, batch.positions_BT, batch.segments_BT, self.frozen),
    )
    info |= {"seconds/train": seconds, "tokens_per_s/train": tokens / max(seconds, 1e-9)}
    info |= utilisation(work, seconds)
    self.health.check(step.number, info, batch)
    number = step.number + 1
    if number % self.every == 0 or number == self.last:
      self.writer.write(number, info)
      self.samples.write(number, step.rollouts)
    self.progress.update(number, info)

  def close(self) -> None:
    """Ends the files; steps still pending are not written."""
    self.writer.close()
    self.samples.close()
    self.progress.close()


def utilisation(work: float, seconds: float) -> dict[str, float]:
  """MFU of the update, where the chip's peak is known. work: operations of all hosts."""
  share = metrics.mfu(work, seconds, jax.devices()[0].device_kind, jax.device_count())
  return {} if share is None else {"mfu": share}


class Health:
  """Counts updates skipped in a row because loss or gradient was not finite."""

  def __init__(self, root: epath.Path, limit: int):
    self.root, self.limit, self.skipped = root, limit, 0

  def check(self, step: int, info: dict, batch: Batch) -> None:
    """Raises ValueError after `limit` in a row, with the batch saved for a look."""
    self.skipped = self.skipped + 1 if info["skipped"] else 0
    if self.skipped >= self.limit:
      path = self.root / f"not_finite_{step}{f'_host{h}' if (h := hosts.index()) else ''}.npz"
      with path.open("wb") as file:
        np.savez(file, **{k: v for k, v in vars(batch).items() if v is not None})
      raise ValueError(
        f"loss or gradient was not finite {self.skipped} steps in a row (step {step}); the batch "
        f"is in {path}: lower optimizer.lr, or look at the data"
      )
