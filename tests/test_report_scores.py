"""What the report computes from graded proofs, and how it reads rows that lack this or that."""

import json
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax.reporting import attempts, figures, scores, viewer


def write(folder, rows, name="eval.jsonl"):
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / name).open("a") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)


def read(*roots):
  notes = []
  return attempts.read(roots, notes), notes


def graded(problem, score, **more):
  return {"problem_id": problem, "problem": f"statement {problem}", "score": score} | more


def test_an_outage_is_in_no_mean(tmp_path):
  """A proof without a grade is counted beside the mean; it is neither a zero nor forgotten."""
  rows = [graded("a", 7), graded("b", None), graded("c", 1, finish_reason="length")]
  write(tmp_path, rows)
  library, _ = read(tmp_path)
  [row] = scores.by_benchmark(library.runs[0], library)
  assert (row["score"], row["problems"], row["proofs"], row["invalid"]) == (4.0, 3, 3, 1)
  assert row["cut"] == pytest.approx(1 / 3)


def test_samples_of_a_problem_are_averaged_first(tmp_path):
  """Ten samples of one problem weigh as much as one of another."""
  write(tmp_path, [graded("a", 0, sample=i) for i in range(10)] + [graded("b", 6, sample=0)])
  library, _ = read(tmp_path)
  assert scores.by_benchmark(library.runs[0], library)[0]["score"] == 3.0


def test_only_the_last_turn_counts_and_tokens_add_up(tmp_path):
  """By turn: the score after it, over the tokens of all turns up to it, summaries included."""
  rows = [
    graded("a", s, turn=t, tokens=100, summary_tokens=10) for t, s in ((2, 5), (1, 2), (3, 7))
  ]
  write(tmp_path, rows)
  library, _ = read(tmp_path)
  [run] = library.runs
  points = scores.by_turn(run)
  assert [(p["turn"], p["score"], p["tokens"]) for p in points] == [
    (1, 2, 110),
    (2, 5, 220),
    (3, 7, 330),
  ]
  assert scores.by_benchmark(run, library)[0]["score"] == 7


def test_of_two_rows_for_a_turn_the_later_counts(tmp_path):
  """As in evaluate.py: a turn that was asked for again replaces the torn attempt's."""
  write(tmp_path, [graded("a", 1, turn=1, sample=0), graded("a", 6, turn=1, sample=0)])
  library, _ = read(tmp_path)
  assert list(scores.means(library.runs[0].last()).values()) == [6]


def test_runs_of_one_file_are_told_apart(tmp_path):
  """A file with two scaffolds is two runs, named by what differs and by nothing else."""
  write(
    tmp_path / "e",
    [graded("a", 3, scaffold=s, model="m", judge="j") for s in ("direct", "rsa")],
  )
  library, _ = read(tmp_path)
  assert [run.label for run in library.runs] == ["e \u00b7 direct", "e \u00b7 rsa"]
  assert len(library.problems) == 1


def test_the_same_statement_is_the_same_problem(tmp_path):
  """Between runs, whatever the ids, the spaces, and whether the older run named its benchmark."""
  write(tmp_path / "a", [{"problem_id": "1", "problem": "Show  that\nx.", "score": 1}])
  new = {"problem_id": "2", "problem": "Show that x.", "score": 3, "benchmark": "B", "level": "4"}
  write(tmp_path / "b", [new])
  write(tmp_path / "c", [new | {"benchmark": "C"}])
  library, _ = read(tmp_path)
  assert [(p.benchmark, p.level) for p in library.problems] == [("B", "4"), ("C", "4")]
  pair = scores.paired(*library.runs[:2])
  assert (pair["score"], pair["problems"], pair["better"]) == (2.0, 1, 1)
  assert scores.paired(*library.runs[1:]) is None


@given(
  st.dictionaries(st.integers(0, 9), st.integers(0, 7) | st.none()),
  st.dictionaries(st.integers(0, 9), st.integers(0, 7) | st.none()),
)
@settings(max_examples=50, deadline=None)
def test_paired_differences_are_antisymmetric(first, second):
  """b - a is minus a - b, over the problems that both have graded, and the counts add up."""
  rows = lambda s: {  # noqa: E731
    (p, ""): [attempts.Row(1, None, v, None, 0, False, 0)] for p, v in s.items()
  }
  a, b = (attempts.Run("x", None, False, (), rows(s)) for s in (first, second))
  there, back = scores.paired(a, b), scores.paired(b, a)
  common = [p for p in first if first[p] is not None and second.get(p) is not None]
  assert (there is None) == (not common)
  if common:
    assert there["score"] == pytest.approx(-back["score"])
    assert there["score"] == pytest.approx(statistics.fmean(second[p] - first[p] for p in common))
    assert there["better"] + there["equal"] + there["worse"] == len(common) == there["problems"]
    assert there["better"] == back["worse"]
    assert there["low"] <= there["score"] + 1e-9 and there["score"] <= there["high"] + 1e-9


