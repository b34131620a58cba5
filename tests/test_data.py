"""Rows, problems and the SFT stream: bad rows are named, batches are exact, resuming is too."""

import collections
import hashlib
import http.server
import json
import logging
import re
import threading
import time

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qed_jax.data import problems, rows, sft
from qed_jax.data import tokenizer as tokenizer_lib

TEMPLATE = "prove {problem}"
RL_ROW = {
  "problem": "Prove that $\\frac{1}{2} > 0$.",
  "rubrics": "1. Checkpoints (7 pts total)",
  "source": "aops",
  "scores": [0, 7],
  "rewards": [0.0, 1.0],
  "num_rewards": 2,
  "reward_mean": 0.5,
  "reward_std": 0.5,
}
SFT_ROW = {
  "problem": "p1",
  "reasoning_content": "think hard",
  "proof": "proof QED",
  "category": "algebra",
  "competition": "imo",
  "gemini-3-pro-grade": 7,
  "qwen3-4b-thinking-reward@128": 0.4,
  "source": "aops",
  "messages": [{"role": "user", "content": "p1"}, {"role": "assistant", "content": "x"}],
}
LOAD = {"revision": None, "config": "default", "split": "train"}


def write_jsonl(path, values):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
  return path


def write_parquet(path, values):
  path.parent.mkdir(parents=True, exist_ok=True)
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
  return path


def load_problems(path, **changes):
  arguments = LOAD | {"require": ("rubric",), "reward_range": None, "max_bad_share": 0.9}
  return problems.load(path, **arguments | changes)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_fine_proofs_rl_rows_become_problems(tmp_path, write):
  """The published columns give statement, rubric and source; the id is the statement's hash."""
  path = write(tmp_path / f"x.{'jsonl' if write is write_jsonl else 'parquet'}", [RL_ROW])
  (problem,), report = load_problems(path)
  assert problem.statement == RL_ROW["problem"] and problem.rubric == RL_ROW["rubrics"]
  assert problem.source == "aops" and problem.answer == problem.solution == ""
  assert problem.id == hashlib.sha256(RL_ROW["problem"].encode()).hexdigest()[:16]
  assert report == rows.Report(read=1, kept=1, filtered=0, bad=())


def test_benchmark_columns_become_problems(tmp_path):
  """CSV with other names for the columns, quotes, line breaks and a byte-order mark."""
  path = tmp_path / "proofbench.csv"
  path.write_text(
    "\ufeffProblem ID,Problem,Solution,Grading guidelines,Level,Short Answer,Source\r\n"
    'PB-1,"Is ""1"" odd?\nProve it.",It is.,(Partial),IMO-easy,42,novel\r\n'
  )
  (problem,), _ = load_problems(path, require=("rubric", "answer"))
  assert (problem.id, problem.statement) == ("PB-1", 'Is "1" odd?\nProve it.')
  assert (problem.rubric, problem.level, problem.answer) == ("(Partial)", "IMO-easy", "42")
  assert (problem.solution, problem.source) == ("It is.", "novel")


BAD_LINES = [
  ("not json", "is not JSON"),
  ("[1, 2]", "is a list, not an object"),
  ("[" * 100_000, "is not JSON"),
  (json.dumps({"rubrics": "r"}), "problem is missing"),
  (json.dumps(RL_ROW | {"problem": "  "}), "problem is empty"),
  (json.dumps(RL_ROW | {"problem": None}), "problem is missing"),
  (json.dumps(RL_ROW | {"problem": 3}), "problem is of type int"),
  (json.dumps(RL_ROW | {"problem": float("nan")}), "problem is NaN"),
  (json.dumps(RL_ROW | {"problem": "\ud800"}), "problem holds characters"),
  (json.dumps(RL_ROW | {"rubrics": ""}), "rubrics is empty"),
  (json.dumps(RL_ROW | {"rubrics": ["r"]}), "rubrics is of type list"),
  (json.dumps(RL_ROW | {"rubrics": float("nan")}), "rubrics is NaN"),
  (json.dumps(RL_ROW | {"source": {}}), "source is of type dict"),
  (json.dumps(RL_ROW | {"source": True}), "source is of type bool"),
  (json.dumps(RL_ROW), "has the id"),
]


