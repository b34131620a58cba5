"""The report in a real browser: problems are found, read and compared, and no text is ever more."""

import json
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

import payloads
import pytest

from qed_jax import report
from qed_jax.reporting import page, reading, site
from tools.chromium import PROGRAM, Browser

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium here")
READY = "performance.getEntriesByName('problems-ready').length"
FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def write(folder, rows):
  folder.mkdir(parents=True)
  with (folder / "eval.jsonl").open("w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)


def attempt(problem, sample, turn, score, **more):
  return {
    "problem_id": f"p{problem}",
    "problem": f"Problem {problem}. Prove that $\\frac{{a}}{{b}} > {problem}$.",
    "rubric": "1. $x^2$ (7 points)",
    "reference": "Take \\[ x = 1 \\]",
    "benchmark": "even" if problem % 2 == 0 else "odd",
    "category": "algebra",
    "level": str(problem % 3),
    "sample": sample,
    "turn": turn,
    "summary": f"so far {turn}",
    "reasoning": "Try $n = 2$.\n\n" * 200,
    "proof": f"Proof of {problem}, sample {sample}, turn {turn}: $\\sqrt{{2}}$. Word w{problem}z.",
    "score": score,
    "feedback": "Fine.",
    "finish_reason": "length" if problem == 3 else "stop",
    "tokens": 100,
    "cost": 0.25,
  } | more  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two runs over 300 problems: the second is better at every fourth and lacks the last one."""
  folder = tmp_path_factory.mktemp("viewer")
  first = [attempt(p, s, t, (p + s) % 8) for p in range(300) for s in (0, 1) for t in (1, 2)]
  first[4 * 7 + 3]["score"] = None
  second = [attempt(p, 0, 1, min(7, p % 8 + (p % 4 == 0))) for p in range(299)]
  write(folder / "first", first)
  write(folder / "second", second)
  report.main([str(folder), f"--out={folder / 'r.html'}"])
  return folder


@pytest.fixture(scope="module")
def browser():
  found = Browser((1400, 1000))
  yield found
  found.close()


@pytest.fixture
def opened(browser, runs):
  browser.open("about:blank")
  browser.open((runs / "r.html").as_uri(), READY)
  return browser


def choose(browser, **fields):
  """Fills in filters as a reader would, and waits for the list."""
  for name, value in fields.items():
    name = name.replace("_", "-")
    what = "checked" if isinstance(value, bool) else "value"
    browser.value(f"byId('{name}').{what} = {json.dumps(value)}")
    for event in ("input", "change"):
      browser.value(f"byId('{name}').dispatchEvent(new Event('{event}', {{bubbles: true}}))")
  browser.value(FRAMES)


def count(browser):
  return browser.value("byId('count').textContent")


def picture(browser, name, dark=False):
  """A screenshot, where REPORT_PICTURES names a folder for it."""
  if folder := os.environ.get("REPORT_PICTURES"):
    browser.picture(Path(folder) / f"{name}.png", dark)


def test_a_problem_with_its_attempts_and_turns(opened):
  """Statement, reference, rubric, attempts, turns and grades are there; mathematics is MathML."""
  shown = "document.getElementById('shown')"
  assert opened.value(f"{shown}.querySelector('h2').textContent") == "p0"
  assert opened.value(f"{shown}.querySelectorAll('.statement math mfrac').length") == 1
  buttons = f"[...{shown}.querySelectorAll('.attempts button')].map(b => b.innerText)"
  assert opened.value(buttons) == ["#0 0", "#1 1"]
  turns = f"[...{shown}.querySelectorAll('.turn > summary')].map(t => t.innerText.trim())"
  assert opened.value(turns) == ["Turn 1 0", "Turn 2 0"]
  assert opened.value(f"[...{shown}.querySelectorAll('.turn')].map(t => t.open)") == [False, True]
  text = opened.value(f"{shown}.textContent")
  for piece in ("Reference solution", "Rubric", "so far 2", "sample 0, turn 2", "Fine."):
    assert piece in text, piece
  opened.value(f"{shown}.querySelectorAll('.attempts button')[1].click()")
  opened.until(f"{shown}.textContent.includes('sample 1, turn 2')")
  unfold = f"{shown}.querySelectorAll('details').forEach(d => d.open = true)"
  opened.value(unfold)
  opened.until(f"{shown}.textContent.includes('sample 1, turn 1')")
  opened.value(unfold)
  opened.until(f"{shown}.querySelectorAll('math').length > 390")  # the reasoning of two turns
  assert "0.25" in opened.value(f"{shown}.textContent")
  assert opened.complaints() == [] and len(opened.requests()) == 1
  picture(opened, "problem")
  picture(opened, "problem-dark", dark=True)


def test_the_list_holds_what_is_in_sight(opened):
  """Few of 300 lines exist at a time, and the last one is there when it is scrolled to."""
  assert count(opened) == "300 of 300 problems"
  assert 10 < opened.value("document.querySelectorAll('.line').length") < 50
  opened.value("byId('list').scrollTop = 1e9")
  opened.until("document.getElementById('line-299')")
  assert opened.value("document.querySelectorAll('.line').length") < 50
  assert opened.value("byId('line-299').getAttribute('aria-setsize')") == "300"


def test_search_and_filters(opened):
  """Words of the statement, of the proofs on demand, expressions, benchmark, grade, and order."""
  choose(opened, find="17. PROVE")
  assert count(opened) == "3 of 300 problems"  # 17, 117, 217
  choose(opened, find="w17z")
  assert count(opened) == "0 of 300 problems"
  choose(opened, deep=True)
  opened.until("byId('count').textContent === '1 of 300 problems'")
  choose(opened, deep=False, find="/^p(1|2)0$/")
  assert count(opened).startswith("0 of")  # the id is a line of the text, not all of it
  choose(opened, find="/problem (1|2)0\\./")
  assert count(opened) == "2 of 300 problems"
  choose(opened, find="/(/")
  assert opened.value("byId('find').validity.valid") is False
  choose(opened, find="", benchmark="=even")
  assert count(opened) == "150 of 300 problems"
  choose(opened, benchmark="", grade="ungraded")
  assert opened.value("found") == [7]
  choose(opened, grade="cut")
  assert opened.value("found") == [3]
  choose(opened, grade="", order="high")
  means = opened.value("found.map((p) => mean(0, p))")
  assert means == sorted(means, reverse=True)
  choose(opened, order="low")
  means = opened.value("found.map((p) => mean(0, p))")
  assert means == sorted(means)


def test_two_runs_side_by_side(opened):
  """Both columns with their grades, the paired difference of the list, and who lacks what."""
  choose(opened, run_b="1", order="gain")
  first = opened.value("found.slice(0, 5).map(difference)")
  assert first == sorted(first, reverse=True) and first[0] > 0
  assert "second less first over 299" in count(opened)
  opened.value("byId('list').scrollTop = 0")
  opened.until("document.getElementById('line-0')")
  opened.value("byId('line-0').click()")
  opened.until("document.querySelectorAll('.runs.of-2 > section').length === 2")
  titles = "[...document.querySelectorAll('.run > h3')].map(h => h.textContent)"
  assert opened.value(titles) == ["first", "second"]
  assert opened.value("document.querySelectorAll('#line-0 .badge').length") == 2
  choose(opened, grade="differ")
  assert all(d != 0 for d in opened.value("found.map(difference)"))
  picture(opened, "side-by-side")
  choose(opened, grade="")
  opened.value("go(299)")
  opened.until("byId('shown').textContent.includes('No attempt at this problem')")
  assert opened.complaints() == []


def test_keys_and_names_for_readers_without_a_mouse(opened):
  """The list is a listbox with a cursor; every field has a name; every badge says its grade."""
  opened.value("byId('list').focus()")
  for key, place in (("ArrowDown", 1), ("ArrowDown", 2), ("End", 299), ("Home", 0)):
    opened.press(key)
    active = f"byId('list').getAttribute('aria-activedescendant') === 'line-{place}'"
    opened.until(f"{active} && byId('line-{place}').getAttribute('aria-selected') === 'true'")
  opened.press("Enter")
  assert opened.value("document.activeElement.id") == "shown"
  unnamed = (
    "[...document.querySelectorAll('#filters :is(input, select)')].filter(f => !f.labels.length)"
  )
  assert opened.value(f"{unnamed}.length") == 0
  badges = "[...document.querySelectorAll('#problems .badge[role]')].map(b => b.ariaLabel)"
  assert all(b.endswith(("of 7", "not graded")) for b in opened.value(badges))
  tree = opened.call("Accessibility.getFullAXTree")["nodes"]
  focusable = [
    n
    for n in tree
    if any(p["name"] == "focusable" and p["value"]["value"] for p in n.get("properties", []))
    and n["role"]["value"] not in ("RootWebArea", "MenuListPopup")
  ]
  assert len(focusable) > 20
  assert [n["role"] for n in focusable if not n.get("name", {}).get("value")] == []


def test_an_address_leads_to_its_problem(browser, runs):
  """A link with #problem-123 opens that problem, and one to nowhere opens the first."""
  for place, name in (("123", "p123"), ("999999", "p0"), ("-1", "p0")):
    browser.open("about:blank")
    browser.open((runs / "r.html").as_uri() + f"#problem-{place}", READY)
    assert browser.value("document.querySelector('#shown h2').textContent") == name


def test_without_scripts_the_tables_and_pictures_are_there(browser, runs):
  """With JavaScript switched off: scores, pictures, and three problems of each run."""
  browser.call("Emulation.setScriptExecutionDisabled", value=True)
  try:
    browser.open("about:blank")
    browser.open((runs / "r.html").as_uri(), "document.querySelector('#examples')")
    text = browser.value("document.body.innerText")
    pictures = "[...document.images].filter((i) => i.complete && i.naturalWidth > 99).length"
    assert browser.value(pictures) == browser.value("document.images.length") > 1
  finally:
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
  for piece in ("Paired differences", "needs JavaScript", "Benchmarks", "Examples"):
    assert piece in text, piece


CHECK = """(async () => {
  const faults = [];
  const bad = "#problems :is(img, script, svg, iframe, a, object, embed, link, style, base," +
    "video, meta, b, i, h1, canvas, template, #shown :is(form, input, textarea, select))";
  for (let p = 0; p < index.problems.id.length; p++) {
    await show(p);
    for (const details of document.querySelectorAll("#shown details")) details.open = true;
    await new Promise((done) => setTimeout(done));
    const fault = (what) => faults.push([p, index.problems.statement[p].slice(0, 60), what]);
    if (!document.querySelector("#shown .statement").childNodes.length) fault("nothing shown");
    for (const node of document.querySelectorAll(bad)) fault(node.outerHTML.slice(0, 99));
    for (const node of document.querySelectorAll("#shown *")) {
      for (const name of node.getAttributeNames()) {
        const value = node.getAttribute(name);
        if (/^on|^(href|src|id|srcdoc|action)$/i.test(name)) fault(`${name}=${value}`);
        if (/url|expression|fixed|sticky/i.test(name === "style" ? value : "")) fault(value);
      }
      if (node.scrollWidth > 20000) fault(`${node.scrollWidth} pixels wide`);
    }
  }
  return faults;
})()"""


def test_hostile_texts_stay_text(browser, tmp_path):
  """More than 500 payloads as statements and proofs, and in every other field: nothing comes of
  them but text and MathML, and as they are they are themselves."""
  texts = payloads.every()
  assert len(texts) > 500
  fields = ("rubric", "reference", "summary", "reasoning", "feedback", "reason", "answer", "model")
  names = ("benchmark", "category", "level", "sample", "scaffold", "judge", "finish_reason")
  rows = [
    {"problem_id": text, "problem": text, "proof": text, "score": i % 8, "sample": 0}
    for i, text in enumerate(texts)
  ]
  others = [
    {"problem": f"{i}", "score": 1, text: text, **dict.fromkeys(fields, text), "messages": [
      {"role": text, "content": text}]}
    for i, text in enumerate(payloads.MARKUP + payloads.TEX)
  ]  # fmt: skip
  write(tmp_path / "first", rows)
  write(tmp_path / "</script><script>hit()", rows[:50])
  write(tmp_path / "other", [row | {"model": ""} for row in others])
  named = [row | dict.fromkeys(names, text) for row, text in zip(rows[:40], texts, strict=False)]
  write(tmp_path / "names", named)
  report.main([str(tmp_path)])
  browser.open("about:blank")
  browser.open((tmp_path / "report.html").as_uri(), READY)
  browser.value("window.hits = 0; window.hit = () => { window.hits += 1 }; window.alert = hit")
  assert browser.value("index.problems.id.length") > 600
  for run in ("0", "1", "2"):
    choose(browser, run_a=run)
    if run == "0" or browser.value("found.length") < 200:
      assert browser.value(CHECK) == []
  assert browser.value("window.hits") == 0
  assert browser.requests() == [(tmp_path / "report.html").as_uri()]
  assert browser.complaints() == []
  picture(browser, "hostile")
  choose(browser, plain=True, run_a="0")
  read = """(async () => {
    const texts = [];
    for (let p = 0; p < index.problems.id.length; p++) {
      await show(p);
      texts.push(document.querySelector("#shown .statement").textContent);
    }
    return texts;
  })()"""
  seen = set(browser.value(read))
  assert [t for t in texts if reading.clean(t, None) not in seen] == []


@pytest.fixture
def served(runs):
  text, _, sources = report.render([runs], None)
  server = site.make(text.encode(), page.policy(live=True, served=True), sources, 0)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  yield f"http://127.0.0.1:{server.server_address[1]}", len(sources)
  server.shutdown()
  server.server_close()
  thread.join()


def test_served_texts_come_when_they_are_asked_for(browser, served):
  """The page holds none; a problem asks for its own and those of one attempt a run."""
  url, _ = served
  browser.open("about:blank")
  browser.open(f"{url}/", READY)
  assert browser.value("byId('texts').textContent") == ""
  assert "sample 0, turn 2" in browser.value("byId('shown').textContent")
  assert browser.complaints() == []
  assert {u.removeprefix(url).rpartition("/")[0] for u in browser.requests()} <= {"", "/texts"}
  assert len(browser.requests()) == 3


def test_the_server_answers_this_machine_only(served):
  """Another host's name, another path or a text that is not there: an error, and no file."""
  url, count = served

  def status(path, **headers):
    request = urllib.request.Request(url + path, headers=headers)
    try:
      with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
      return error.code, dict(error.headers), error.read()

  code, headers, body = status(f"/texts/{count - 1}")
  assert code == 200 and json.loads(body)["rubric"].startswith("1. $x^2$")
  assert headers["x-content-type-options"] == "nosniff"
  assert headers["cross-origin-resource-policy"] == "same-origin"
  wrong = ("x", f"texts/{count}", "texts/-1", "texts/1e3", "texts/../../etc/passwd", "texts/", "?x")
  for path in (*wrong, "texts/%D9%A1", "/etc/passwd"):
    assert status(f"/{path}")[0] == 404, path
  assert status("/", host="evil.example")[0] == 403
  assert status("/", host="evil.example:80")[0] == 403
