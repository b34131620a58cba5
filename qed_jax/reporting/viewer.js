// The problems of the report: a list that holds the lines in sight, and one problem with its attempts
// in one run or in two. Texts of runs become text nodes, or MathML through proof.js; never markup.
"use strict";

const byId = (id) => document.getElementById(id);
const LINE = 60; // pixels of a line of the list, as in page.css
const SPARE = 8; // lines above and below those in sight
const SLICE = 8; // milliseconds of rendering before the browser may draw
const SHORT = 600; // characters; a part that is no longer is open from the start
const SEARCHED = 50; // attempts between two looks at the clock
const KINDS = {
  solved: (mean) => mean !== null && mean >= 6,
  part: (mean) => mean !== null && mean > 0 && mean < 6,
  zero: (mean) => mean === 0,
};
const PARTS = [
  ["summary", "Summary so far", true],
  ["reasoning", "Reasoning", false],
  ["proof", "Proof", true],
  ["written", "Summary written", false],
  ["feedback", "Grader's words", true],
  ["reason", "Grader's note", true],
];

let index = null;
let of = []; // of each run: problem -> its attempts
let words = []; // of each problem, for the search
let found = []; // the problems of the list
let lines = new Map(); // place in the list -> its node
let at = -1; // the place that is chosen
let problem = -1;
let opening = 0;
let searching = 0;

// --- data

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(plain).json();
}

// The texts stand behind this script, and may take a second to arrive.
const whole = new Promise((done) => addEventListener("DOMContentLoaded", done));

// Text i: out of the page, or from the server that the page came from.
async function load(i) {
  if (index.ends) await whole;
  if (index.ends) return unpack(byId("texts").firstChild.data.slice(index.ends[i - 1] || 0, index.ends[i]));
  const answer = await fetch(new URL(`texts/${i}`, location.origin + location.pathname));
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  return answer.json();
}

function lastScore(attempt) {
  return index.attempts.scores[attempt].at(-1);
}

// The mean last grade of a run at a problem; null where nothing was graded.
function mean(run, p) {
  const scores = (of[run]?.get(p) || []).map(lastScore).filter((s) => s !== null);
  return scores.length ? scores.reduce((sum, s) => sum + s, 0) / scores.length : null;
}

function chosen(id) {
  return Number(byId(id).value);
}

// --- the list

function badge(score, name = "") {
  const kind = score === null ? "none" : score < 2.5 ? "low" : score < 5.5 ? "middle" : "high";
  const text = score === null ? "\u2013" : String(Math.round(score * 100) / 100);
  const node = element("span", `badge ${kind}`, text);
  const said = score === null ? "not graded" : `${text} of 7`;
  node.title = name ? `${name}: ${said}` : said;
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", node.title);
  return node;
}

// What the search asks for, as a test of a text. /.../ is a regular expression.
function asked() {
  const text = byId("find").value.trim().toLowerCase();
  const pattern = text.match(/^\/(.+)\/$/);
  byId("find").setCustomValidity("");
  if (pattern) {
    try {
      const expression = new RegExp(pattern[1], "iu");
      return (t) => expression.test(t);
    } catch (error) {
      byId("find").setCustomValidity(error.message);
      byId("find").reportValidity();
    }
  }
  const parts = text.split(/\s+/).filter(Boolean);
  return parts.length ? (t) => parts.every((part) => t.includes(part)) : null;
}

function fits(p) {
  const [a, b, kind] = [chosen("run-a"), chosen("run-b"), byId("grade").value];
  const own = of[a].get(p) || [];
  if (!own.length && !of[b]?.has(p)) return false;
  for (const field of ["benchmark", "category", "level"]) {
    const value = byId(field).value;
    if (value && index.problems[field][p] !== value.slice(1)) return false;
  }
  if (kind === "ungraded") return own.some((i) => lastScore(i) === null);
  if (kind === "cut") return own.some((i) => index.attempts.cut[i]);
  if (kind === "differ") return difference(p) !== null && difference(p) !== 0;
  return !kind || KINDS[kind](mean(a, p));
}

function difference(p) {
  const [first, second] = [mean(chosen("run-a"), p), mean(chosen("run-b"), p)];
  return first === null || second === null ? null : second - first;
}