def test_bad_rows_are_counted_named_and_skipped(tmp_path, caplog):
  """Each bad row is told by file, line and reason; the good rows around it are kept."""
  good = [RL_ROW, RL_ROW | {"problem": "last"}]
  lines = [good[0], "", *(line for line, _ in BAD_LINES), good[1]]
  with caplog.at_level(logging.WARNING):
    kept, report = load_problems(write_jsonl(tmp_path / "x.jsonl", lines), max_bad_share=0.95)
  assert [p.statement for p in kept] == [RL_ROW["problem"], "last"]
  assert (report.read, report.kept) == (len(lines) - 1, 2)
  assert [bad.row for bad in report.bad] == list(range(3, 3 + len(BAD_LINES)))
  for bad, (line, why) in zip(report.bad, BAD_LINES, strict=True):
    assert bad.file == "x.jsonl" and why in bad.why, line[:80]
  assert "x.jsonl row 3: is not JSON" in caplog.text
  assert f"skipped {len(BAD_LINES)} bad rows of {len(lines) - 1}" in caplog.text


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_bytes_that_are_not_text_are_a_bad_row(tmp_path, name):
  """A row of another encoding is skipped, the rows behind it are read."""
  row = {"x.csv": b"%s,r\n", "x.jsonl": b'{"problem": "%s", "rubrics": "r"}\n'}[name]
  head = b"problem,rubrics\n" if name == "x.csv" else b""
  (tmp_path / name).write_bytes(head + row % b"one" + row % b"caf\xe9" + row % b"two")
  kept, report = load_problems(tmp_path / name)
  assert [p.statement for p in kept] == ["one", "two"]
  assert [bad.row for bad in report.bad] == [2]


def test_ragged_csv_rows_are_bad(tmp_path):
  """Shifted columns never become a problem."""
  (tmp_path / "x.csv").write_text("problem,rubrics\na,r\nb\nc,r,x\nd,r\n")
  kept, report = load_problems(tmp_path / "x.csv")
  assert [p.statement for p in kept] == ["a", "d"]
  assert [bad.why for bad in report.bad] == [
    "has 1 fields, the header has 2",
    "has 3 fields, the header has 2",
  ]


def test_too_many_bad_rows_stop_in_one_line(tmp_path):
  """The share is a limit: at it rows are skipped, above it loading stops and names the first."""
  path = write_jsonl(tmp_path / "x.jsonl", [RL_ROW, {}, RL_ROW | {"problem": "b"}, "?"])
  assert len(load_problems(path, max_bad_share=0.5)[0]) == 2
  with pytest.raises(ValueError, match=r"2 of 4 rows .* max_bad_share=0.49; .* row 2") as error:
    load_problems(path, max_bad_share=0.49)
  assert "\n" not in str(error.value)
  for lines in ([], [{}]):
    with pytest.raises(ValueError, match="no row of"):
      load_problems(write_jsonl(tmp_path / "x.jsonl", lines), max_bad_share=1.0)


def test_truncated_parquet_stops_in_one_line(tmp_path):
  """A broken download is no reason to train on half of the data."""
  path = write_parquet(tmp_path / "x.parquet", [RL_ROW])
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match="not a whole Parquet file") as error:
    load_problems(path)
  assert "\n" not in str(error.value)


def test_reward_range_keeps_both_ends(tmp_path):
  """reward_mean outside the range is left out, not bad; a missing or NaN one is bad."""
  means = [0.0, 0.1, 0.4, 0.7, 0.71, 1.0, float("nan"), None, "high"]
  lines = [RL_ROW | {"problem": f"p{i}", "reward_mean": mean} for i, mean in enumerate(means)]
  path = write_jsonl(tmp_path / "x.jsonl", lines)
  kept, report = load_problems(path, reward_range=(0.1, 0.7))
  assert [p.statement for p in kept] == ["p1", "p2", "p3"]
  assert (report.filtered, [bad.row for bad in report.bad]) == (3, [7, 8, 9])
  assert len(load_problems(path)[0]) == len(means)


