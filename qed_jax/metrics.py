"""What a run says about itself: metrics.jsonl and TensorBoard, MFU, progress."""

import json
import logging
import math
import os
import sys
import time
from datetime import timedelta
from typing import Any, TextIO

import jax
import numpy as np
import rich.progress
import tensorboardX
from etils import epath

log = logging.getLogger(__name__)

REMOTE_SECONDS = 30.0  # object stores cannot append: the whole file is written again this often

# Dense bfloat16 FLOP/s of one jax device, by the start of its device_kind; the longest start wins.
# A TPU v4 or v5p chip is one device, a TPU7x chip is two. Sources: Google Cloud's TPU pages and
# NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989.4e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H200": 989.4e12,
}


def mfu(flops: float, seconds: float, device_kind: str, num_devices: int) -> float | None:
  """Model FLOPs utilisation: `flops` of useful work in `seconds`, over the peak of all devices.

  None where the peak is not known (CPU).
  """
  known = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
  if not known:
    return None
  return flops / (seconds * num_devices * PEAK_FLOPS[max(known, key=len)])


class JsonLines:
  """An append-only file of JSON objects that carry "step"; only process 0 writes.

  Opening it drops the rows after `from_step`, and a last row that a kill cut short, so that a
  resumed run repeats none. A local row is in the file when `write` returns.
  """

  def __init__(self, path: str | os.PathLike, from_step: int):
    self.path = epath.Path(path)
    self._file: TextIO | None = None
    self._lines: list[str] = []
    self._written = 0.0
    if jax.process_index() != 0:
      return
    remote = "://" in os.fspath(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and _step(line) <= from_step]
    if len(kept) < len(lines):
      unfinished = epath.Path(f"{os.fspath(self.path)}.tmp")
      unfinished.write_text("".join(kept))
      unfinished.replace(self.path)
    if remote:
      self._lines = kept
    else:
      self._file = open(self.path, "a", encoding="utf-8")

  def write(self, row: dict) -> None:
    """Appends one row. Numbers that are not finite become null, and their names a field.

    {"loss": nan} is written as {"loss": null, "not_finite": {"loss": "nan"}}. Values are None,
    bool, int, float, str, numpy or jax scalars, and lists and dicts of those.
    """
    if jax.process_index() != 0:
      return
    lost: dict[str, str] = {}
    row = {name: _plain(value, name, lost) for name, value in row.items()}
    if lost:
      row["not_finite"] = lost
    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    if self._file is not None:
      self._file.write(line)
      self._file.flush()
    else:
      self._lines.append(line)
      if time.monotonic() - self._written > REMOTE_SECONDS:
        self._write_all()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
    elif jax.process_index() == 0:
      self._write_all()

  def _write_all(self) -> None:
    self.path.write_text("".join(self._lines))
    self._written = time.monotonic()


def _step(line: str) -> float:
  """The step of a row; infinity for what is no row."""
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError, TypeError):
    return math.inf


def _plain(value: Any, name: str, lost: dict[str, str]) -> Any:
  if isinstance(value, dict):
    return {key: _plain(item, f"{name}.{key}", lost) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item, f"{name}.{i}", lost) for i, item in enumerate(value)]
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    if value.size != 1:
      raise ValueError(f"metric {name} has shape {value.shape}: only scalars can be written")
    value = np.asarray(jax.device_get(value)).item()
  if isinstance(value, float) and not math.isfinite(value):
    lost[name] = str(value)
    return None
  return value


class MetricWriter:
  """metrics.jsonl and TensorBoard events (tb/) of a workdir; only process 0 writes."""

  def __init__(self, workdir: str | os.PathLike, from_step: int):
    """from_step: the step that was restored, 0 for a new run; rows after it are dropped."""
    root = epath.Path(workdir)
    self._rows = JsonLines(root / "metrics.jsonl", from_step)
    self._events = None
    if jax.process_index() == 0:
      folder = os.fspath(root / "tb")
      try:
        # TensorBoard hides what an earlier attempt logged from purge_step on.
        self._events = tensorboardX.SummaryWriter(
          folder, purge_step=from_step + 1, filename_suffix=f".from{from_step}"
        )
      except ImportError as error:  # gs:// without its client library
        log.warning("no TensorBoard events in %s (%s); metrics.jsonl has everything", folder, error)

  def write(self, step: int, values: dict[str, Any]) -> None:
    """One row {"step": step, **values}; numbers go to TensorBoard too. Values are scalars."""
    if jax.process_index() != 0:
      return
    values = dict(zip(values, jax.device_get(list(values.values())), strict=True))
    self._rows.write({"step": int(step), **values})
    for name, value in values.items() if self._events is not None else ():
      if isinstance(value, bool | int | float | np.ndarray | np.generic):
        self._events.add_scalar(name, float(value), step)

  def close(self) -> None:
    self._rows.close()
    if self._events is not None:
      self._events.close()


class Progress:
  """How far a run is: a live bar on a terminal, else a plain line every `interval` seconds.

  Only process 0 shows anything. Shown of the metrics: SHOWN, where they are there.
  """

  SHOWN = {
    "loss": "loss {:.4g}",
    "reward": "reward {:.3f}",
    "tokens_per_s/rollout": "sampled {:,.0f} tok/s",
    "tokens_per_s/train": "trained {:,.0f} tok/s",
  }

  def __init__(self, label: str, first: int, total: int, interval: float = 5.0):
    """first: steps done before this process began; total: steps when all is done."""
    self.label, self.total, self.interval = label, total, interval
    self._start: tuple[int, float] | None = None
    self._printed = -math.inf
    self._live = None
    if jax.process_index() == 0 and sys.stdout.isatty():
      columns = [
        rich.progress.TextColumn("[bold]{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[shown]}", markup=False),
      ]
      self._live = rich.progress.Progress(*columns, refresh_per_second=2)
      self._task = self._live.add_task(label, total=total, completed=first, shown="")
      self._live.start()

  def update(self, step: int, values: dict[str, Any]) -> None:
    """step: steps done so far. values: the step's metrics."""
    if jax.process_index() != 0:
      return
    now = time.monotonic()
    if self._start is None:
      self._start = (step, now)  # the step before this moment compiled: it says nothing of the rest
    shown = [text.format(float(values[k])) for k, text in self.SHOWN.items() if k in values]
    shown.append(f"eta {self._eta(step, now)}")
    if self._live is not None:
      self._live.update(self._task, completed=step, shown="  ".join(shown))
    elif now - self._printed >= self.interval or step == self.total:
      self._printed = now
      print("  ".join([self.label, f"step {step}/{self.total}", *shown]), flush=True)

  def close(self) -> None:
    if self._live is not None:
      self._live.stop()

  def _eta(self, step: int, now: float) -> str:
    start, began = self._start
    if step >= self.total:
      return "0:00:00"
    if step <= start:
      return "?"
    return str(timedelta(seconds=round((self.total - step) * (now - began) / (step - start))))
