"""Benchmark loaders: every published layout is read, faults are mended and told, none crashes."""

import json
import random

import imobench
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax.data import benchmarks, problems
from qed_jax.records import GradedProof, Problem

SCHEME = [
  {"title": "Bound", "desc": "Shows $n<5$.", "points": 3},
  {"title": "Cases", "desc": "Checks 1 to 4.", "points": 4},
]
FINE_PROOFS_RL = {"problem": "Prove A.", "source": "aops", "rubrics": "R", "scores": [7, 0]}
FINE_PROOFS_RL |= {"rewards": [1.0, 0.0], "num_rewards": 2, "reward_mean": 0.5, "reward_std": 0.5}
FINE_PROOFS_SFT = {"problem": "Prove A.", "reasoning_content": "t", "proof": "p", "messages": []}
FINE_PROOFS_SFT |= {"category": "algebra", "competition": "imo", "source": "aops"}
IMO_PROOFBENCH = {"Problem ID": "PB-Basic-001", "Problem": "Prove A.", "Solution": "S"}
IMO_PROOFBENCH |= {"Grading guidelines": "(Partial)", "Category": "Algebra", "Level": "IMO-easy"}
IMO_PROOFBENCH |= {"Short Answer": "$3$", "Source": "novel"}
HUB_PROOFBENCH = {"problem_id": "PB-1", "problem": "Prove A.", "solution": "S"}
HUB_PROOFBENCH |= {"grading_guidelines": "G"}
ANSWERBENCH = {"Problem ID": "a-1", "Problem": "Find A.", "Short Answer": "3"}
ANSWERBENCH |= {"Category": "Geometry", "Subcategory": "x", "Source": "ISL"}
GRADINGBENCH = {"Grading ID": "GB-1", "Problem ID": "PB-Advanced-001", "Problem": "Prove A."}
GRADINGBENCH |= {"Solution": "S", "Grading guidelines": "G", "Response": "try", "Points": "6"}
GRADINGBENCH |= {"Reward": "Almost", "Problem Source": "ISL"}
PROOFBENCH = {"problem_id": "IMO-1", "problem": "Prove A.", "generator": "o3"}
PROOFBENCH |= {"model_solution": "try", "reference_solution": "S", "expert_rating": 5}
PROOFBENCH |= {"marking_scheme": "M", "metadata": {}}
MATHARENA = {"problem_idx": 1, "problem": "Prove A.", "points": 7, "grading_scheme": SCHEME}
MATHARENA |= {"sample_solution": "S", "sample_grading": None, "problem_type": ["Algebra", "x"]}
MATHARENA_OUTPUTS = {"problem_idx": "1", "problem": "Prove A.", "model_name": "M1"}
MATHARENA_OUTPUTS |= {"answer": "thought</think>try", "points_judge_1": 6.0, "points_judge_2": 7.0}
MATHARENA_OUTPUTS |= {"max_points_judge_1": 7, "max_points_judge_2": 7, "all_messages": []}
IN_WORDS = {"solution": "S", "category": "Algebra, x"}
IN_WORDS |= {"rubric": "- [3 points] Bound: Shows $n<5$.\n- [4 points] Cases: Checks 1 to 4."}
HOW = {"revision": None, "split": "train", "max_bad_share": 1.0}


