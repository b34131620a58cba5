"""The chat page in a real browser: proofs stream in, formulas are rendered, nothing is executed."""

import json
import os
import time
from pathlib import Path

import pytest
import scripted_server
from scripted_server import says
from test_tokenizer import write_bpe_folder

from qed_jax.data import tokenizer as tokenizer_lib
from tools.chromium import PROGRAM, Browser

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium here")

PROOF = r"""

## Claim

Suppose $n = p_1 \cdots p_k + 1$ and **no prime** divides it. Then by \(\gcd(n, p_i) = 1\),

$$
\sum_{k=1}^{n} k^3 = \left(\frac{n(n+1)}{2}\right)^2 .
$$

1. First, `x < y` and $a \le b$.
2. Then *clearly* \[ \int_0^1 x^2 \, dx = \tfrac13 \]

\begin{align}
(a+b)^2 &= a^2 + 2ab + b^2 \\
        &\ge 4ab
\end{align}

It costs \$5 and \$6, a < b & c > d. $\blacksquare$"""
ATTACKS = [
  "<img src=x onerror=hit()>",
  "<script>hit()</script>",
  "<svg/onload=hit()>",
  "**<b onclick=hit()>x</b>**",
  "`<i>code</i>`",
  "# <img src=x onerror=hit()>",
  "- <iframe srcdoc='<script>parent.hit()</script>'></iframe>",
  "```\n</code></pre><script>hit()</script>\n```",
  r"$\href{javascript:hit()}{x}$",
  r"$\url{javascript:hit()}$",
  r"$\htmlData{onclick=hit()}{x} \class{y}{x} \id{z}{x} \style{background:url(//evil.example)}{x}$",
  r"$\includegraphics{http://evil.example/x.png}$",
  r"$\text{<img src=x onerror=hit()>} \textcolor{red;background:url(//evil.example/)}{x}$",
  r"$\unknown{<img src=x onerror=hit()>}$",
  r"$\def\a{\a\a}\a$",
  r"$$\rule{90000em}{90000em}$$",
  "</div></article><h1>x</h1>",
  "[x](javascript:hit())",
]


