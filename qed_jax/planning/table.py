"""Saved results of tools/plan.py as a table of Markdown."""

BEGIN, END = "<!-- plans:begin -->", "<!-- plans:end -->"
COLUMNS = (
  *("config", "chips", "mesh", "GB a chip", "of", "weights + optimizer", "scratch of a step"),
  *("sampler + KV", "GB sent (step)", "step, s", "MFU bound", "attempts", "compiled in"),
)


def table(results: list[dict]) -> str:
  """A row a result."""
  lines = [" | ".join(("", *COLUMNS, "")).strip(), "|" + "---|" * len(COLUMNS)]
  return "\n".join([*lines, *map(row, results)])


def row(r: dict) -> str:
  gb = r["gb"]
  mesh = " x ".join(f"{axis} {n}" for axis, n in r["mesh"].items() if n > 1) or "1"
  kept = gb["sampler"] + gb["kv"] + gb["summariser"] + gb["summariser_kv"] + gb["reference"]
  scratch = gb["gradients"] + gb["activations"] + gb["temporaries"]
  sent = ", ".join(f"{axes} {x:.0f}" for axes, x in r["sent_gb"].items() if x >= 0.5)
  sampling = r.get("sampling", {})
  compiled = f"{sum(r['compile_s'].values())} s" if "compile_s" in r else "estimated"
  cells = (
    f"`{r['config']}`", r["topology"], mesh, f"**{r['needed_gb']:.1f}**", f"{r['chip_gb']:.1f}",
    f"{gb['weights'] + gb['optimizer']:.2f}", f"{scratch:.2f}", f"{kept:.2f}" if kept else "",
    sent, f"{r['seconds']['seconds']:.1f} ({r['bound_by']})", f"{r['mfu_bound']:.2f}",
    sampling.get("attempts_of_max_length", ""), compiled,
  )  # fmt: skip
  return "| " + " | ".join(map(str, cells)) + " |"


def replaced(page: str, results: list[dict]) -> str:
  """A page with the block between the two marks made anew. Raises ValueError where it has none."""
  if BEGIN not in page or END not in page:
    raise ValueError(f"the page has no lines {BEGIN} and {END}: add them where the table goes")
  before, after = page.split(BEGIN)[0], page.split(END)[1]
  return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}"
