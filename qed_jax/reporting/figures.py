"""The report's pictures: scores with their intervals, and panels of metrics, in matplotlib."""

import base64
import io
import math
import statistics

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

# Panels come in this order, the rest of the metrics after them by name.
PANELS = (
  "reward", "loss", "length", "dead_group_share", "truncation_share", "invalid_share", "entropy",
  "kl", "ratio", "clip_share", "ess", "grad_norm", "lag", "tokens_per_s", "mfu",
)  # fmt: skip
MOST_POINTS = 400
MOST_LINES = 8
MOST_DRAWN = 12  # runs, and benchmarks, of one picture; tables have all
ACROSS = 3  # pictures of judges beside one another

INK, GRID = "#24292f", "#d0d7de"
COLOURS = ("#0b6bcb", "#c2570c", "#1a7f37", "#8250df", "#bf3989", "#0f766e", "#6e7781", "#9a6700")
DARK = dict(
  zip(
    (INK, GRID, *COLOURS),
    ("#dde3ea", "#3a424d")
    + ("#6cb6ff", "#f0883e", "#57ab5a", "#b083f0", "#e275ad", "#39c5bb", "#909dab", "#daaa3f"),
    strict=True,
  )
)
STYLE = {
  "svg.fonttype": "path",
  "svg.hashsalt": "qed_jax",
  "text.parse_math": False,  # a label is text, also when it holds a dollar sign
  "font.size": 9,
  "axes.titlesize": 9.5,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": GRID,
  "axes.labelcolor": INK,
  "axes.titlecolor": INK,
  "text.color": INK,
  "xtick.color": INK,
  "ytick.color": INK,
  "axes.grid": True,
  "grid.color": GRID,
  "grid.linewidth": 0.6,
  "legend.frameon": False,
  "legend.fontsize": 8,
}

Curve = tuple[list[float], list[float]]


def picture(figure: Figure) -> str:
  """The figure as a data URI of an SVG that follows the reader's light or dark theme."""
  out = io.StringIO()
  figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
  svg = out.getvalue()
  rules = "".join(
    f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
    for light, dark in DARK.items()
    for what in ("fill", "stroke")
  )
  style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style></svg>"
  svg = svg[svg.index("<svg") :].rstrip().removesuffix("</svg>") + style
  return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def short(text: str, longest: int = 34) -> str:
  text = " ".join(text.split())
  return text if len(text) <= longest else text[: longest - 1] + "\u2026"


def spread(rows: list[dict]) -> list[list[float]]:
  """How far the intervals reach below and above the scores."""
  below = [max(r["score"] - r["low"], 0) for r in rows]
  return [below, [max(r["high"] - r["score"], 0) for r in rows]]


def draw_points(ax: Axes, x: list[float], rows: list[dict], colour: str, label: str) -> None:
  low, high = ([r[k] for r in rows] for k in ("low", "high"))
  ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
  look = {"color": colour, "marker": "o", "ms": 4, "lw": 1.6, "elinewidth": 1, "capsize": 2}
  ax.errorbar(x, [r["score"] for r in rows], spread(rows), label=short(label), **look)


def span(results: list[dict]) -> tuple[float, float]:
  """The score axis: shares, rubric points, percents, or as far as the scores go."""
  highest = max(r["high"] for r in results)
  end = next((m for m in (1.0, 7.0, 100.0) if highest <= m), highest)
  return -0.02 * end, 1.02 * end


