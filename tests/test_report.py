"""report.html: whole, self-contained, and deaf to whatever a model wrote into its text."""

import base64
import hashlib
import html.parser
import json
import re

import matplotlib
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qed_jax import report
from qed_jax.reporting import examples, figures, reading, results, training
from qed_jax.reporting import page as page_lib
from qed_jax.reporting.attempts import Row

ALLOWED = {
  "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "h4", "nav", "a",
  "main", "p", "span", "figure", "figcaption", "img", "div", "table", "caption", "thead", "tbody",
  "tr", "th", "td", "details", "summary", "pre", "noscript", "section", "form", "label", "input",
  "select", "option", "output", "article", "script",
}  # fmt: skip
ATTRIBUTES = {
  "lang", "charset", "http-equiv", "content", "name", "id", "class", "href", "src", "alt", "scope",
  "tabindex", "role", "aria-label", "open", "type", "value", "placeholder", "autocomplete", "for",
  "hidden",
}  # fmt: skip
PAYLOADS = [
  "<script>alert(1)</script>",
  "</pre></td></table><script>alert(1)</script>",
  "</style><script>alert(1)</script>",
  "</title><img src=x onerror=alert(1)>",
  '"><svg onload=alert(1)>',
  "' onmouseover='alert(1)",
  '" onfocus="alert(1)" autofocus tabindex="1',
  "<img src='http://evil.example/x.png'>",
  "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
  "<a href='javascript:alert(1)'>proof</a>",
  "<meta http-equiv=refresh content='0;url=http://evil.example'>",
  "<base href='http://evil.example/'>",
  "<form action='http://evil.example'><input name=a></form>",
  "<link rel=stylesheet href='http://evil.example/x.css'>",
  "<object data='data:text/html,<script>alert(1)</script>'>",
  "<details open ontoggle=alert(1)>",
  "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
  "<!--><script>alert(1)</script-->",
  "<![CDATA[<script>alert(1)</script>]]>",
  "&lt;script&gt;alert(1)&lt;/script&gt;",
  "&#60;script&#62;alert(1)",
  "{{ 7 * 7 }}{% for x in [] %}",
  "{{ ''.__class__.__mro__ }}",
  "\\href{javascript:alert(1)}{x}",
  "$\\frac{1}{",
  "<scr\x00ipt>alert(1)</scr\x00ipt>",
  "\u202e<script>\u202c",
  "\ud800<script>",
  "<\uff53cript>alert(1)</script>",
  "<style>*{background:url(http://evil.example)}</style>",
  "`${alert(1)}`",
  "--><script>alert(1)</script><!--",
]  # fmt: skip


LIVE = {"index": "", "texts": ""}


class Page(html.parser.HTMLParser):
  """What a browser would be told: tags with their attributes, and the text outside of them."""

  def __init__(self, page: str):
    super().__init__(convert_charrefs=True)
    self.tags, self.text, self.inside = [], [], []
    self.feed(page)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    self.inside.append(tag)

  def handle_endtag(self, tag):
    while self.inside and self.inside.pop() != tag:
      pass

  def handle_data(self, data):
    if self.inside[-1:] not in (["style"], ["script"]):
      self.text.append(data)

  def handle_comment(self, data):
    self.tags.append(("comment", {"data": data}))

  def unknown_decl(self, data):
    self.tags.append(("declaration", {"data": data}))

  def values(self, attribute):
    return [a[attribute] for _, a in self.tags if attribute in a]


