"""Near-duplicates are found however they are written; unrelated problems are left alone."""

import random

import imobench
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax.data import benchmarks
from qed_jax.data import decontamination as d

PROBLEM = (
  r"Determine all functions $f: \mathbb{Z} \to \mathbb{Z}$ such that, for all $x, y \in"
  r" \mathbb{Z}$, we have \[ f(2x)+2f(y)=f(f(x+y)).\]"
)
OTHERS = [
  r"Let $ABC$ be an acute triangle with circumcentre $O$. Prove that $AO \perp EF$, where $E$ and"
  r" $F$ are the feet of the altitudes from $B$ and $C$.",
  r"Show that $x^2 + y^2 + z^2 + t^2 \ge xyzt$ for any positive real numbers $x, y, z, t$ that"
  r" satisfy $2(x + y + z + t) \ge xyzt$.",
  r"A $2024 \times 2024$ board is tiled with dominoes. Find the least number of dominoes to be"
  r" removed so that no three of the rest are in a row.",
]
HOW = {"threshold": 0.45}


def index(*texts):
  return d.Index([(str(i), text) for i, text in enumerate(texts)], n=4)


@pytest.mark.parametrize(
  ("one", "other"),
  [
    (r"$a \leq b$", "a ≤ b."),
    (r"\(\dfrac{a}{b}\)", r"$$\tfrac{a}{b}$$"),
    (r"\left( x \right)", "(x)"),
    ("Prove  THAT\n\n$x$", "prove that x"),
    (r"f : \mathbb{R} \rightarrow \mathbb{R}", r"$f:\mathbf{R}\to\mathbf{R}$"),
    (r"$a_1, \ldots, a_n$", r"a_{1},\dots,a_{n}"),
    ("ﬁnd ½", "find 1⁄2"),
    (r"\angle ABC = 90^\circ", "∠ABC = 90°"),
  ],
)  # fmt: skip
def test_type_setting_is_normalised_away(one, other):
  """Statements that read alike have the same tokens."""
  assert d.normalise(one) == d.normalise(other)


@pytest.mark.parametrize(
  ("one", "other"), [("a < b", "a > b"), ("x^2+1", "x^2-1"), ("n=12", "n=13"), ("f(x)", "g(x)")]
)
def test_what_means_another_thing_stays_apart(one, other):
  assert d.normalise(one) != d.normalise(other)


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_tokens_stand_where_they_say(text):
  """Positions rise and lie in the text, and normalising what is normalised changes nothing."""
  found = d.tokens(text)
  spans = [(token.start, token.end) for token in found]
  assert spans == sorted(spans) and all(0 <= a < b <= len(text) for a, b in spans)
  assert all(token.text and " " not in token.text for token in found)


def renamed(text):
  return text.replace("f(", "g(").replace("$f", "$g").replace("x", "a").replace("y", "b")


@pytest.mark.parametrize(
  ("planted", "kind"),
  [
    (PROBLEM, "exact"),
    (PROBLEM.replace("functions", "FUNCTIONS").replace("x", "X"), "exact"),
    ("(IMO 2019, modified) " + PROBLEM + " Justify your answer.", "exact"),
    (renamed(PROBLEM), "fuzzy"),
    (PROBLEM.replace("Determine all functions", "Find every function") + " Good luck!", "fuzzy"),
    ("Solve this: " + PROBLEM.replace("we have", "one gets") + " Then find f(5).", "fuzzy"),
  ],
)  # fmt: skip
def test_planted_near_duplicates_are_found(planted, kind):
  """Copies, quotations, renamed variables and reworded openings, with the passage they share."""
  match = index(*OTHERS, PROBLEM).match(planted, **HOW)
  assert match is not None and (match.id, match.kind) == ("3", kind)
  assert match.passage in planted and len(match.passage) > 10
  assert 0.45 <= match.score <= 1 and (kind == "fuzzy" or match.score == 1)


def test_unrelated_problems_are_left_alone():
  for i, text in enumerate(OTHERS):
    assert index(PROBLEM, *(t for j, t in enumerate(OTHERS) if j != i)).match(text, **HOW) is None
  assert index(PROBLEM).match("", **HOW) is None
  assert index().match(PROBLEM, **HOW) is None


def test_a_short_statement_inside_of_another_is_no_match():
  """A phrase such as "find n" stands in many a problem."""
  short = "Find all positive integers $n$."
  assert index(short).match(f"{short} {OTHERS[2]}", **HOW) is None
  assert index(f"{short} {OTHERS[2]}").match(short, **HOW) is None


def test_common_phrases_weigh_little():
  """What most of the indexed statements begin with makes no match of two of them."""
  start = "Find all functions f from the real numbers to the real numbers such that for all "
  tails = ["apples we see them grow in rows of seven", "pears fall down in every garden at night"]
  tails += ["red cherries have no stone but two", "plums rhyme with nothing that I know of"]
  many = index(*(start + tail for tail in tails))
  assert many.match(start + "melons float on water until they sink", **HOW) is None
  assert many.match(start + tails[2] + "!", **HOW).kind == "exact"


WORDS = st.sampled_from(
  "let be a triangle with circle through points prove that angle sum n".split()
)


@settings(deadline=None)
@given(st.lists(st.lists(WORDS, min_size=8, max_size=20), min_size=1, max_size=6), st.data())
def test_a_copy_is_always_found(texts, data):
  """Any indexed statement of enough tokens is matched exactly, alone and inside of other words."""
  found = index(*(" ".join(words) for words in texts))
  words = data.draw(st.sampled_from(texts))
  assert found.match(" ".join(words), **HOW).kind == "exact"
  if len(words) >= d.MIN_CONTAINED:
    longer = "Consider this. " + " ".join(words) + " Explain."
    assert found.match(longer, **HOW).kind == "exact"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=40), max_size=5), st.text(max_size=60))
def test_any_text_is_compared(texts, text):
  """No text crashes it; a match has a score between threshold and 1 and a passage of the text."""
  match = index(*texts).match(text, **HOW)
  assert match is None or (0.45 <= match.score <= 1 and match.passage in text)


@pytest.fixture(scope="module")
def real():
  files = [imobench.file(name) for name in ("answerbench_v2.csv", "proofbench_v2.csv")]
  how = {"revision": None, "split": "train", "max_bad_share": 0}
  return [p for file in files for p in benchmarks.load(file, **how)[0]]


def test_precision_on_unrelated_real_problems(real):
  """Among all 105,570 pairs of 460 benchmark problems none is matched at the config's threshold."""
  found, matches = d.Index([], n=4), []
  for problem in real:
    matches += [m for m in [found.match(problem.statement, **HOW)] if m]
    found.add(problem.id, problem.statement)
  assert matches == [], [(m.id, m.score, m.passage) for m in matches]


def test_recall_on_edited_real_problems(real):
  """With a tenth of their words changed at least 94 % of 460 problems are matched to themselves."""
  rng, found = random.Random(0), d.Index([(p.id, p.statement) for p in real], n=4)

  def edited(text):
    words = text.split(" ")
    for i in range(len(words)):
      if rng.random() < 0.1:
        words[i] = rng.choice(["", f"indeed {words[i]}", "therefore"])
    return " ".join(words)

  hits = [found.match(edited(p.statement), **HOW) for p in real]
  right = sum(m is not None and m.id == p.id for m, p in zip(hits, real, strict=True))
  assert right >= 0.94 * len(real)
