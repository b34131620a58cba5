"""Conversations -> packed Batches for supervised fine-tuning, with an exact position to resume.

rows of FineProofs-SFT -> messages -> tokens and targets -> Grain packing -> Batch. The state of the
iterator is a small JSON value; an iterator that is set to it goes on with the very same batches.
"""

import pathlib
from collections.abc import Sequence

import grain
import numpy as np

from qed_jax import prompts, records
from qed_jax.data import rows as rows_lib
from qed_jax.data import tokenizer as tokenizer_lib

# Rows packed at a time, at least. Proof lengths (log-normal, median 16k of 45k) fill 89 % of the
# slots with 8 open rows, 94 to 95 % with 64, 96 % with 128; resuming tokenises them again.
OPEN_ROWS = 128
BATCHES_AHEAD = 2


def load(
  path_or_hub_id: str | pathlib.Path,
  *,
  revision: str | None,
  config: str,
  split: str,
  max_bad_share: float,
) -> tuple[list[rows_lib.Row], rows_lib.Report]:
  """Rows of FineProofs-SFT's columns, reduced to what training reads; see rows.load for errors."""
  return rows_lib.load(
    path_or_hub_id,
    from_row,
    revision=revision,
    config=config,
    split=split,
    max_bad_share=max_bad_share,
  )


def from_row(row: rows_lib.Row) -> rows_lib.Row:
  """{"problem", "reasoning_content", "proof"} where a row has all three, else {"messages"}.

  Raises ValueError(why) when the row has neither.
  """
  columns = ("problem", "reasoning_content", "proof")
  try:
    return {name: rows_lib.text(row, (name,), required=True) for name in columns}
  except ValueError as error:
    if row.get("messages") is None:
      raise
    try:
      return {"messages": _messages(row["messages"])}
    except ValueError as second:
      raise ValueError(f"{error}, and messages {second}") from None


def conversation(row: rows_lib.Row, template: str) -> list[tokenizer_lib.Message]:
  """The messages to train on: a proof with its reasoning behind the prompt, or `messages` as is.

  template: prompt text with the placeholder {problem}.
  """
  if row.get("messages") is not None and "proof" not in row:
    return row["messages"]
  answer = f"<think>\n{row['reasoning_content']}\n</think>\n\n{row['proof']}"
  return [
    {"role": "user", "content": prompts.render(template, problem=row["problem"])},
    {"role": "assistant", "content": answer},
  ]


def dataset(
  source: Sequence[rows_lib.Row],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  template: str,
  row_length: int,
  rows: int,
  seed: int,
  epochs: int | None,
  process_index: int,
  process_count: int,
  read_threads: int,
) -> tuple[grain.IterDataset, set[int]]:
  """The stream of this process's Batches [rows, row_length] and the rows that were too long.

  source: random access to rows as from_row gives them (a list, or fine_proofs.load_source).
  seed: of the order, 0 to 2**32 - 1; each epoch has its own order and every row exactly once over
  all processes. epochs: None goes on for ever, which several processes need, since their shares
  fill different numbers of batches. read_threads: tokenise ahead in as many threads, 0 for none.
  The set fills with the indices of rows longer than row_length as they are met; they are left out.

  Iterate with `iter(dataset)`; get_state() gives a JSON value and set_state(state) goes back to it.
  weight_BT is 1 / the targets of this process's batch; with several processes call `normalise` on
  it with the total of all. Arrays are numpy; a last batch that is not full ends with empty rows.
  """
  if not len(source):
    raise ValueError("the SFT source has no rows; check its path and filters")
  too_long: set[int] = set()

  def example(i: int) -> dict[str, np.ndarray] | None:
    tokens, is_target = tokenizer.example(conversation(source[i], template))
    if len(tokens) <= row_length:
      return {"tokens": tokens, "is_target": is_target}
    too_long.add(int(i))
    if len(too_long) == len(source):
      raise ValueError(
        f"all {len(source)} SFT rows are longer than row_length={row_length} tokens; "
        f"raise it (row {i} has {len(tokens)})"
      )
    return None

  examples = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat(epochs)
  examples = examples[process_index::process_count].map(example)
  read_options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=4 * read_threads)
  packed = grain.experimental.FirstFitPackIterDataset(
    examples.to_iter_dataset(read_options),
    length_struct={"tokens": row_length, "is_target": row_length},
    num_packing_bins=-(-OPEN_ROWS // rows) * rows,
    # First fit fills the first rows of a pack best; mixed, batches hold about the same.
    shuffle_bins=True,
    seed=seed,
  )
  batches = packed.batch(rows, drop_remainder=False, batch_fn=lambda parts: _batch(parts, rows))
  # Packed while the device works; its state is that of the batch handed out last.
  ready = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=BATCHES_AHEAD)
  return ready, too_long


def normalise(weight_BT: np.ndarray, total: int) -> np.ndarray:
  """float32 [B, T]: 1 / total at every target (weight > 0), so that the loss is their mean.

  total: targets of the whole step, over all processes; a step without targets gets zeros.
  """
  return np.where(np.asarray(weight_BT) > 0, np.float32(1 / max(total, 1)), np.float32(0))


def _batch(parts: Sequence[dict[str, np.ndarray]], rows: int) -> records.Batch:
  def stack(key, dtype):
    array_BT = np.zeros((rows, len(parts[0][key])), dtype)
    array_BT[: len(parts)] = [part[key] for part in parts]
    return array_BT

  is_target_BT = stack("is_target", np.bool_)
  return records.Batch(
    tokens_BT=stack("tokens", np.int32),
    positions_BT=stack("tokens_positions", np.int32),
    segments_BT=stack("tokens_segment_ids", np.int32),
    weight_BT=normalise(is_target_BT, int(is_target_BT.sum())),
  )


def _messages(value: object) -> list[tokenizer_lib.Message]:
  if not isinstance(value, list) or len(value) < 2 or not all(isinstance(m, dict) for m in value):
    raise ValueError("is not a list of two or more messages")
  messages = []
  for i, message in enumerate(value):
    role = rows_lib.text(message, ("role",), required=True)
    if role not in tokenizer_lib.ROLES:
      raise ValueError(f"{i} has role {role!r}, not one of {', '.join(tokenizer_lib.ROLES)}")
    messages.append({"role": role, "content": rows_lib.text(message, ("content",), required=True)})
  if messages[-1]["role"] != "assistant":
    raise ValueError("does not end with the assistant's")
  return messages