def lines(path, rows):
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def make_run(folder, stage, *, steps=30, text="a = 3 + 4 = 7"):
  """A training run as train.py leaves it, its numbers a formula of the step."""
  folder.mkdir(parents=True)
  lines(
    folder / "metrics.jsonl",
    [
      {
        "step": s,
        "time": 1e9 + s,
        "loss": 2.5 / (1 + s / 9),
        "grad_norm": 1 + (s * 7919 % 13) / 10,
        "reward/mean": 2 + 4 * s / (s + 9),
        "reward/turn_1": 1.5 + 3 * s / (s + 9),
        "reward/turn_2": 2.5 + 4 * s / (s + 9),
        "tokens_per_s/sample": 9_000 + s,
        "tokens_per_s/train": 200 + s,
        "dead_group_share": 0.4 / (1 + s),
      }
      for s in range(steps)
    ],
  )
  lines(
    folder / "samples.jsonl",
    [
      {
        "step": s,
        "problem": f"problem {p}: {text}",
        "rubric": f"2 points for a. {text}",
        "messages": [{"role": "user", "content": f"prove it. {text}"}],
        "summary": "" if turn == 1 else f"so far: {text}",
        "reasoning": f"thinking. {text}",
        "proof": f"proof of {p}. {text}",
        "score": None if (p, turn) == (2, 1) else min(7, p + 2 * turn),
        "turn": turn,
        "finish_reason": "length" if turn == 1 else "stop",
        "reason": f"judged: {text}",
      }
      for s in (0, steps - 1)
      for p in range(4)
      for turn in (1, 2, 3)
    ],
  )
  config = {"job": stage, "optimizer": {"lr": 0.003}, "seed": 0, "note": text}
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "env.json").write_text(json.dumps({"jax": "0.10.2", "device": f"cpu {text}"}))


def make_evaluation(folder, label, level, turns, *, text="a = 7"):
  """An evaluation as evaluate.py leaves it; `level` raises its scores."""
  folder.mkdir(parents=True)
  at = [min(7.0, 0.3 + 1.6 * level + 0.25 * t) for t in range(turns)]
  ends = [{"turn": t + 1, "score": s, "low": s - 0.2, "high": s + 0.2} for t, s in enumerate(at)]
  summary = {
    "label": label,
    "scaffold": "reasoning_cache",
    **ends[-1],
    "turns": turns,
    "by_turn": ends,
    "by_length": [{**ends[-1], "length": n, "single_pass": ends[0]} for n in ("2", "6", text)],
    "n": 200,
    "invalid": 0,
    "missing": 1,
    "truncated": 0.25,
    "tokens_per_turn": 31.5,
  }
  (folder / "eval_summary.json").write_text(json.dumps({"rows": [summary]}))
  words = ("summary", "reasoning", "proof", "summary_after", "feedback", "reason")
  rows = [
    {
      "problem_id": f"p{p}",
      "problem": f"problem {p} {text}",
      "rubric": text,
      "sample": 0,
      "turn": t + 1,
      "score": min(7, p + t),
      "finish_reason": "stop",
      **dict.fromkeys(words, text),
    }
    for p in range(5)
    for t in range(turns)
  ]
  lines(folder / "eval.jsonl", rows)


def make_workdir(folder, text="a = 3 + 4 = 7"):
  for stage in ("cache_rl", "rl", "sft"):
    make_run(folder / stage, stage, text=text)
  models = {"untrained": 1, "sft": 1, "rl": 1, "cache_rl": 6}
  for level, (name, turns) in enumerate(models.items()):
    make_evaluation(folder / "evaluate" / name, f"the {name} model", level, turns, text=text)
  return folder


def made(workdir) -> str:
  report.main([f"--workdir={workdir}"])
  return (workdir / "report.html").read_text()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return make_workdir(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(workdir):
  return made(workdir)


def digest(text: str) -> str:
  return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def violations(page: str) -> list[str]:
  """Everything live in the page that the template did not mean to be there."""
  scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.S)
  found = [
    f"script {text[:20]}"
    for kind, text in scripts
    if text not in page_lib.scripts()
    and not ("octet-stream" in kind and re.fullmatch(r"[\w+/=]*", text))
  ]
  for tag, attributes in Page(page).tags:
    if tag not in ALLOWED:
      found.append(f"<{tag}>")
    found += [f"<{tag} {a}>" for a in attributes if a not in ATTRIBUTES]
    if not re.fullmatch(r"#[\w-]+", attributes.get("href", "#x")):
      found.append(f"href={attributes['href']}")
    if not re.fullmatch(
      r"data:image/svg\+xml;base64,[\w+/=]+", attributes.get("src", "data:image/svg+xml;base64,x")
    ):
      found.append("src")
  return found