def test_folders_are_read_by_card_or_by_name(tmp_path):
  """A dataset card's file lists decide; without a card, folder and file names do."""
  for name, statement in [("data", "default"), ("all", "all"), ("all", "more")]:
    write_parquet(tmp_path / name / f"train-{statement}.parquet", [RL_ROW | {"problem": statement}])
  write_jsonl(tmp_path / "data" / "test-0.jsonl", [RL_ROW | {"problem": "test"}])

  def statements(**changes):
    return [p.statement for p in load_problems(tmp_path, **changes)[0]]

  for _ in range(2):
    assert statements() == ["default"]
    assert statements(config="all") == ["all", "more"]
    assert statements(split="test") == ["test"]
    card = {"configs": [{"config_name": "all", "data_files": [{"split": "train"}]}]}
    card["configs"][0]["data_files"][0]["path"] = "all/train-*"
    default = [{"split": s, "path": [f"data/{s}-*"]} for s in ("train", "test")]
    card["configs"].append({"config_name": "default", "data_files": default})
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\nA card.\n")
  with pytest.raises(ValueError, match="no files for config 'all', split 'test'; it has"):
    statements(config="all", split="test")


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("nowhere/at/all", "does not exist"),
    ("rows.jsonl", "does not exist"),
    ("someone/some-data", "needs a revision"),
  ],
)
def test_missing_data_is_one_line(path, message):
  """A path that is no file and no hub id with a revision says so."""
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    load_problems(path)
  assert "\n" not in str(error.value)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
  """A local server that speaks as much of the hub's protocol as its client uses; url -> bytes."""
  files, asked = {}, []

  class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, body: bytes):
      self.send_response(200)
      self.send_header("Content-Length", str(len(body)))
      self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
      self.send_header("X-Repo-Commit", COMMIT)
      self.end_headers()
      if self.command == "GET":
        self.wfile.write(body)

    def do_GET(self):
      path = self.path.partition("?")[0]
      asked.append(path)
      resolved = re.fullmatch(rf"/datasets/someone/rows/resolve/{COMMIT}/(.*)", path)
      if resolved and resolved[1] in files:
        self.reply(files[resolved[1]])
      elif path == f"/api/datasets/someone/rows/tree/{COMMIT}":
        tree = [
          {"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
          for f, b in files.items()
        ]
        self.reply(json.dumps(tree).encode())
      elif path == f"/api/datasets/someone/rows/revision/{COMMIT}":
        siblings = [{"rfilename": f} for f in files]
        self.reply(json.dumps({"id": "x", "sha": COMMIT, "siblings": siblings}).encode())
      else:
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_):
      """Quiet."""

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  real = huggingface_hub.snapshot_download

  def local(*args, **kwargs):
    endpoint = f"http://127.0.0.1:{server.server_port}"
    return real(*args, **kwargs, endpoint=endpoint, cache_dir=tmp_path / "cache")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", local)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
  yield files, asked
  server.shutdown()
  server.server_close()


def test_hub_dataset_at_a_revision(fake_hub, tmp_path):
  """A hub id is read at its pinned revision, and only the files of the config are fetched."""
  files, asked = fake_hub
  for name in ("data", "all"):
    path = write_parquet(tmp_path / name, [SFT_ROW | {"problem": name}])
    files[f"{name}/train-00000-of-00001.parquet"] = path.read_bytes()
  found, _ = sft.load(
    "someone/rows", revision=COMMIT, config="all", split="train", max_bad_share=0.0
  )
  assert [row["problem"] for row in found] == ["all"]
  assert any("/all/train" in path for path in asked)
  assert not any("/data/train" in path for path in asked)
  with pytest.raises(ValueError, match="'someone/other' at revision 'main' could not be") as error:
    sft.load("someone/other", revision="main", config="all", split="train", max_bad_share=0.0)
  assert "\n" not in str(error.value)


def test_sft_rows_keep_proof_and_reasoning_or_else_messages(tmp_path):
  """Rows with reasoning and proof render with the template, others keep their own messages."""
  own = SFT_ROW["messages"]
  values = [
    SFT_ROW,
    SFT_ROW | {"reasoning_content": None},
    SFT_ROW | {"proof": "", "messages": None},
    SFT_ROW | {"proof": "", "messages": own[:1]},
    SFT_ROW | {"proof": "", "messages": own[::-1]},
    {"messages": [{"role": "tool", "content": "x"}, own[1]]},
    {"messages": [own[0], {"role": "assistant", "content": 5}]},
  ]
  found, report = sft.load(write_jsonl(tmp_path / "x.jsonl", values), **LOAD, max_bad_share=0.9)
  assert [sft.conversation(row, TEMPLATE) for row in found] == [
    [
      {"role": "user", "content": "prove p1"},
      {"role": "assistant", "content": "<think>\nthink hard\n</think>\n\nproof QED"},
    ],
    own,
  ]
  assert [bad.row for bad in report.bad] == [3, 4, 5, 6, 7]
  assert report.bad[0].why == "proof is empty"
  assert "does not end with the assistant" in report.bad[2].why