const ORDERS = {
  low: (p) => mean(chosen("run-a"), p),
  high: (p) => -(mean(chosen("run-a"), p) ?? -Infinity),
  gain: (p) => -(difference(p) ?? -Infinity),
  loss: (p) => difference(p),
};

async function filter() {
  const own = ++searching;
  const test = asked();
  const key = ORDERS[byId("order").value];
  let fitting = index.problems.id.map((_, p) => p).filter(fits);
  if (test && byId("deep").checked) fitting = await search(fitting, test, own);
  else if (test) fitting = fitting.filter((p) => test(words[p]));
  if (own !== searching) return;
  if (key) {
    const keys = new Map(fitting.map((p) => [p, key(p) ?? Infinity]));
    fitting.sort((p, q) => (keys.get(p) === keys.get(q) ? p - q : keys.get(p) - keys.get(q)));
  }
  found = fitting;
  at = found.indexOf(problem);
  byId("count").textContent = `${found.length} of ${index.problems.id.length} problems${compared()}`;
  byId("list").scrollTop = Math.max(0, at * LINE - 2 * LINE);
  lines.clear();
  byId("lines").replaceChildren();
  byId("lines").style.height = `${found.length * LINE}px`;
  draw();
}

// The problems with a text that passes the test: their own, or one of an attempt in the two runs.
async function search(fitting, test, own) {
  const passed = [];
  let looked = 0;
  for (const p of fitting) {
    const runs = [of[chosen("run-a")], of[chosen("run-b")]];
    const attempts = runs.flatMap((run) => run?.get(p) || []);
    let hit = test(words[p]);
    for (const i of attempts) {
      if (hit) break;
      const turns = await load(i);
      hit = turns.some((turn) => test(PARTS.map(([part]) => turn[part] || "").join("\n").toLowerCase()));
      if (++looked % SEARCHED === 0) {
        byId("count").textContent = `${passed.length} found, ${looked} attempts read`;
        await new Promise(requestAnimationFrame);
      }
      if (own !== searching) return [];
    }
    if (hit) passed.push(p);
  }
  return passed;
}

// The paired difference over the problems of the list.
function compared() {
  const values = found.map(difference).filter((d) => d !== null);
  if (!values.length) return "";
  const sum = values.reduce((total, d) => total + d, 0) / values.length;
  const count = (test) => values.filter(test).length;
  const [more, less] = [count((d) => d > 0), count((d) => d < 0)];
  const rest = values.length - more - less;
  return `; second less first over ${values.length}: ${sum < 0 ? "\u2212" : "+"}${Math.abs(sum).toFixed(2)} (${more} better, ${rest} equal, ${less} worse)`;
}

function line(place) {
  const p = found[place];
  const { id, statement, benchmark, category, level } = index.problems;
  const node = element("div", "line");
  node.id = `line-${place}`;
  node.setAttribute("role", "option");
  node.setAttribute("aria-posinset", place + 1);
  node.setAttribute("aria-setsize", found.length);
  node.setAttribute("aria-selected", place === at);
  const grades = element("span", "grades");
  for (const run of [chosen("run-a"), chosen("run-b")]) {
    if (run >= 0) grades.append(badge(mean(run, p), index.runs[run].label));
  }
  const about = [id[p], benchmark[p], category[p], level[p]].filter(Boolean).join(" \u00b7 ");
  const text = element("span", "words", element("span", "about", about || `problem ${p + 1}`));
  text.append(element("span", "start", statement[p].slice(0, 160)));
  node.append(grades, text);
  node.style.transform = `translateY(${place * LINE}px)`;
  node.addEventListener("click", () => choose(place));
  return node;
}

function draw() {
  const list = byId("list");
  const first = Math.max(0, Math.floor(list.scrollTop / LINE) - SPARE);
  const end = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / LINE) + SPARE);
  for (const [place, node] of lines) {
    if (place >= first && place < end) continue;
    node.remove();
    lines.delete(place);
  }
  const fresh = [];
  for (let place = first; place < end; place++) {
    if (lines.has(place)) continue;
    lines.set(place, line(place));
    fresh.push(lines.get(place));
  }
  byId("lines").append(...fresh);
}