def test_stages_come_in_the_order_of_training(page):
  """sft, rl, cache_rl, whatever the order of the folders' names."""
  headings = re.findall(r'<h2 id="stage-\d">(\w+)</h2>', page)
  assert headings == ["sft", "rl", "cache_rl"]
  [scores] = re.findall(r'aria-label="Table of scores">.*?</table>', page, re.S)
  labels = re.findall(r'<th scope="row">the (\w+) model</th>', scores)
  assert labels == ["untrained", "sft", "rl", "cache_rl"]


def test_scores_and_texts_are_on_the_page(page):
  """Each score with its interval, each kind of text, each grade, config and versions."""
  text = " ".join(" ".join(Page(page).text).split())
  scores = ("6.35 [6.15, 6.55]", "5.10 · 5.35 · 5.60", "not graded", "cut at the budget")
  texts = ("Summary so far", "Reasoning", "Summary written", "optimizer.lr", "0.003", "0.10.2")
  for piece in scores + texts:
    assert piece in text, piece
  assert "is not there" not in text


def test_turns_are_columns(page):
  """An example has a column for each turn of its problem, in the order of the turns."""
  tables = re.findall(r'<table class="turns[^"]*">.*?</table>', page, re.S)
  assert tables
  columns = [re.findall(r"<th scope=\"col\">Turn (\d)", t) for t in tables]
  assert ["1", "2", "3"] in columns and ["1", "2", "3", "4", "5", "6"] in columns


def test_one_file_and_no_network(page):
  """No address but its own anchors and data, and the policy admits the one style sheet by hash."""
  assert violations(page) == []
  [policy] = [v for v in Page(page).values("content") if "default-src" in v]
  style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
  scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
  assert len(scripts) == 3 and "The MIT License" in scripts[0]
  assert policy == (
    f"default-src 'none'; img-src data:; style-src '{digest(style)}'; "
    f"script-src {' '.join(map(repr, map(digest, scripts)))}; style-src-attr 'unsafe-inline'; "
    "require-trusted-types-for 'script'; trusted-types 'none'; base-uri 'none'; form-action 'none'"
  )
  assert "://" not in style
  anchors = {v.removeprefix("#") for v in Page(page).values("href")}
  assert anchors <= set(Page(page).values("id"))


def test_without_proofs_there_is_no_script(tmp_path):
  """A report of curves alone needs none, and its policy admits none."""
  make_run(tmp_path / "sft", "sft")
  (tmp_path / "sft" / "samples.jsonl").unlink()
  page = made(tmp_path)
  assert violations(page) == []
  assert "<script" not in page and "script-src" not in page and "noscript" not in page


def test_the_allow_list_sees_live_text(page):
  """The check of this file would notice a text that was not escaped."""
  for payload in (
    "<script>alert(1)</script>",
    "<script type='application/octet-stream'>alert(1)</script>",
    "<p onclick=x>",
    "<a href='javascript:x'>",
    "<!-- -->",
  ):
    assert violations(page.replace("</main>", f"{payload}</main>"))


@pytest.mark.parametrize("wrap", ["{0}", "Let n = 1. {0}", "</think>{0}</think>", "{0}\n{0}"])
def test_payloads_stay_text(tmp_path, wrap):
  """Markup in every field of every file, names included, is shown and never live."""
  texts = [wrap.format(payload) for payload in PAYLOADS]
  make_run(tmp_path / "sft", texts[0], steps=2, text="".join(texts))
  metrics = [{"step": 1, **{f"{text}/a": 1.0 for text in texts}}]
  lines(tmp_path / "sft" / "metrics.jsonl", metrics)
  (tmp_path / "sft" / "config.json").write_text(json.dumps({t: {t: t} for t in texts}))
  for number, text in enumerate(texts):
    make_evaluation(tmp_path / str(number), text, 2, 3, text=text)
  page = made(tmp_path)
  assert violations(page) == []
  shown = "".join(Page(page).text)
  for text in texts:
    assert reading.UNSEEN.search(text) or shown.count(text) > 8, text


