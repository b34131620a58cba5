// Markdown and TeX to nodes. What the model wrote becomes text nodes, or MathML made by Temml without
// trust: never markup.
"use strict";

const LONGEST_FORMULA = 20000; // characters; a longer one is shown as it is
const LONGEST_BLOCK = 20000; // the same; searching a block for formulas can take its length squared
const DEEPEST_FORMULA = 100; // elements in one another; browsers lay deeper ones out slowly
const TEMML = { throwOnError: true, trust: false, maxExpand: 1000, maxSize: [40, 400] };
const ENVIRONMENTS = "equation|align|alignat|gather|multline|eqnarray|split|cases|array|[pbvBV]?matrix";
const INLINE = new RegExp(
  [
    "(?<code>`[^`\\n]+`)",
    "\\$\\$(?<dollars>[^]+?)\\$\\$",
    "\\\\\\[(?<bracket>[^]+?)\\\\\\]",
    "\\\\\\((?<paren>[^]+?)\\\\\\)",
    `(?<env>\\\\begin\\{(?<name>(?:${ENVIRONMENTS})\\*?)\\}[^]+?\\\\end\\{\\k<name>\\})`,
    "(?<!\\\\)\\$(?=\\S)(?<dollar>(?:\\\\[^]|[^$\\\\])+?)(?<!\\s)\\$(?!\\d)",
    "\\*\\*(?=\\S)(?<bold>[^]+?)\\*\\*",
    "(?<![\\w*])\\*(?=[^\\s*])(?<italic>[^*\\n]+?)\\*(?![\\w*])",
    "(?<literal>\\\\[$*_#`])",
  ].join("|"),
  "g",
);

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function deeper(node, levels) {
  let row = [node];
  for (; row.length && levels; levels--) row = row.flatMap((parent) => [...parent.children]);
  return row.length > 0;
}

// source: as it stands in the text, shown where Temml cannot read it.
function formula(tex, display, source) {
  const node = element("span", display ? "display" : "formula");
  try {
    if (tex.length > LONGEST_FORMULA) throw new RangeError("too long");
    temml.render(tex, node, { ...TEMML, displayMode: display });
    if (deeper(node, DEEPEST_FORMULA)) throw new RangeError("too deep");
    // \ref would be a link to anywhere on the page, and \label an id that the page's scripts use.
    if (node.querySelector("a")) throw new RangeError("a link");
    for (const named of node.querySelectorAll("[id]")) named.removeAttribute("id");
  } catch (error) {
    node.replaceChildren(element("code", "", source));
  }
  return node;
}

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    const g = match.groups;
    if (g.code) nodes.push(element("code", "", g.code.slice(1, -1)));
    else if (g.bold) nodes.push(element("strong", "", ...inline(g.bold)));
    else if (g.italic) nodes.push(element("em", "", ...inline(g.italic)));
    else if (g.literal) nodes.push(g.literal.slice(1));
    else if (g.paren || g.dollar) nodes.push(formula(g.paren || g.dollar, false, match[0]));
    else nodes.push(formula(g.dollars || g.bracket || g.env, true, match[0]));
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

function list(lines) {
  const node = element(/^\s*\d/.test(lines[0]) ? "ol" : "ul");
  const items = [];
  for (const line of lines) {
    const start = line.match(/^\s*(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/);
    if (start) {
      if (!items.length && start[1]) node.start = Number(start[1]);
      items.push(start[2]);
    } else {
      items[items.length - 1] += "\n" + line;
    }
  }
  node.append(...items.map((item) => element("li", "", ...inline(item))));
  return node;
}

function block(source) {
  if (source.length > LONGEST_BLOCK) return element("pre", "", source);
  const heading = source.match(/^(#{1,6})\s+(.+)$/);
  if (heading) return element(`h${Math.min(heading[1].length + 1, 4)}`, "", ...inline(heading[2]));
  if (/^\s*(?:[-*_]\s*){3,}$/.test(source)) return element("hr");
  const fence = source.match(/^```.*\n?([^]*?)(?:```\s*)?$/);
  if (fence) return element("pre", "", element("code", "", fence[1]));
  if (/^\s*(?:[-*+]|\d{1,9}[.)])\s+\S/.test(source)) return list(source.split("\n"));
  return element("p", "", ...inline(source));
}

// Blocks end at blank lines, outside of code and displayed formulas; headings stand alone.
function blocks(text) {
  const found = [];
  let lines = [];
  let closing = null;
  const flush = () => {
    if (lines.length) found.push(lines.join("\n"));
    lines = [];
  };
  for (const line of text.split("\n")) {
    const trimmed = line.trim();
    if (closing) {
      lines.push(line);
      if (trimmed.includes(closing)) closing = null;
      continue;
    }
    if (!trimmed) {
      flush();
      continue;
    }
    const single = /^#{1,6}\s/.test(trimmed) || /^(?:[-*_]\s*){3,}$/.test(trimmed);
    if (single || trimmed.startsWith("```")) flush();
    lines.push(line);
    if (single) flush();
    const opening = trimmed.match(/^(```|\$\$|\\\[|\\begin\{[a-zA-Z]+\*?\})(.*)$/);
    if (opening) {
      const close = { "\\[": "\\]" }[opening[1]] || opening[1].replace("\\begin", "\\end");
      if (!opening[2].includes(close)) closing = close;
    }
  }
  flush();
  return found;
}

// A growing text: blocks that have not changed keep their nodes, so that long proofs stay quick.
class Text {
  constructor(node, visible = () => true) {
    this.node = node;
    this.visible = visible;
    this.text = "";
    this.shown = [];
    this.waiting = false;
  }

  add(text) {
    this.text += text;
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.show();
    });
  }

  show() {
    if (!this.visible()) return;
    const sources = blocks(this.text);
    let same = 0;
    while (same < sources.length && same < this.shown.length && sources[same] === this.shown[same]) same++;
    while (this.node.childNodes.length > same) this.node.lastChild.remove();
    this.node.append(...sources.slice(same).map(block));
    this.shown = sources;
  }
}