def scores(results: list[dict]) -> Figure:
  """Left the score of every row, hollow after the first turn; right after each turn."""
  figure = Figure(figsize=(11, max(3.6, 1.3 + 0.42 * len(results))), layout="constrained")
  left, right = figure.subplots(1, 2)
  for y, row in enumerate(results):
    colour = COLOURS[y % len(COLOURS)]
    first, *later = row["by_turn"]
    look = {"color": colour, "marker": "o", "ms": 6, "capsize": 4}
    if later:
      left.plot([first["score"], row["score"]], [y, y], color=colour, lw=0.8, ls=":")
      left.errorbar([first["score"]], [y], xerr=spread([first]), **look, lw=1, mfc="none")
    left.errorbar([row["score"]], [y], xerr=spread([row]), **look, lw=2)
    place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
    left.annotate(f"{row['score']:.2f}", (row["score"], y), **place)
    turns = [r["turn"] for r in row["by_turn"]]
    draw_points(right, turns, row["by_turn"], colour, row["label"])
  left.set_yticks(range(len(results)), [short(r["label"]) for r in results])
  left.set_ylim(len(results) - 0.4, -0.75)
  several = any(len(r["by_turn"]) > 1 for r in results)
  title = "Score after the last turn" + (" (hollow: after the first)" if several else "")
  left.set(title=title, xlabel="mean score", xlim=span(results))
  left.grid(axis="y", visible=False)
  right.set(title="Score after each turn", xlabel="turn", ylabel="mean score", ylim=span(results))
  right.xaxis.get_major_locator().set_params(integer=True)
  right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
  return figure


def scores_by_length(results: list[dict]) -> Figure:
  """A line for every row; dotted the single pass of the last row that has one."""
  figure = Figure(figsize=(11, max(3.4, 0.8 + 0.19 * len(results))), layout="constrained")
  ax = figure.subplots()
  names = list(dict.fromkeys(r["length"] for row in results for r in row["by_length"]))
  alone = {}
  for i, row in enumerate(results):
    colour, x = COLOURS[i % len(COLOURS)], [names.index(r["length"]) for r in row["by_length"]]
    if x:
      draw_points(ax, x, row["by_length"], colour, row["label"])
    once = [r["single_pass"] for r in row["by_length"]]
    if x and all(once) and len(row["by_turn"]) > 1:
      label = short(f"{short(row['label'], 20)}, first turn")
      alone = {"y": [p["score"] for p in once], "x": x, "color": colour, "label": label}
  if alone:
    ax.plot(alone.pop("x"), alone.pop("y"), ls=":", lw=1.6, **alone)
  ax.set_xticks(range(len(names)), [short(n, 16) for n in names])
  ax.set(xlabel="length of the problem", ylabel="mean score", ylim=span(results))
  ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
  return figure


def colours(rows: list[dict], key: str) -> dict[str, str]:
  names = dict.fromkeys(row[key] for row in rows)
  return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def by_benchmark(rows: list[dict]) -> Figure:
  """Benchmarks down the page, in each a point with its interval for each of the first runs."""
  colour = dict(list(colours(rows, "run").items())[:MOST_DRAWN])
  names = list(dict.fromkeys(row["benchmark"] for row in rows if row["run"] in colour))[:MOST_DRAWN]
  rows = [row for row in rows if row["run"] in colour and row["benchmark"] in names]
  height = 1.4 + len(names) * max(0.5, 0.2 * len(colour))
  figure = Figure(figsize=(11, height), layout="constrained")
  ax = figure.subplots()
  for i, (run, look) in enumerate(colour.items()):
    found = [row for row in rows if row["run"] == run]
    shift = (i - (len(colour) - 1) / 2) * 0.7 / len(colour)
    y = [names.index(row["benchmark"]) + shift for row in found]
    x = [row["score"] for row in found]
    ax.errorbar(x, y, xerr=spread(found), color=look, fmt="o", ms=5, capsize=3, label=short(run))
  ax.set_yticks(range(len(names)), [short(n) or "no benchmark named" for n in names])
  ax.set_ylim(len(names) - 0.45, -0.55)
  ax.set(xlabel="mean score", xlim=span(rows))
  ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
  return figure


def by_tokens(curves: dict[str, list[dict]]) -> Figure:
  """Score after each turn over the tokens written up to there, a line for each run drawn."""
  curves = dict(list(curves.items())[:MOST_DRAWN])
  figure = Figure(figsize=(11, max(3.6, 0.8 + 0.19 * len(curves))), layout="constrained")
  ax = figure.subplots()
  for i, (run, points) in enumerate(curves.items()):
    draw_points(ax, [p["tokens"] for p in points], points, COLOURS[i % len(COLOURS)], run)
  tokens = [p["tokens"] for points in curves.values() for p in points]
  if min(tokens) > 0 and max(tokens) > 30 * min(tokens):
    plain_log(ax.xaxis)
  rows = [p for points in curves.values() for p in points]
  ax.set(xlabel="tokens of an attempt so far, mean", ylabel="mean score", ylim=span(rows))
  ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
  return figure