class Chat(Browser):
  """A browser that knows the chat page."""

  def open(self, url, **headers):
    super().open(url, "typeof model === 'string'", **headers)

  def say(self, prompt):
    self.value(f"byId('prompt').value = {json.dumps(prompt)}; byId('form').requestSubmit()")

  def done(self):
    self.until("document.querySelector('.turn.assistant') && !asking")
    self.until("!document.querySelector('.working')")
    self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

  def picture(self, name, dark=False):
    """A screenshot, where SERVE_PICTURES names a folder for it."""
    if folder := os.environ.get("SERVE_PICTURES"):
      super().picture(Path(folder) / f"{name}.png", dark)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return tokenizer_lib.load(write_bpe_folder(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def browser():
  found = Chat()
  yield found
  found.close()


def page(tokenizer, text, **options):
  limits = {"max_tokens": 4_000, "prompt_tokens": 4_000}
  script = says(tokenizer, text)
  options = {"limits": limits, "max_length": 8_192, "chunk": 9} | options
  return scripted_server.make(tokenizer, script=script, **options)


def test_a_proof_streams_in_with_its_mathematics(tokenizer, browser):
  """Reasoning is folded away; formulas are MathML; prices and signs are themselves."""
  app, _, engine = page(tokenizer, rf"Try $n = 2$ first.</think>{PROOF}", step_s=0.01)
  with scripted_server.listening(app) as url:
    browser.open(url)
    assert browser.value("byId('model').textContent") == "tiny"
    assert browser.value("document.querySelectorAll('#examples math').length") >= 4
    browser.picture("welcome")
    browser.say("Is $n^2 + 1$ prime?")
    seen = [
      browser.until("(document.querySelector('.assistant > .text')?.textContent || '').length")
    ]
    browser.done()
    seen.append(browser.value("document.querySelector('.assistant > .text').textContent.length"))
    assert seen[0] < seen[1]  # it came in parts
    assert browser.value("document.querySelectorAll('.user math').length") == 1
    answer = "document.querySelector('.assistant > .text')"
    assert browser.value(f"{answer}.querySelectorAll('math').length") == 7
    assert browser.value(f"{answer}.querySelectorAll('.display math[display=block]').length") == 3
    assert browser.value(f"{answer}.querySelectorAll('code').length") == 1
    assert browser.value(f"{answer}.querySelectorAll('ol > li').length") == 2
    assert browser.value(f"{answer}.querySelector('strong').textContent") == "no prime"
    assert browser.value(f"{answer}.querySelector('code').textContent") == "x < y"
    assert "It costs $5 and $6, a < b & c > d." in browser.value(f"{answer}.innerText")
    assert browser.value("document.querySelector('.reasoning').open") is False
    browser.picture("proof")
    browser.picture("proof-dark", dark=True)
    browser.value("document.querySelector('.reasoning').open = true")
    browser.until("document.querySelectorAll('.reasoning math').length === 1")
    assert "tokens in" in browser.value("document.querySelector('.count').textContent")
    assert browser.complaints() == []
    browser.say("And $n^2 + 2$?")
    browser.until("document.querySelectorAll('.assistant .count').length === 2")
    roles = browser.value("messages.map((m) => m.role)")
    assert roles == ["user", "assistant", "user", "assistant"]
    assert browser.value("messages[1].content").strip() == PROOF.strip()
  assert engine.leaked() == {}


def test_what_the_model_writes_is_never_markup(tokenizer, browser):
  """Every attack is shown as text: no element of it, no handler, no request, no dialog."""
  text = "\n\n".join(ATTACKS)
  app, _, _ = page(tokenizer, f"{text}</think>{text}")
  with scripted_server.listening(app) as url:
    browser.open(url)
    browser.value("window.hits = 0; window.hit = () => { window.hits += 1 }")
    browser.say("\n\n".join(ATTACKS))
    browser.until("document.querySelector('.assistant')")
    browser.value("document.querySelector('.reasoning').open = true")
    browser.done()
    time.sleep(0.3)
    assert browser.value("window.hits") == 0
    shown = browser.value("byId('turns').innerText")
    assert shown.count("<img src=x onerror=hit()>") >= 6 and "[x](javascript:hit())" in shown
    bad = (
      "#turns :is(img, script, svg, iframe, b, i, h1, a, object, embed, link, style, base, form)"
    )
    assert browser.value(f"document.querySelectorAll('{bad}').length") == 0
    names = "[...document.querySelectorAll('.turn *')].flatMap((e) => e.getAttributeNames())"
    assert not [n for n in browser.value(names) if n.startswith("on") or n in ("href", "src", "id")]
    styles = "[...document.querySelectorAll('.turn [style]')].map((e) => e.getAttribute('style'))"
    assert not [s for s in browser.value(styles) if "url" in s.lower()]
    widest = "Math.max(...[...document.querySelectorAll('#turns *')].map((e) => e.scrollWidth))"
    assert browser.value(widest) < 20_000
    asked = browser.requests()
    assert asked and all(u.startswith((url, "data:")) for u in asked)
    browser.picture("attacks")


def test_errors_are_shown_and_the_page_goes_on(tokenizer, browser):
  """A refused request is a line of text; the question is not asked along with the next one."""
  app, _, engine = page(tokenizer, "Fine.")
  with scripted_server.listening(app) as url:
    browser.open(url)
    browser.value("byId('max_tokens').value = 5000")
    browser.say("a")
    browser.until("document.querySelector('.error')")
    assert "max_tokens is 5000" in browser.value("document.querySelector('.error').textContent")
    browser.picture("error")
    browser.value("byId('max_tokens').value = ''; byId('thinking').checked = false")
    browser.say("b")
    browser.until("document.querySelectorAll('.assistant .count').length === 1")
    assert browser.value("messages.map((m) => m.content)") == ["b", "Fine."]
    engine.fail_at = 0
    browser.say("c")
    browser.until("document.querySelectorAll('.error').length === 2")
    assert "the engine failed" in browser.value(
      "[...document.querySelectorAll('.error')].at(-1).textContent"
    )


def test_stop_frees_the_slot(tokenizer, browser):
  app, _, engine = page(tokenizer, "a " * 3000, step_s=0.02, chunk=2)
  with scripted_server.listening(app) as url:
    browser.open(url)
    browser.say("a")
    browser.until("document.querySelector('.reasoning:not([hidden])')")
    assert browser.value("byId('send').textContent") == "Stop"
    browser.value("byId('form').requestSubmit()")
    browser.until("!asking")
    assert browser.value("byId('status').textContent") == "Stopped"
    end = time.monotonic() + 5
    while engine.leaked() and time.monotonic() < end:
      time.sleep(0.01)
  assert engine.leaked() == {} and engine.aborted == 1


def test_with_a_key_the_browser_sends_it_along(tokenizer, browser):
  """Basic credentials given for the page go with its requests; without them there is no page."""
  key = "sk-page-0123"
  app, _, _ = page(tokenizer, "Fine.", key=key)
  with scripted_server.listening(app) as url:
    browser.open(url.replace("//", f"//me:{key}@"))
    browser.value("byId('thinking').checked = false")
    browser.say("a")
    browser.until("document.querySelectorAll('.assistant .count').length === 1")
    assert browser.value("messages[1].content") == "Fine."
    assert key not in browser.value("document.documentElement.outerHTML")
