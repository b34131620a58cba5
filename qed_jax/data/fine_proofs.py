"""A TFDS builder that turns the FineProofs datasets into ArrayRecord files, and their reader.

ArrayRecord gives random access on disks and buckets, so that each host reads its share of a
dataset without holding it. TensorFlow is needed neither to build nor to read.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from qed_jax.data import problems, rows, sft

# The builder's configs and the hub's config that each is read from.
CONFIGS = {"sft_default": "default", "sft_all": "all", "rl": "default"}
RL_TEXTS = ("id", "problem", "rubrics", "answer", "solution", "source")
RL_NUMBERS = ("reward_mean", "reward_std")
SFT_TEXTS = ("problem", "reasoning_content", "proof", "messages")
SFT_NOTES = ("category", "competition", "source")
SFT_NUMBERS = ("gemini-3-pro-grade", "qwen3-4b-thinking-reward@128")


class FineProofs(tfds.core.GeneratorBasedBuilder):
  """FineProofs-SFT (one proof a problem, or all of them) and FineProofs-RL."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in CONFIGS]

  def __init__(self, *, rows_by_split: Mapping[str, Sequence[rows.Row]] | None = None, **kwargs):
    """rows_by_split: what to write; a builder that only reads does without. kwargs: of TFDS."""
    self._rows_by_split = rows_by_split
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    if self.builder_config.name == "rl":
      texts, numbers = RL_TEXTS, RL_NUMBERS
    else:
      texts, numbers = SFT_TEXTS + SFT_NOTES, SFT_NUMBERS
    features = {name: tfds.features.Text() for name in texts}
    features |= {name: tfds.features.Scalar(np.float32) for name in numbers}
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,  # keeps the order of the files; training shuffles by its own seed
    )

  def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, rows.Row]]]:
    if self._rows_by_split is None:
      raise ValueError("nothing to write; build the dataset with fine_proofs.build")
    return {split: self._generate_examples(found) for split, found in self._rows_by_split.items()}

  def _generate_examples(self, found: Sequence[rows.Row]) -> Iterator[tuple[int, rows.Row]]:
    yield from enumerate(found)


def build(
  path_or_hub_id: str | pathlib.Path,
  data_dir: str | pathlib.Path,
  *,
  config: str,
  splits: Sequence[str],
  revision: str | None,
  max_bad_share: float,
) -> dict[str, rows.Report]:
  """Reads Parquet, JSONL or CSV rows and writes data_dir/fine_proofs/{config}/1.0.0 at once.

  config: "sft_default", "sft_all" or "rl". Returns each split's account of bad rows, which are
  left out. Raises ValueError in one line as rows.load does, and when the dataset is there already.
  """
  builder = _builder(data_dir, config)
  if builder.is_prepared():
    raise ValueError(f"{builder.data_path} is there already; remove it to build it again")
  parse = _rl_row if config == "rl" else _sft_row
  found, reports = {}, {}
  for split in splits:
    found[split], reports[split] = rows.load(
      path_or_hub_id,
      parse,
      revision=revision,
      config=CONFIGS[config],
      split=split,
      max_bad_share=max_bad_share,
    )
  builder = FineProofs(
    data_dir=str(data_dir), config=config, file_format="array_record", rows_by_split=found
  )
  builder.download_and_prepare()
  return reports


class Source(Sequence):
  """Random access to the rows of one split, as sft.dataset and problems.from_row read them."""

  def __init__(self, data_source: Sequence[Mapping[str, Any]]):
    self._data_source = data_source

  def __len__(self) -> int:
    return len(self._data_source)

  def __getitem__(self, i: int) -> rows.Row:
    if not 0 <= i < len(self):
      raise IndexError(f"row {i} of {len(self)}")
    row = {
      name: value.decode() if isinstance(value, bytes) else float(value)
      for name, value in self._data_source[int(i)].items()
    }
    if row.get("messages"):
      return {"messages": json.loads(row["messages"])}
    row.pop("messages", None)
    return row


def load_source(data_dir: str | pathlib.Path, *, config: str, split: str) -> Source:
  """Opens what `build` wrote. Raises ValueError in one line when it is not there."""
  builder = _builder(data_dir, config)
  if not builder.is_prepared():
    raise ValueError(f"{builder.data_path} does not exist; write it with fine_proofs.build")
  if split not in builder.info.splits:
    has = ", ".join(sorted(builder.info.splits))
    raise ValueError(f"{builder.data_path} has no split {split!r}; it has {has}")
  return Source(builder.as_data_source(split=split))


def _builder(data_dir: str | pathlib.Path, config: str) -> FineProofs:
  if config not in CONFIGS:
    raise ValueError(f"config {config!r} is unknown; give one of {', '.join(CONFIGS)}")
  return FineProofs(data_dir=str(data_dir), config=config)


def _sft_row(row: rows.Row) -> rows.Row:
  kept = sft.from_row(row)
  if "messages" in kept:
    kept = {"messages": json.dumps(kept["messages"])}
  written = {name: kept.get(name, "") for name in SFT_TEXTS}
  written |= {name: rows.text(row, (name,), required=False) for name in SFT_NOTES}
  return written | {name: _number(row, name) for name in SFT_NUMBERS}


def _rl_row(row: rows.Row) -> rows.Row:
  problem = problems.from_row(row, require=("rubric",))
  written = {
    "id": problem.id,
    "problem": problem.statement,
    "rubrics": problem.rubric,
    "answer": problem.answer,
    "solution": problem.solution,
    "source": problem.source,
  }
  return written | {name: _number(row, name) for name in RL_NUMBERS}


def _number(row: rows.Row, name: str) -> float:
  """The number in an optional column, NaN for none."""
  value = row.get(name)
  if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
    return math.nan
  return rows.number(row, name)
