"""The TFDS builder: what goes in comes out of ArrayRecord, in order, ready for the SFT stream."""

import collections
import json
import math
import pathlib
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from qed_jax.data import fine_proofs, problems, sft
from qed_jax.data import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parents[1]
SFT_ROW = {
  "problem": "p0",
  "reasoning_content": "so so",
  "proof": "QED \u221e",
  "category": "algebra",
  "competition": "imo",
  "gemini-3-pro-grade": 7,
  "qwen3-4b-thinking-reward@128": 0.25,
  "source": "aops",
  "messages": [{"role": "user", "content": "p0"}, {"role": "assistant", "content": "QED"}],
}
SFT_ROWS = [
  SFT_ROW,
  SFT_ROW | {"problem": ""},
  SFT_ROW | {"problem": "p1", "proof": None, "messages": None},
  SFT_ROW | {"problem": "p2", "proof": None},
  SFT_ROW | {"problem": "p3", "competition": None, "gemini-3-pro-grade": None},
]
RL_ROW = {"problem": "p0", "rubrics": "7 points", "source": "aops", "reward_mean": 0.5}
RL_ROWS = [RL_ROW, RL_ROW | {"rubrics": None}, RL_ROW | {"problem": "p1", "reward_mean": None}]


def write_parquet(path, values):
  path.parent.mkdir(parents=True, exist_ok=True)
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
  return path


def build(path, data_dir, config, **changes):
  arguments = {"splits": ["train"], "revision": None, "max_bad_share": 0.5}
  return fine_proofs.build(path, data_dir, config=config, **arguments | changes)


@pytest.mark.parametrize("config", ["sft_default", "sft_all"])
def test_sft_rows_survive_array_record(tmp_path, config):
  """Good rows come back in order and equal to those read from Parquet; bad ones are counted."""
  folder = tmp_path / "raw"
  other = {"sft_default": "all", "sft_all": "data"}[config]
  path = write_parquet(
    folder / {"sft_default": "data", "sft_all": "all"}[config] / "train-0.parquet", SFT_ROWS
  )
  write_parquet(folder / other / "train-0.parquet", [SFT_ROW | {"problem": "of the other config"}])
  report = build(folder, tmp_path / "tfds", config)["train"]
  assert (report.read, report.kept, [bad.row for bad in report.bad]) == (5, 4, [3])
  assert list((tmp_path / "tfds").rglob("*.array_record*"))

  direct, _ = sft.load(path, revision=None, config="default", split="train", max_bad_share=0.5)
  source = fine_proofs.load_source(tmp_path / "tfds", config=config, split="train")
  assert len(source) == len(direct) == 4
  for i, row in enumerate(direct):
    assert sft.conversation(source[i], "{problem}") == sft.conversation(row, "{problem}")
  assert source[0]["gemini-3-pro-grade"] == 7.0 and source[0]["competition"] == "imo"
  assert math.isnan(source[3]["gemini-3-pro-grade"]) and source[3]["competition"] == ""


def test_rl_rows_survive_array_record(tmp_path):
  """Problems read back from ArrayRecord equal those read from Parquet, ids included."""
  path = write_parquet(tmp_path / "rl.parquet", RL_ROWS)
  report = build(path, tmp_path, "rl")["train"]
  assert [bad.why for bad in report.bad] == ["rubrics is missing"]
  source = fine_proofs.load_source(tmp_path, config="rl", split="train")
  direct, _ = problems.load(
    path,
    revision=None,
    config="default",
    split="train",
    require=("rubric",),
    reward_range=None,
    max_bad_share=0.5,
  )
  assert [problems.from_row(row, require=("rubric",)) for row in source] == direct
  assert source[0]["reward_mean"] == 0.5 and math.isnan(source[1]["reward_mean"])


def test_tfds_opens_it_by_name(tmp_path):
  """tfds.data_source finds the dataset under its registered name."""
  build(write_parquet(tmp_path / "rl.parquet", RL_ROWS), tmp_path, "rl")
  found = tfds.data_source("fine_proofs/rl", data_dir=str(tmp_path), split="train")
  assert [row["problem"].decode() for row in found] == ["p0", "p1"]