def write(path, rows):
  if path.suffix == ".parquet":
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  else:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.mark.parametrize(
  ("row", "expected"),
  [
    (FINE_PROOFS_RL, {"rubric": "R", "source": "aops"}),
    (FINE_PROOFS_SFT, {"category": "algebra", "source": "aops"}),
    (HUB_PROOFBENCH, {"id": "PB-1", "solution": "S", "rubric": "G"}),
    (PROOFBENCH, {"id": "IMO-1", "solution": "S", "rubric": "M"}),
    (
      IMO_PROOFBENCH,
      {"id": "PB-Basic-001", "solution": "S", "rubric": "(Partial)", "category": "Algebra"}
      | {"level": "IMO-easy", "answer": "$3$", "source": "novel"},
    ),
    (
      ANSWERBENCH,
      {"id": "a-1", "statement": "Find A.", "answer": "3", "category": "Geometry", "source": "ISL"},
    ),
    (
      GRADINGBENCH,
      {"id": "PB-Advanced-001", "solution": "S", "rubric": "G", "source": "ISL"},
    ),
    (MATHARENA, IN_WORDS),
    (MATHARENA | {"grading_scheme": json.dumps(SCHEME)}, IN_WORDS),
    (MATHARENA_OUTPUTS, {}),
  ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_published_columns_become_problems(tmp_path, row, expected, suffix):
  """Each published layout fills the fields it has, in JSONL and Parquet; no other text leaks in."""
  if suffix == ".parquet":
    row = {name: value for name, value in row.items() if value not in ({}, [])}
  [problem], report = benchmarks.load(write(tmp_path / f"x{suffix}", [row]), **HOW)
  expected = {"statement": "Prove A."} | expected
  if "id" not in expected:
    expected["id"] = problems.statement_id(expected["statement"])
  assert problem == Problem(**expected)
  assert report.bad == report.repaired == ()


@pytest.mark.parametrize(
  ("row", "proof", "score", "source"),
  [
    (GRADINGBENCH, "try", 6, "ISL"),
    (PROOFBENCH, "try", 5, "o3"),
    (MATHARENA_OUTPUTS, "try", 6, "M1"),
    (MATHARENA_OUTPUTS | {"points_judge_2": None}, "try", 6, "M1"),
    ({"problem": "Prove A.", "proof": "try", "score": 0}, "try", 0, ""),
  ],
)
def test_graded_proofs_are_read(tmp_path, row, proof, score, source):
  """The judged text, people's points and the author; of two graders the mean, rounded down."""
  [graded], _ = benchmarks.load_graded(write(tmp_path / "x.jsonl", [row]), **HOW)
  assert isinstance(graded, GradedProof)
  assert (graded.proof, graded.score, graded.source) == (proof, score, source)
  assert graded.problem.statement == "Prove A." and graded.problem.answer == ""


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"score": 55}, "score is 55, not one of 0 to 7: bring the scores to the seven-point scale"),
    ({"score": -1}, "not one of 0 to 7"),
    ({"score": 3.5}, "not one of 0 to 7"),
    ({"score": "high"}, "not a number"),
    ({"points_judge_1": 3, "max_points_judge_1": 10}, "max_points_judge_1 is 10: scores have to"),
  ],
)
def test_another_scale_is_a_bad_row(tmp_path, change, message):
  """Points out of 10 or 100 are not taken for points out of 7."""
  row = {"problem": "p", "proof": "q", "score": 7}
  path = write(tmp_path / "x.jsonl", [row, row | change])
  kept, report = benchmarks.load_graded(path, **HOW)
  assert len(kept) == 1 and message in report.bad[0].why
  with pytest.raises(ValueError, match="1 of 2 rows") as error:
    benchmarks.load_graded(path, **HOW | {"max_bad_share": 0.4})
  assert "\n" not in str(error.value)


def test_rows_without_a_grade_are_filtered_not_zero(tmp_path):
  """What nobody graded is neither bad nor a 0."""
  row = {"problem": "p", "proof": "q"}
  values = [row | {"score": s} for s in (7, None, float("nan"), "")]
  kept, report = benchmarks.load_graded(write(tmp_path / "x.jsonl", values), **HOW)
  assert [g.score for g in kept] == [7] and report.filtered == 3 and report.bad == ()


def test_several_proofs_of_a_problem_are_one_problem(tmp_path):
  """Repeated statements are filtered; one id for two statements is a bad row."""
  values = [{"problem": "a"}, {"problem": "a"}, {"problem": "b", "id": "1"}]
  values += [{"problem": "b", "id": "1"}, {"problem": "c", "id": "1"}]
  kept, report = benchmarks.load(write(tmp_path / "x.jsonl", values), **HOW)
  assert [p.statement for p in kept] == ["a", "b"]
  assert (report.filtered, [bad.row for bad in report.bad]) == (2, [5])


@pytest.mark.parametrize(
  ("loader", "row", "message"),
  [
    (benchmarks.load, {"text": "p"}, r"among its columns \(text\): rename the statement's column"),
    (
      benchmarks.load_graded,
      {"problem": "p", "x": 1},
      r"no score among its columns \(problem, x\)",
    ),
    (benchmarks.load, {"problem": "p", "grading_scheme": SCHEME[:1]}, "add up to 3 points, not 7"),
    (benchmarks.load, None, "no row of .* is left"),
  ],
)
def test_unusable_files_stop_in_one_line(tmp_path, loader, row, message):
  """Unknown columns, schemes that do not add up and empty files are named, with what to do."""
  path = write(tmp_path / "x.jsonl", [row] * 3 if row else [])
  with pytest.raises(ValueError, match=message) as error:
    loader(path, **HOW | {"max_bad_share": 0.5})
  assert "\n" not in str(error.value)