def test_a_judge_beside_people(tmp_path):
  """Errors in points, shares of equal and near grades, and the table of who gave what."""
  pairs = [(7, 7), (7, 6), (0, 0), (3, 6), (2, None)]
  rows = [graded("a", j, human_score=h, proof=f"proof {i}") for i, (h, j) in enumerate(pairs)]
  write(tmp_path, rows)
  library, _ = read(tmp_path)
  found = scores.calibration(library.runs[0])
  assert (found["n"], found["invalid"]) == (4, 1)
  assert (found["mae"], found["bias"], found["exact"], found["near"]) == (1.0, 0.5, 0.5, 0.75)
  assert found["counts"][7][6] == found["counts"][7][7] == found["counts"][3][6] == 1
  assert [(p["human"], p["score"]) for p in found["curve"]] == [(0, 0), (3, 6), (7, 6.5)]


def test_no_people_no_calibration(tmp_path):
  write(tmp_path, [graded("a", 3)])
  assert scores.calibration(read(tmp_path)[0].runs[0]) is None


def test_rollouts_of_training_are_attempts_of_their_step(tmp_path):
  """The same attempt of another step is another one; training is compared with nothing."""
  rows = [graded("a", s, step=s, attempt=0, turn=1) for s in (1, 2)]
  write(tmp_path / "sft", rows, "samples.jsonl")
  write(tmp_path / "eval", [graded("a", 4)])
  library, _ = read(tmp_path)
  assert [(run.label, run.training) for run in library.runs] == [
    ("eval", False),
    ("sft, training", True),
  ]
  assert len(library.runs[1].attempts) == 2
  assert scores.pairs(library.runs, []) == []


json_values = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: (
    st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
  ),
  max_leaves=4,
)
KEYS = (*sorted(viewer.SHOWN), "tokens", "summary_tokens", "cost", "other")


@given(st.lists(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=8), max_size=6))
@settings(max_examples=150, deadline=None)
def test_any_row_can_be_read_and_packed(tmp_path_factory, rows):
  """Whatever stands in the fields: no crash, every number finite, and no row without a place."""
  folder = tmp_path_factory.mktemp("run")
  write(folder, rows)
  library, _ = read(folder)
  for run in library.runs:
    scores.by_turn(run), scores.calibration(run), scores.by_benchmark(run, library)
  scores.pairs(library.runs, [])
  index = viewer.index(library)
  sources = viewer.sources(library)
  assert len(sources) == len(index["attempts"]["run"]) + len(library.problems)
  assert sum(len(t) for run in library.runs for t in run.attempts.values()) <= len(rows)
  for source in sources:
    packed = viewer.pack(viewer.text(source, longest=50))
    assert set(packed) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")
  json.dumps(index, allow_nan=False)


def test_a_file_that_has_changed_since_is_no_crash(tmp_path):
  """Rows are read again when they are shown: one that is gone by then is empty."""
  write(tmp_path, [graded("a", 3, proof="x")])
  library, _ = read(tmp_path)
  (tmp_path / "eval.jsonl").write_text("")
  [attempt, problem] = (viewer.text(source, None) for source in viewer.sources(library))
  assert attempt[0]["score"] is None and "proof" not in attempt[0]
  assert problem == {"statement": "", "rubric": "", "reference": "", "answer": ""}


def test_two_runs_have_two_names(tmp_path):
  """Folders of the same name are told apart by where they are."""
  for root in ("a", "b"):
    write(tmp_path / root / "eval", [graded("a", 3)])
  library, _ = read(tmp_path / "a", tmp_path / "b")
  assert [run.label for run in library.runs] == ["eval", "eval (b/eval)"]


def test_roots_inside_one_another_count_once(tmp_path):
  """runs/demo and runs/demo/eval name the same evaluation, which is read once."""
  write(tmp_path / "demo" / "eval", [graded("a", 3)])
  library, _ = read(tmp_path / "demo", tmp_path / "demo" / "eval")
  assert [run.label for run in library.runs] == ["eval"]


def test_pictures_stay_small_whatever_the_number_of_runs():
  """Forty runs on forty benchmarks make a picture of the first ones, not one as tall as a house."""
  interval = {"score": 3.0, "low": 2.0, "high": 4.0}
  rows = [{"run": f"r{i}", "benchmark": f"b{j}"} | interval for i in range(40) for j in range(40)]
  curves = {f"r{i}": [{"turn": 1, "tokens": 10.0 * i} | interval] for i in range(1, 40)}
  judge = {"counts": [[1] * 8] * 8, "curve": [{"human": 1} | interval]}
  judges = [judge | {"run": f"judge {i}"} for i in range(40)]
  for figure in (
    figures.by_benchmark(rows),
    figures.by_tokens(curves),
    figures.calibration(judges),
  ):
    assert figure.get_figheight() < 40