# Words of each row's reasoning; those of 30 are too long. Grain shuffles 99 rows faster than 9.
LENGTHS = (1, 2, 9, 4, 3, 9, 30, 7, 2, 5, 8) * 9


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  lines = [" ".join([f"p{i}" for i in range(len(LENGTHS))] + ["prove", "QED", "so"])]
  folder = tmp_path_factory.mktemp("words")
  return tokenizer_lib.train_sentencepiece(lines, folder, vocab_size=128, vocab_multiple=1)


SOURCE = [
  {"problem": f"p{i}", "reasoning_content": " ".join(["so"] * n), "proof": "QED"}
  for i, n in enumerate(LENGTHS)
]


def stream(tokenizer, **changes):
  arguments = {
    "template": TEMPLATE,
    "row_length": 24,
    "rows": 2,
    "seed": 3,
    "epochs": None,
    "process_index": 0,
    "process_count": 1,
    "read_threads": 0,
  }
  return sft.dataset(SOURCE, tokenizer, **arguments | changes)


def segments_of(batch):
  """(tokens, weights, positions) of each example of a Batch."""
  for row in range(batch.tokens_BT.shape[0]):
    for segment in range(1, batch.segments_BT[row].max() + 1):
      at = batch.segments_BT[row] == segment
      yield batch.tokens_BT[row][at], batch.weight_BT[row][at], batch.positions_BT[row][at]


def problem_of(tokenizer, tokens):
  return int(re.search(r"prove p(\d+)", tokenizer.decode(tokens))[1])


@pytest.mark.parametrize("read_threads", [0, 2])
@pytest.mark.parametrize("process_count", [1, 3])
def test_each_epoch_has_every_row_once(words, process_count, read_threads):
  """Over all processes and one epoch each row that fits is there once, whole; the long ones never.

  Over three epochs, three times; and the order is another one in each epoch.
  """
  for epochs in (1, 3):
    counts, dropped = collections.Counter(), set()
    for process_index in range(process_count):
      batches, too_long = stream(
        words,
        epochs=epochs,
        process_index=process_index,
        process_count=process_count,
        read_threads=read_threads,
      )
      for batch in batches:
        counts.update(problem_of(words, tokens) for tokens, _, _ in segments_of(batch))
      dropped |= too_long
    assert counts == {i: epochs for i, n in enumerate(LENGTHS) if n < 30}
    assert dropped == {i for i, n in enumerate(LENGTHS) if n == 30}


def test_batches_are_the_examples(words):
  """Segments are whole examples with positions from 0, and only their targets have weight."""
  batches, _ = stream(words, epochs=2)
  for batch in batches:
    assert batch.tokens_BT.shape == (2, 24)
    targets = 0
    for tokens, weight, positions in segments_of(batch):
      row = SOURCE[problem_of(words, tokens)]
      expected, is_target = words.example(sft.conversation(row, TEMPLATE))
      np.testing.assert_array_equal(tokens, expected)
      np.testing.assert_array_equal(weight > 0, is_target)
      np.testing.assert_array_equal(positions, np.arange(len(tokens)))
      targets += is_target.sum()
    weights = set(np.unique(batch.weight_BT)) - {0}
    assert weights == {np.float32(1 / targets)} and batch.weight_BT.dtype == np.float32
    assert (batch.weight_BT[batch.segments_BT == 0] == 0).all()
    np.testing.assert_allclose(batch.weight_BT.sum(), 1, rtol=1e-6)


def test_order_depends_on_the_seed_alone(words):
  """The same seed gives the same stream, with or without threads; another seed another order."""

  def order(**changes):
    iterator = iter(stream(words, **changes)[0])
    return [problem_of(words, t) for _ in range(64) for t, _, _ in segments_of(next(iterator))]

  assert order() == order() == order(read_threads=3)
  assert order() != order(seed=4)
  first, second = order()[:90], order()[90:180]
  assert first != second


