"""A profiler trace of some steps of a run: --config.profile.steps=(10,13)."""

import os

import jax


class Trace:
  """Writes the steps first..last-1 as a jax.profiler trace, for TensorBoard or Perfetto."""

  def __init__(self, folder: str | os.PathLike, steps: tuple[int, ...]):
    """folder: where TensorBoard's profile plugin finds it. steps: (first, last) or ().

    Raises ValueError, one line, for anything else.
    """
    whole = all(isinstance(step, int) for step in steps)
    if len(steps) not in (0, 2) or not whole or (steps and not 0 <= steps[0] < steps[1]):
      raise ValueError(
        f"config.profile.steps is {tuple(steps)}: give the first step and the one after the last, "
        "such as (10,13), or () for no trace"
      )
    self.folder, self.running = os.fspath(folder), False
    self.first, self.last = steps or (-1, -1)

  def before(self, step: int) -> bool:
    """Whether the trace ends here: finish the steps dispatched so far, then `stop` it.

    Starts it before the first of its steps, or of those that a resumed run still has.
    """
    if not self.running and self.first <= step < self.last:
      jax.profiler.start_trace(self.folder)
      self.running = True
    return self.running and step >= self.last

  def stop(self) -> None:
    """Writes what there is; nothing to do without a running trace."""
    if self.running:
      jax.profiler.stop_trace()
      self.running = False
      print(f"profile written to {self.folder}: tensorboard --logdir {self.folder}", flush=True)
