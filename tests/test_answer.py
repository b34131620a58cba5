"""The final answer: found in the text, compared as mathematics, and never a way to run code."""

import asyncio
import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax.records import Problem
from qed_jax.rewards import answer

FOUND = [
  (r"so \boxed{3}.", "3"),
  (r"\boxed{1} but no, \boxed{2}", "2"),
  (r"\boxed{\frac{1}{2}} and {more}", r"\frac{1}{2}"),
  (r"\boxed {\{1, 2\}}", r"\{1, 2\}"),
  (r"\boxed{\text{a} \boxed{5}}", "5"),
  (r"\boxed{7} then cut in \boxed{\frac{1}{", "7"),
  (r"a stray } and \boxed{4}", "4"),
  (r"\boxed{}", ""),
  ("no box {3}", None),
  (r"\boxed 3", None),
  ("", None),
]


@pytest.mark.parametrize("text, expected", FOUND)
def test_last_balanced_box_is_the_answer(text, expected):
  assert answer.boxed(text) == expected


@given(st.text(alphabet="\\boxed{}3 ", max_size=200))
def test_any_text_is_searched_without_error(text):
  found = answer.boxed(text)
  assert found is None or found in text


@settings(max_examples=20)
@given(st.recursive(st.sampled_from(["1", "x", r"\}"]), lambda s: s.map("{{{}}}".format)))
def test_balanced_answer_comes_back(inner):
  assert answer.boxed(rf"\boxed{{0}} \boxed{{{inner}}} }} {{") == inner


def test_search_is_linear_in_hostile_text():
  """A quadratic search takes hours here, and the suite's time limit ends it."""
  assert answer.boxed(r"\boxed{" * 200_000) is None


@pytest.fixture(scope="module")
def checker():
  checker = answer.Checker(seconds=20)
  yield checker
  checker.close()


def problem(gold: str) -> Problem:
  return Problem(id="p1", statement="What is it?", answer=gold)


SCORES = [
  (r"\boxed{\frac{1}{2}}", "0.5", 7),
  (r"\boxed{0.5}", r"$\frac12$", 7),
  (r"\boxed{1+x}", "$x+1$.", 7),
  (r"\boxed{3, 1, 2}", r"\{1,2,3\}", 7),
  (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 7),
  (r"\boxed{4}", "3", 0),
  (r"\boxed{}", "3", 0),
  ("It is 3.", "3", 0),
  (r"\boxed{" + "1" * 3000 + "}", "3", 0),
  (r"\boxed{}}{", "3", 0),
  (r"\boxed{3}", "", None),
  (r"\boxed{3}", r"it \underbrace{depends", None),
]


@pytest.mark.parametrize("proof, gold, score", SCORES)
def test_answers_are_compared_as_mathematics(checker, proof, gold, score):
  """7 if equal, 0 if not or not given, None when the known answer says nothing."""
  grade = asyncio.run(answer.grade(problem(gold), proof, checker))
  assert grade.score == score
  assert grade.reason.split(":")[0] in ("graded", "empty", "failed")


def test_other_threads_may_ask(checker):
  """math-verify alone refuses: its time limit needs the main thread."""
  verdicts = []
  asks = [("3", "3"), ("3", "4"), ("x", "x"), ("x", "y")]
  threads = [
    threading.Thread(target=lambda a=a, g=g: verdicts.append((a, g, checker.compare(a, g))))
    for a, g in asks
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(verdicts) == [(a, g, "equal" if a == g else "different") for a, g in sorted(asks)]


def test_answer_that_computes_for_ever_is_no_zero():
  """The worker is ended, which no Python-level alarm could do, and a new one takes over."""
  checker = answer.Checker(seconds=1)
  try:
    grade = asyncio.run(answer.grade(problem("3"), r"\boxed{9^{9^{9^{9}}}}", checker))
    assert grade.score is None and "more than 1 s" in grade.reason
    assert checker.compare("3", "3") == "equal"
  finally:
    checker.close()


@pytest.mark.parametrize("code", ["__import__('pathlib').Path('{}').touch()", "open('{}','w')"])
def test_answers_are_not_run_as_code(checker, tmp_path, code):
  path = tmp_path / "touched"
  for text in (code.format(path), f"({code.format(path)})", f"lambda: {code.format(path)}"):
    checker.compare(text, "3")
    checker.compare("3", text)
  assert not path.exists()


def test_worker_sees_no_secret(monkeypatch, tmp_path):
  """What untrusted text can reach holds no environment, so no keys."""
  worker = tmp_path / "worker.py"
  worker.write_text(
    "import json, os\nprint('ready', flush=True)\ninput()\nprint(json.dumps(dict(os.environ)))\n"
  )
  monkeypatch.setattr(answer, "_WORKER", worker)
  monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
  checker = answer.Checker(seconds=20)
  assert "secret" not in json.dumps(checker.compare("3", "3"))
  checker.close()


def test_worker_that_cannot_start_says_what_to_install(monkeypatch, tmp_path):
  worker = tmp_path / "worker.py"
  worker.write_text("import no_such_module")
  monkeypatch.setattr(answer, "_WORKER", worker)
  with pytest.raises(RuntimeError, match="pip install math-verify"):
    answer.Checker(seconds=20).compare("3", "3")


@pytest.mark.parametrize("gone", [False, True], ids=["dying", "gone"])
def test_dead_worker_is_a_failure_and_then_replaced(checker, gone):
  """Whether it dies while it is asked or was dead before, when its pipe is broken."""
  checker.compare("3", "3")
  checker._process.kill()
  if gone:
    checker._process.wait()
  assert checker.compare("3", "3").startswith("failed")
  assert checker.compare("3", "3") == "equal"
