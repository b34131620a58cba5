"""How the process shares its heap among threads."""

import ctypes

M_ARENA_MAX = -8  # from glibc's malloc.h


def share_one_arena() -> bool:
  """One malloc arena for all threads; True when the C library is one that has them.

  XLA compiles in many threads, glibc gives each a heap of its own, and what a thread frees stays in
  its heap: the peak of a small CPU process is 7 % lower with one. Call it before threads start.
  """
  try:
    return ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1) == 1
  except (AttributeError, OSError, TypeError):
    return False