@given(text=st.text(max_size=40) | st.text(alphabet="<>\"'&/=-! scriptonload{}%", max_size=40))
@settings(
  max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_stays_text(text):
  """Whatever the characters, an example's text adds no tag to the page."""
  row = {
    "problem": text,
    "rubric": text,
    "reasoning": text,
    "proof": text,
    "score": text,
    "turn": text,
  }
  shown = examples.example("best", [row, {**row, "messages": [{"role": text, "content": text}]}])
  page = page_lib.render(LIVE, title=text, parts=(), notes=[text], groups=[(text, [shown])])
  assert violations(page) == []


@pytest.mark.parametrize(
  "absent",
  ["metrics.jsonl", "samples.jsonl", "config.json", "env.json", "eval.jsonl", "eval_summary.json"],
)
def test_an_absent_file_is_named(tmp_path, absent):
  """The rest of the report stands, and says which file is not there."""
  workdir = make_workdir(tmp_path / "demo")
  for path in workdir.rglob(absent):
    path.unlink()
  assert f"{absent} is not there" in made(workdir)


def test_an_empty_folder_is_reported_as_such(tmp_path):
  """No run, no evaluation, no picture: a page that says so."""
  page = made(tmp_path)
  assert "nothing here was trained" in page
  assert not (tmp_path / "score_by_turn.png").exists()


def test_no_grade_at_all_is_no_point(tmp_path):
  """A turn, a length or a whole evaluation without a grade is left out and named."""
  make_evaluation(tmp_path / "a", "half", 1, 3)
  path = tmp_path / "a" / "eval_summary.json"
  [row] = json.loads(path.read_text())["rows"]
  row["by_turn"][1]["score"] = row["by_length"][0]["score"] = None
  path.write_text(json.dumps({"rows": [row, {**row, "score": None}]}))
  notes = []
  [result] = results.read([tmp_path], notes)
  assert [p["turn"] for p in result["by_turn"]] == [1, 3]
  assert [p["length"] for p in result["by_length"]] == ["6", "a = 7"]
  assert notes == ["a/eval_summary.json: a row without a score left out."]


def test_broken_lines_are_counted(tmp_path):
  """A line cut by a kill, and one that is no object, cost themselves only."""
  make_run(tmp_path / "sft", "sft", steps=5)
  with (tmp_path / "sft" / "metrics.jsonl").open("a") as f:
    f.write('[1]\n{"step": 5, "loss": NaN}\n')
    f.write('{"step": 5, "loss": null, "not_finite": {"loss": "nan"}}\n{"step": 6, "lo')
  page = made(tmp_path)
  assert "metrics.jsonl: 2 unreadable lines left out." in page
  assert "loss: 2 value(s) not finite" in page
  assert "Last step 4" in page


def test_a_step_logged_twice_counts_once():
  """After a resume the later line of a step is the one that is drawn."""
  rows = [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 2, "a": 5}, {"step": 0, "a": 0.5}]
  assert training.curves(rows, []) == {"a": ([0, 1, 2], [0.5, 1, 5])}


def test_an_axis_of_powers_is_written_in_plain_numbers():
  """Labels are text, never mathematics, so that no model can draw with them: ticks follow."""
  with matplotlib.rc_context({**figures.STYLE, "svg.fonttype": "none"}):
    made = figures.panel("seconds", {"data": ([1, 2], [1e-3, 2e-3]), "train": ([1, 2], [0.1, 0.3])})
  svg = base64.b64decode(made["src"].partition(",")[2]).decode()
  assert ">0.01</text>" in svg and "math" not in svg


def test_values_that_are_no_numbers_are_no_curves():
  """Text, truth values, lists and other people's keys do not become lines."""
  rows = [{"step": 1, "a": "x", "b": True, "c": [1], "d": None, "time": 3.0, "e": 1}, {"e": 2}]
  assert training.curves(rows, []) == {"e": ([1], [1])}