@settings(deadline=None, max_examples=10)
@given(
  st.integers(0, 140),
  st.sampled_from([1, 2, 5, 64, 70]),
  st.sampled_from([0, 2]),
  st.integers(0, 3),
)
@example(rows_before=0, rows=2, read_threads=0, other=3)
@example(rows_before=128, rows=64, read_threads=2, other=0)
def test_resume_goes_on_with_the_same_batches(words, rows_before, rows, read_threads, other):
  """A state taken anywhere, passed through JSON and set on any iterator, gives the same rest."""
  batches, _ = stream(words, rows=rows, read_threads=read_threads)
  iterator = iter(batches)
  for _ in range(rows_before // rows):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator) for _ in range(3)]
  resumed = iter(stream(words, rows=rows, read_threads=0)[0])
  for _ in range(other):
    next(resumed)
  resumed.set_state(state)
  for batch in expected:
    again = next(resumed)
    for name in ("tokens_BT", "positions_BT", "segments_BT", "weight_BT"):
      np.testing.assert_array_equal(getattr(again, name), getattr(batch, name))


class Watched:
  """Rows that count how many of them were read."""

  def __init__(self, rows):
    self.rows, self.read = rows, 0

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    self.read += 1
    return self.rows[i]


def test_the_next_batches_are_made_while_the_device_works(words):
  """Nobody asks for them, and yet rows are read for two batches more; then it rests."""
  source = Watched(SOURCE)
  arguments = {"row_length": 24, "rows": sft.OPEN_ROWS, "seed": 3, "epochs": None}
  arguments |= {"process_index": 0, "process_count": 1, "read_threads": 0}
  iterator = iter(sft.dataset(source, words, template=TEMPLATE, **arguments)[0])
  for batch in range(3):
    next(iterator)
    handed_out, end = (batch + 1) * sft.OPEN_ROWS, time.monotonic() + 60
    while source.read < handed_out + 2 * sft.OPEN_ROWS:  # each row holds one example or more
      assert time.monotonic() < end, "no batch is made ahead"
      time.sleep(0.01)
  seen = -1
  while source.read != seen:
    assert time.monotonic() < end, "batches are made without end"
    seen = source.read
    time.sleep(0.2)


def test_proofs_fill_95_percent_of_an_sft_batch():
  """Lengths like FineProofs' (log-normal, median 16k of at most 45k) in units of 64 tokens."""
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.lognormal(np.log(250), 0.6, 2_000), 8, 704).astype(int)

  class Lengths:
    def example(self, conversation):
      length = int(conversation[1]["content"].split()[1])
      return np.ones(length, np.int32), np.ones(length, bool)

  source = [{"problem": "p", "reasoning_content": f"{n} ", "proof": "QED"} for n in lengths]
  batches, too_long = sft.dataset(
    source,
    Lengths(),
    template=TEMPLATE,
    row_length=704,
    rows=32,
    seed=0,
    epochs=None,
    process_index=0,
    process_count=1,
    read_threads=0,
  )
  filled = [np.mean(b.segments_BT > 0) for _, b in zip(range(20), batches, strict=False)]
  assert not too_long and np.mean(filled) > 0.95, np.mean(filled)


def test_all_rows_too_long_stops(words):
  """A row length that no example fits is an error, not an endless search."""
  with pytest.raises(ValueError, match="all 99 SFT rows are longer than row_length=5") as error:
    next(iter(stream(words, row_length=5)[0]))
  assert "\n" not in str(error.value).partition("\n\n")[0]


def test_normalise_divides_by_the_total_of_all_processes():
  """The weights of all processes' batches, normalised by the common total, add up to 1."""
  parts = [np.array([[0, 1, 1]], bool), np.array([[1, 0, 0.25]], np.float32)]
  weights = [sft.normalise(part, 4) for part in parts]
  np.testing.assert_array_equal(weights[0], np.float32([[0, 0.25, 0.25]]))
  np.testing.assert_array_equal(weights[1], np.float32([[0.25, 0, 0.25]]))
  np.testing.assert_array_equal(sft.normalise(np.zeros((1, 2)), 0), np.zeros((1, 2), np.float32))