def test_array_record_feeds_the_sft_stream(tmp_path):
  """The Grain stream over ArrayRecord has every row of an epoch once."""
  rows = [SFT_ROW | {"problem": f"p{i}"} for i in range(40)]
  build(write_parquet(tmp_path / "x.parquet", rows), tmp_path, "sft_all", max_bad_share=0.0)
  source = fine_proofs.load_source(tmp_path, config="sft_all", split="train")
  lines = [" ".join(f"p{i}" for i in range(40)) + " so QED \u221e"]
  words = tokenizer_lib.train_sentencepiece(
    lines, tmp_path / "words", vocab_size=64, vocab_multiple=1
  )
  batches, too_long = sft.dataset(
    source,
    words,
    template="{problem}",
    row_length=24,
    rows=4,
    seed=0,
    epochs=1,
    process_index=0,
    process_count=1,
    read_threads=2,
  )
  text = " ".join(words.decode(row) for batch in batches for row in batch.tokens_BT)
  counts = collections.Counter(text.split())
  assert all(counts[f"p{i}"] == 1 for i in range(40)) and not too_long
  assert counts["\u221e"] == 40


def test_errors_are_one_line(tmp_path):
  """Unknown configs, missing datasets and splits, bad data and a second build say what to do."""
  path = write_parquet(tmp_path / "rl.parquet", RL_ROWS)
  with pytest.raises(ValueError, match="does not exist; write it with") as error:
    fine_proofs.load_source(tmp_path, config="rl", split="train")
  assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match="1 of 3 rows .* max_bad_share=0.1"):
    build(path, tmp_path, "rl", max_bad_share=0.1)
  with pytest.raises(ValueError, match="does not exist"):
    fine_proofs.load_source(tmp_path, config="rl", split="train")
  build(path, tmp_path, "rl")
  with pytest.raises(ValueError, match="is there already; remove it"):
    build(path, tmp_path, "rl")
  with pytest.raises(ValueError, match="has no split 'test'; it has train"):
    fine_proofs.load_source(tmp_path, config="rl", split="test")
  with pytest.raises(ValueError, match="config 'sft' is unknown; give one of sft_default"):
    fine_proofs.load_source(tmp_path, config="sft", split="train")


def test_tensorflow_is_not_imported(tmp_path):
  """Building and reading leave TensorFlow alone, even where an installed one is found."""
  path = write_parquet(tmp_path / "rl.parquet", RL_ROWS)
  (tmp_path / "tensorflow").mkdir()
  (tmp_path / "tensorflow" / "__init__.py").write_text("raise RuntimeError('imported')")
  program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
from qed_jax.data import fine_proofs
arguments = dict(splits=["train"], revision=None, max_bad_share=0.5)
fine_proofs.build({str(path)!r}, {str(tmp_path)!r}, config="rl", **arguments)
source = fine_proofs.load_source({str(tmp_path)!r}, config="rl", split="train")
print(len(source), "tensorflow" in sys.modules)
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert done.stdout.splitlines()[-1] == "2 False"


def test_tool_builds_and_prints_its_figures(tmp_path):
  """tools/build_fine_proofs.py writes the dataset; its last line is JSON; bad data is exit 1."""
  path = write_parquet(tmp_path / "rl.parquet", RL_ROWS)
  command = [
    sys.executable,
    str(ROOT / "tools/build_fine_proofs.py"),
    "--src",
    str(path),
    "--config",
    "rl",
  ]
  command += ["--data-dir", str(tmp_path / "tfds"), "--splits", "train", "--max-bad-share"]
  failed = subprocess.run([*command, "0.1"], capture_output=True, text=True)
  assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith("error: 1 of 3 rows")
  done = subprocess.run([*command, "0.5"], capture_output=True, text=True, check=True)
  figures = json.loads(done.stdout.splitlines()[-1])
  assert figures["train"]["kept"] == 2 and figures["train"]["bad"] == 1
  assert len(fine_proofs.load_source(tmp_path / "tfds", config="rl", split="train")) == 2
