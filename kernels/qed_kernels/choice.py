"""Which implementation serves: the first of a list that does not refuse; the log says it once."""

import functools
import logging

import jax


def on_tpu() -> bool:
  """Whether what is being traced is for a TPU."""
  return device().platform == "tpu"


def on_gpu() -> bool:
  """Whether what is being traced is for an NVIDIA GPU."""
  return device().platform in ("gpu", "cuda")


def device():
  """What is being traced for, with `platform` and `device_kind`: of the mesh in use, or else the
  default device."""
  return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def known(what: str, name: str, implementations: dict) -> tuple[str]:
  """The name alone. Raises ValueError, one line, when there is none of it."""
  if name not in implementations:
    names = ", ".join(("auto", *implementations))
    raise ValueError(f"there is no implementation {name!r}: choose {names} for {what}")
  return (name,)


def first_that_serves(what: str, implementations: dict, names: tuple[str, ...], *arguments):
  """The result of the first of `names` that raises no NotImplementedError; all refusals in one."""
  refusals = []
  for name in names:
    try:
      result = implementations[name](*arguments)
    except NotImplementedError as e:
      refusals.append(str(e))
      continue
    say("; ".join((f"{what}: {name}", *refusals)))
    return result
  raise NotImplementedError("; ".join(refusals))


@functools.cache
def say(line: str) -> None:
  """Logs a line once."""
  logging.getLogger("qed_kernels").info(line)