function choose(place) {
  lines.get(at)?.setAttribute("aria-selected", false);
  at = place;
  const list = byId("list");
  if (at * LINE < list.scrollTop) list.scrollTop = at * LINE;
  const below = (at + 1) * LINE - list.clientHeight;
  if (below > list.scrollTop) list.scrollTop = below;
  draw();
  lines.get(at)?.setAttribute("aria-selected", true);
  list.setAttribute("aria-activedescendant", `line-${at}`);
  history.replaceState(null, "", `#problem-${found[at]}`);
  show(found[at]);
}

function press(event) {
  const page = Math.max(1, Math.floor(byId("list").clientHeight / LINE) - 1);
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (event.key === "Enter") byId("shown").focus();
  if (!(event.key in steps) || !found.length) return;
  event.preventDefault();
  choose(Math.min(found.length - 1, Math.max(0, at + steps[event.key])));
}

// --- a problem

// Long texts are written in slices, so that the page stays quick while they appear.
function write(node, text) {
  if (byId("plain").checked) {
    node.replaceChildren(element("pre", "", text));
    return;
  }
  const sources = blocks(text);
  let next = 0;
  const go = () => {
    const end = performance.now() + SLICE;
    while (next < sources.length && performance.now() < end) node.append(block(sources[next++]));
    if (next < sources.length) requestAnimationFrame(() => node.isConnected && go());
  };
  go();
}

// A part that is written when it is first opened.
function part(title, text, open) {
  const body = element("div", "text");
  const size = element("span", "soft", ` ${text.length.toLocaleString("en")} characters`);
  const node = element("details", "part", element("summary", "", title, size), body);
  const fill = () => {
    if (node.open && !body.firstChild) write(body, text);
  };
  node.addEventListener("toggle", fill);
  node.open = open || text.length < SHORT;
  fill();
  return node;
}

function fieldsOf(turn) {
  const body = element("tbody");
  for (const [key, value] of Object.entries(turn.fields)) {
    const name = element("th", "", key);
    name.scope = "row";
    body.append(element("tr", "", name, element("td", "", value)));
  }
  return element("details", "part", element("summary", "", "Further fields"), element("table", "fields", body));
}

function turnNode(turn, open) {
  const title = element("summary", "", turn.turn === null ? "Answer" : `Turn ${turn.turn}`, " ", badge(turn.score));
  if (turn.human !== null) title.append(" ", element("span", "soft", "people "), badge(turn.human, "people"));
  if (turn.finish === "length") title.append(" ", element("span", "badge none", "cut at the budget"));
  const node = element("details", "turn", title);
  const fill = () => {
    if (!node.open || node.childNodes.length > 1) return;
    for (const [role, text] of turn.messages) node.append(part(`Prompt: ${role}`, text, false));
    for (const [key, name, shown] of PARTS) {
      if (turn[key]) node.append(part(name, turn[key], shown));
    }
    if (!turn.proof) node.append(element("p", "soft", "No proof."));
    if (Object.keys(turn.fields).length) node.append(fieldsOf(turn));
  };
  node.addEventListener("toggle", fill);
  node.open = open;
  fill();
  return node;
}

async function showAttempt(node, attempt, buttons, own) {
  for (const [i, button] of buttons) button.setAttribute("aria-pressed", i === attempt);
  const turns = await load(attempt);
  if (own !== opening || buttons.get(attempt).getAttribute("aria-pressed") !== "true") return;
  node.replaceChildren(...turns.map((turn, i) => turnNode(turn, i === turns.length - 1)));
}

// The attempts of a run at a problem.
async function column(run, p, own) {
  const node = element("section", "run", element("h3", "", index.runs[run].label));
  node.setAttribute("aria-label", index.runs[run].label);
  const attempts = of[run].get(p) || [];
  if (!attempts.length) {
    node.append(element("p", "soft", "No attempt at this problem."));
    return node;
  }
  const bar = element("div", "attempts");
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "Attempts");
  const turns = element("div");
  const buttons = new Map();
  for (const [n, i] of attempts.entries()) {
    const button = element("button", "", `#${index.attempts.sample[i] || n + 1} `, badge(lastScore(i)));
    button.type = "button";
    button.addEventListener("click", () => showAttempt(turns, i, buttons, own));
    buttons.set(i, button);
    bar.append(button);
  }
  node.append(bar, turns);
  await showAttempt(turns, attempts[0], buttons, own);
  return node;
}