def test_an_outage_is_not_a_zero():
  """No score is shown as no score; a zero is a zero."""
  assert examples.badge({"score": None}) == {"text": "not graded", "kind": "none"}
  assert examples.badge({"score": 0}) == {"text": "0 of 7", "kind": "low"}


def test_examples_are_the_best_the_median_and_the_worst():
  """By the grade of the last turn; of equals, the larger gain first."""
  attempts = {
    p: [Row(turn, None, score, None, 0, False, 0) for turn, score in enumerate(scores, 1)]
    for p, scores in {"e": (1, 2), "d": (None, 4), "c": (0, 0), "b": (7, 7), "a": (3, 7)}.items()
  }
  picked = examples.pick(list(attempts.values()))
  names = {place: p for place, rows in picked.items() for p in attempts if attempts[p] is rows}
  assert names == {"best": "a", "median": "d", "worst": "c"}


def test_long_texts_lose_their_middle():
  """Both ends of a long trace are kept, and the page says how much is not shown."""
  text = reading.clean("start" + "x" * 50_000 + "end")
  assert len(text) < 6_100 and text.startswith("start") and text.endswith("end")
  assert "44,008 characters left out" in text


def test_the_same_input_gives_the_same_bytes(workdir, page):
  """No clock, no random identifier: a report can be compared."""
  picture = (workdir / "score_by_turn.png").read_bytes()
  assert made(workdir) == page
  assert (workdir / "score_by_turn.png").read_bytes() == picture


def test_pictures_hold_no_script_and_follow_the_theme(page):
  """The inlined drawings are static, name no address but the SVG vocabulary, and know the dark."""
  sources = Page(page).values("src")
  assert len(sources) > 12
  for source in sources:
    svg = base64.b64decode(source.split(",", 1)[1]).decode()
    assert "<script" not in svg and "prefers-color-scheme: dark" in svg
    assert set(re.findall(r'(?:href|src)="([^#"][^"]*)"', svg)) == set()


def test_metrics_of_one_name_share_a_panel():
  """reward/mean and reward/turn_1 are lines of one panel; reward comes before the unknown."""
  by_name = {n: ([0.0, 1.0], [1.0, 2.0]) for n in ("zeta", "reward/mean", "reward/turn_1", "loss")}
  titles = [p["title"] for p in figures.panels(by_name)]
  assert titles == ["reward", "loss", "zeta"]


def test_thinning_keeps_the_mean():
  """Long curves are drawn as means of neighbours: few points, none of the mass lost."""
  x, y = figures.thin([float(i) for i in range(4_000)], [float(i % 7) for i in range(4_000)])
  assert len(x) <= figures.MOST_POINTS
  assert abs(sum(y) / len(y) - sum(i % 7 for i in range(4_000)) / 4_000) < 1e-9


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
  """No traceback for a misspelt --workdir."""
  with pytest.raises(SystemExit) as stop:
    report.main([f"--workdir={tmp_path / 'nope'}"])
  assert "nope is not a local folder" in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    ([], "name folders that hold runs"),
    (["{0}", "--longest=0"], "--longest=0 leaves no text"),
    (["{0}", "--serve", "--out=x.html"], "a served page is not written"),
    (["{0}", "--serve", "--port=99999"], "--port=99999 cannot be listened at"),
  ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path, flags, said):
  """What is wrong, with its value, and what to do."""
  with pytest.raises(SystemExit) as stop:
    report.main([flag.format(tmp_path) for flag in flags])
  assert said in str(stop.value) and "\n" not in str(stop.value)


def test_several_runs_make_one_page(tmp_path, monkeypatch, capsys):
  """Runs from different places are told apart by their folders; the page goes to where one is."""
  monkeypatch.chdir(tmp_path)
  for place in ("a", "b"):
    make_evaluation(tmp_path / place / "eval", "model", 1, 1, text=f"x {place}")
  report.main(["a", "b"])
  assert capsys.readouterr().out.strip() == "report.html"
  text = " ".join(Page((tmp_path / "report.html").read_text()).text)
  assert "model (b/eval)" in text