def test_a_ragged_row_is_mended_only_where_its_fault_is_known(tmp_path):
  """The glued answer comes apart and is reported; other ragged rows stay bad."""
  (tmp_path / "x.csv").write_text(
    "Problem ID,Problem,Short Answer,Category\n"
    'a,"Find $Y$.\n,$Y=3$""",Algebra\n'
    'b,"No answer here""",Algebra\n'
    "c,Find Z.,$\\frac{1}{2},Algebra\n"
    "d,Find W.,costs $5,Algebra,more\n"
    "e,Find V.,$5,Algebra\n"
  )
  kept, report = benchmarks.load(tmp_path / "x.csv", **HOW)
  found = {p.id: (p.statement, p.answer, p.category) for p in kept}
  assert found == {
    "a": ("Find $Y$.", "$Y=3$", "Algebra"),
    "c": ("Find Z.", "$\\frac{1}{2}$", "Algebra"),
    "e": ("Find V.", "$5", "Algebra"),
  }
  assert [fault.row for fault in report.repaired] == [1, 3]
  assert [fault.row for fault in report.bad] == [2, 4]


def test_real_answerbench():
  """All 400 problems have statement and answer; the three known faults are mended and told."""
  kept, report = benchmarks.load(imobench.file("answerbench_v2.csv"), **HOW | {"max_bad_share": 0})
  assert len(kept) == 400 and all(p.statement and p.answer and p.category for p in kept)
  assert [fault.row for fault in report.repaired] == [36, 97, 296]
  assert kept[35].answer == "$Y(x)=A+\\frac{B}{x}-x$" and "Y(x)=A" not in kept[35].statement
  assert kept[295].answer == "$\\frac{7}{18}$"
  counts = {c: sum(p.category == c for p in kept) for c in {p.category for p in kept}}
  assert counts == dict.fromkeys(["Algebra", "Combinatorics", "Geometry", "Number theory"], 100)


def test_real_proofbench():
  """60 problems with reference, guidelines and level; 33 of them have no short answer."""
  kept, report = benchmarks.load(imobench.file("proofbench_v2.csv"), **HOW | {"max_bad_share": 0})
  assert len(kept) == 60 and report.repaired == ()
  assert all(p.solution and p.rubric and p.level and p.category for p in kept)
  assert sum(not p.answer for p in kept) == 33


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
  max_leaves=4,
)
NAMES = [*{n for names in problems.COLUMNS.values() for n in names}, *benchmarks.POINTS]
NAMES += [*benchmarks.PROOF, "points_judge_1", "max_points_judge_1", "points_judge_2"]


@settings(deadline=None, max_examples=150)
@given(st.lists(JSON | st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6), max_size=6))
def test_any_json_is_counted(tmp_path_factory, values):
  """Whatever the rows hold, both loaders count each of them and nothing else is raised."""
  path = write(tmp_path_factory.mktemp("any") / "x.jsonl", values)
  for loader in (benchmarks.load, benchmarks.load_graded):
    try:
      kept, report = loader(path, **HOW)
    except ValueError as error:
      assert "no row of" in str(error) and "\n" not in str(error)
      continue
    assert report.read == len(values) == report.kept + report.filtered + len(report.bad)
    assert report.kept == len(kept)


def test_ten_thousand_malformed_rows_are_counted(tmp_path):
  """Rows damaged in ten ways: no crash, every row in the account, the one good row kept."""
  rng = random.Random(0)
  rows = [GRADINGBENCH, PROOFBENCH, MATHARENA_OUTPUTS, MATHARENA, FINE_PROOFS_RL]

  def damage(row):
    name = rng.choice(sorted(row))
    text = json.dumps(row)
    return rng.choice([
      lambda: text[: rng.randrange(1, len(text) - 1)],
      lambda: text.replace('"', "", 1),
      lambda: json.dumps(list(row.values())),
      lambda: json.dumps({n: v for n, v in row.items() if n.lower() != "problem"}),
      lambda: json.dumps(row | {"problem": None, "Problem": " "}),
      lambda: json.dumps(row | {"problem": {"a": name}, "Problem": 1.5}),
      lambda: json.dumps(row | {"problem": "\ud800", "Problem": "\udfff"}),
      lambda: json.dumps(row | {"Points": "x", "expert_rating": [], "points_judge_1": "y"})[1:],
      lambda: "\x00" * rng.randrange(1, 9),
      lambda: "[" * rng.randrange(1, 3_000),
    ])()  # fmt: skip

  lines = [json.dumps(GRADINGBENCH)] + [damage(rng.choice(rows)) for _ in range(10_000)]
  path = tmp_path / "x.jsonl"
  path.write_text("\n".join(lines))
  for loader in (benchmarks.load, benchmarks.load_graded):
    kept, report = loader(path, **HOW)
    assert (len(kept), report.read, len(report.bad)) == (1, 10_001, 10_000)
    assert [bad.row for bad in report.bad] == list(range(2, 10_002))
