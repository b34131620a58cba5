"""Ragged examples -> rows of one length, for RL steps. Pure numpy, the same result every time.

Examples are laid out by best-fit decreasing and never split; each is one segment with positions
from 0, so that attention and positions cannot tell it from a row of its own.
"""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qed_jax import records

DTYPES = {
  "tokens": np.int32,
  "weight": np.float32,
  "advantage": np.float32,
  "behavior_logp": np.float32,
  "reference_logp": np.float32,
  "lag": np.int32,
}


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where each example lies: int32 [N] each, in the order in which the examples were given."""

  row_N: np.ndarray
  start_N: np.ndarray
  length_N: np.ndarray


def pack_rows(
  examples: Sequence[Mapping[str, np.ndarray]],
  *,
  row_length: int,
  rows_multiple: int,
  row_counts: Sequence[int] = (),
) -> tuple[records.Batch, Placement]:
  """Packs examples into a Batch of numpy arrays [B, row_length], padding is 0 everywhere.

  examples: dicts of arrays [n] with "tokens", "weight" and any other of DTYPES, the same keys in
  all; every entry speaks of its own token (aligned at the target).
  rows_multiple: B is a multiple of it (hosts times devices that share the rows).
  row_counts: when given, B is the smallest of these that is enough, so that jit sees few shapes;
  beyond the largest, a multiple of the largest.
  Raises ValueError in one line for an example that is empty, ragged or longer than a row.
  """
  keys = _check(examples, row_length)
  placement, used = best_fit([len(e["tokens"]) for e in examples], row_length)
  rows = row_count(used, rows_multiple=rows_multiple, row_counts=row_counts)
  arrays = {key: np.zeros((rows, row_length), DTYPES[key]) for key in keys}
  positions_BT = np.zeros((rows, row_length), np.int32)
  segments_BT = np.zeros((rows, row_length), np.int32)
  # In the order of their places, so that segments count 1, 2, ... from the left.
  segment_B = np.zeros(rows, np.int32)
  for i in np.lexsort((placement.start_N, placement.row_N)):
    row, start, length = placement.row_N[i], placement.start_N[i], placement.length_N[i]
    segment_B[row] += 1
    segments_BT[row, start : start + length] = segment_B[row]
    positions_BT[row, start : start + length] = np.arange(length)
    for key in keys:
      arrays[key][row, start : start + length] = examples[i][key]
  batch = records.Batch(
    positions_BT=positions_BT,
    segments_BT=segments_BT,
    **{f"{key}_BT": array for key, array in arrays.items()},
  )
  return batch, placement


def unpack(array_BT: np.ndarray, placement: Placement) -> list[np.ndarray]:
  """The entries of each example, in the order given to pack_rows: its inverse, also for logp_BT."""
  places = zip(placement.row_N, placement.start_N, placement.length_N, strict=True)
  return [array_BT[row, start : start + length] for row, start, length in places]


def best_fit(lengths: Sequence[int], row_length: int) -> tuple[Placement, int]:
  """Best-fit decreasing: each example, longest first, goes where it leaves the least room.

  Returns the placement and the number of rows used. Ties go to the earlier example and the earlier
  row.
  """
  length_N = np.asarray(lengths, np.int32)
  row_N, start_N = np.zeros_like(length_N), np.zeros_like(length_N)
  free: list[tuple[int, int]] = []  # (room left, row), sorted
  used = 0
  for i in np.argsort(-length_N, kind="stable"):
    length = int(length_N[i])
    place = bisect.bisect_left(free, (length, -1))
    if place < len(free):
      room, row = free.pop(place)
    else:
      room, row = row_length, used
      used += 1
    row_N[i], start_N[i] = row, row_length - room
    bisect.insort(free, (room - length, row))
  return Placement(row_N=row_N, start_N=start_N, length_N=length_N), used


def row_count(used: int, *, rows_multiple: int, row_counts: Sequence[int]) -> int:
  """Rows to allocate for `used` rows. Raises ValueError for a count that is no multiple."""
  odd = [count for count in row_counts if count <= 0 or count % rows_multiple]
  if odd:
    raise ValueError(f"row_counts has {odd[0]}; give positive multiples of {rows_multiple}")
  enough = [count for count in row_counts if count >= used]
  step = max(row_counts, default=rows_multiple)
  return min(enough) if enough else -(-used // step) * step


def efficiency(segments_BT: np.ndarray) -> float:
  """Share of the slots that hold a token of an example, 0 to 1."""
  return float(np.count_nonzero(segments_BT) / segments_BT.size)


def costs(batch: records.Batch, overhead: float) -> np.ndarray:
  """float64 [B], what each row costs: the sum over its segments of L (L + 1) / 2 + overhead L.

  overhead: how many seen keys a token's matrix products cost as much as (flops.keys_per_token).
  """
  real_BT = batch.segments_BT > 0
  return np.sum(real_BT * (batch.positions_BT + 1.0 + overhead), axis=1)


def balanced(
  batch: records.Batch, *, shards: int, rows_at_once: int, overhead: float
) -> records.Batch:
  """The same rows in an order in which devices wait little for one another.

  rows_at_once rows (0: all) are computed at a time, the same number on each of `shards` devices, in
  the order of the batch. The dearest rows come first, so that what is computed together costs about
  the same, and each device in turn gets the dearest that is left, forwards and backwards. Hosts
  that order their own rows so have like costs at the same time without hearing of one another.
  """
  rows = batch.tokens_BT.shape[0]
  rows_at_once = rows_at_once or rows
  if rows % rows_at_once or rows_at_once % shards:
    return batch  # rows that do not divide are not split over devices
  order_B = np.argsort(-costs(batch, overhead), kind="stable")
  each = rows_at_once // shards
  deal_ES = np.arange(rows_at_once).reshape(each, shards)
  deal_ES[1::2] = deal_ES[1::2, ::-1]
  order_B = order_B.reshape(-1, rows_at_once)[:, deal_ES.T.reshape(-1)].reshape(-1)
  return records.Batch(**{
    name: None if array is None else array[order_B] for name, array in vars(batch).items()
  })  # fmt: skip


def _check(examples: Sequence[Mapping[str, np.ndarray]], row_length: int) -> tuple[str, ...]:
  if not examples:
    raise ValueError("nothing to pack; a step without examples has no batch")
  keys = tuple(examples[0])
  wrong = sorted(set(keys) - DTYPES.keys()) or sorted({"tokens", "weight"} - set(keys))
  if wrong:
    raise ValueError(f"example 0 has keys {sorted(keys)}; {wrong[0]!r} is unknown or missing")
  for i, example in enumerate(examples):
    if set(example) != set(keys):
      raise ValueError(f"example {i} has keys {sorted(example)}, example 0 has {sorted(keys)}")
    lengths = {key: np.shape(example[key]) for key in keys}
    if len(set(lengths.values())) != 1 or len(lengths["tokens"]) != 1:
      raise ValueError(f"example {i} has arrays of different shapes: {lengths}")
    (length,) = lengths["tokens"]
    if length == 0:
      raise ValueError(f"example {i} is empty; leave it out")
    if length > row_length:
      raise ValueError(
        f"example {i} has {length} tokens and a row holds {row_length}; "
        "raise row_length or shorten prompts and completions"
      )
  return keys