async function show(p) {
  const own = ++opening;
  problem = p;
  const runs = [chosen("run-a"), chosen("run-b")].filter((run) => run >= 0);
  byId("shown").setAttribute("aria-busy", "true");
  try {
    const [given, ...columns] = await Promise.all([
      load(index.attempts.run.length + p),
      ...runs.map((run) => column(run, p, own)),
    ]);
    if (own !== opening) return;
    const { id, benchmark, category, level } = index.problems;
    const about = [benchmark[p], category[p], level[p]].filter(Boolean).join(" \u00b7 ");
    const statement = element("div", "text statement");
    const nodes = [element("h2", "", id[p] || `Problem ${p + 1}`), element("p", "soft", about), statement];
    if (given.answer) nodes.push(part("Answer", given.answer, true));
    if (given.reference) nodes.push(part("Reference solution", given.reference, false));
    if (given.rubric) nodes.push(part("Rubric", given.rubric, false));
    byId("shown").replaceChildren(...nodes, element("div", `runs of-${columns.length}`, ...columns));
    write(statement, given.statement);
    byId("shown").scrollTop = 0;
  } catch (error) {
    if (own !== opening) return;
    byId("shown").replaceChildren(element("p", "error", `This problem cannot be shown: ${error.message}`));
  }
  byId("shown").removeAttribute("aria-busy");
}

// --- the start

function options(id, values) {
  byId(id).append(...values.map(([value, text]) => new Option(text, value)));
}

function fromAddress() {
  const place = location.hash.match(/^#problem-(\d{1,9})$/);
  const p = place ? Number(place[1]) : -1;
  return p < index.problems.id.length ? p : -1;
}

// Runs a and b so that the problem p is in one of them.
function bring(p) {
  if (fits(p)) return;
  byId("filters").reset();
  const run = of.findIndex((problems) => problems.has(p));
  if (run >= 0 && !of[chosen("run-a")].has(p)) byId("run-a").value = run;
}

async function go(p) {
  bring(p);
  problem = p;
  await filter();
  lines.get(at)?.setAttribute("aria-selected", true);
  await show(p);
}

async function start() {
  index = await unpack(byId("index").firstChild.data);
  of = index.runs.map(() => new Map());
  index.attempts.problem.forEach((p, i) => {
    const run = of[index.attempts.run[i]];
    if (run.has(p)) run.get(p).push(i);
    else run.set(p, [i]);
  });
  const { id, statement, benchmark, category, level } = index.problems;
  words = id.map((_, p) => [id[p], benchmark[p], category[p], level[p], statement[p]].join("\n").toLowerCase());
  options("run-a", index.runs.map((run, i) => [i, run.label]));
  options("run-b", index.runs.map((run, i) => [i, run.label]));
  for (const field of ["benchmark", "category", "level"]) {
    const values = [...new Set(index.problems[field])].sort();
    // A leading letter tells the empty value from "all".
    options(field, values.map((value) => [`=${value}`, value || "none"]));
    byId(field).parentNode.hidden = values.length < 2;
  }
  byId("run-b").parentNode.hidden = index.runs.length < 2;
  byId("problems").hidden = false;
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("input", filter);
  byId("filters").addEventListener("change", (event) => {
    if (["run-a", "run-b", "plain"].includes(event.target.id) && problem >= 0) show(problem);
  });
  byId("list").addEventListener("keydown", press);
  let drawing = false;
  byId("list").addEventListener("scroll", () => {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(() => {
      drawing = false;
      draw();
    });
  });
  new ResizeObserver(draw).observe(byId("list"));
  addEventListener("hashchange", () => {
    if (fromAddress() >= 0) go(fromAddress());
  });
  const linked = fromAddress();
  await filter();
  performance.mark("list-ready");
  if (linked >= 0) {
    await go(linked);
    byId("problems").scrollIntoView();
  } else if (found.length) {
    at = 0;
    lines.get(0)?.setAttribute("aria-selected", true);
    await show(found[0]);
  }
  performance.mark("problems-ready");
}

start().catch((error) => {
  byId("problems").hidden = false;
  byId("problems").replaceChildren(element("p", "error", `The problems cannot be shown: ${error.message}`));
});