def calibration(judges: list[dict]) -> Figure:
  """Of each judge drawn how often it gave which grade for people's, and its mean with interval."""
  judges = judges[:MOST_DRAWN]
  down = math.ceil(len(judges) / ACROSS)
  figure = Figure(figsize=(11, 3.5 * down), layout="constrained")
  places = figure.subplots(down, ACROSS, squeeze=False).flatten()
  for ax in places[len(judges) :]:
    ax.set_visible(False)
  for i, (ax, judge) in enumerate(zip(places, judges, strict=False)):
    colour = COLOURS[i % len(COLOURS)]
    cells = [(h, j, n) for h, row in enumerate(judge["counts"]) for j, n in enumerate(row) if n]
    most = max((n for *_, n in cells), default=1)
    ax.plot([0, 7], [0, 7], color=GRID, lw=1, zorder=0)
    sizes = [160 * n / most for *_, n in cells]
    ax.scatter([c[0] for c in cells], [c[1] for c in cells], sizes, color=colour, alpha=0.3, lw=0)
    curve = judge["curve"]
    if curve:
      draw_points(ax, [p["human"] for p in curve], curve, colour, judge["run"])
    ax.set(title=short(judge["run"], 40), xlabel="people's grade", ylabel="judge's grade")
    ax.set(xlim=(-0.5, 7.5), ylim=(-0.5, 7.5), xticks=range(8), yticks=range(8))
  return figure


def plain_log(axis: Axis) -> None:
  """A logarithmic axis with plain numbers; matplotlib's own formatter writes mathematics."""
  getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
  axis.set_major_formatter("{x:g}")
  axis.set_minor_formatter(NullFormatter())


def panels(by_name: dict[str, Curve]) -> list[dict]:
  """One picture for each group of metrics: reward/mean and reward/turn_2 share the panel reward."""
  groups: dict[str, list[str]] = {}
  for name in sorted(by_name):
    groups.setdefault(name.split("/")[0], []).append(name)

  def order(group: str):
    return next((i for i, p in enumerate(PANELS) if group.startswith(p)), len(PANELS)), group

  return [
    panel(group, {n: by_name[n] for n in groups[group]}) for group in sorted(groups, key=order)
  ]


def panel(group: str, lines: dict[str, Curve]) -> dict:
  figure = Figure(figsize=(4.1, 2.35), layout="constrained")
  ax = figure.subplots()
  shown = list(lines)[:MOST_LINES]
  for name, colour in zip(shown, COLOURS, strict=False):
    x, y = thin(*lines[name])
    label = short(name.removeprefix(group).lstrip("/") or "value", 22)
    ax.plot(x, y, color=colour, lw=1.4, marker="o" if len(x) < 12 else None, ms=3, label=label)
  middles = [statistics.median(lines[n][1]) for n in shown]
  if min(min(lines[n][1]) for n in shown) > 0 and max(middles) > 30 * min(middles):
    plain_log(ax.yaxis)
  ax.set_xlabel("step")
  if len(set(lines[shown[0]][1])) == 1 == len(shown):
    ax.set_ylim(lines[shown[0]][1][0] - 1, lines[shown[0]][1][0] + 1)
  if len(lines) > 1:
    longest = max(len(text) for text in ax.get_legend_handles_labels()[1])
    columns = max(1, min(4, 40 // longest))
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=columns, columnspacing=1)
  more = f" ({MOST_LINES} of {len(lines)})" if len(lines) > MOST_LINES else ""
  first, last = (f"{lines[shown[0]][1][i]:.4g}" for i in (0, -1))
  alt = f"{group}: from {first} to {last}"
  return {"title": short(group) + more, "alt": alt, "src": picture(figure)}


def thin(x: list[float], y: list[float]) -> Curve:
  """At most MOST_POINTS points: means of equal runs of neighbours."""
  run = math.ceil(len(x) / MOST_POINTS)
  cuts = range(0, len(x), run)
  return tuple([statistics.fmean(v[i : i + run]) for i in cuts] for v in (x, y))
