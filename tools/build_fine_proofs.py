"""Writes FineProofs rows (Parquet, JSONL, CSV, or a hub dataset) as ArrayRecord files.

python tools/build_fine_proofs.py --src=lm-provers/FineProofs-SFT --revision=COMMIT \\
  --config=sft_default --splits train --data-dir=DIR --max-bad-share=0.01

The last line of stdout is a JSON object: for each split the rows read, kept and bad.
"""

import argparse
import json
import logging
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from qed_jax.data import fine_proofs  # noqa: E402


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--src", required=True, help="file, folder or hub id of a dataset")
  parser.add_argument("--revision", help="commit hash, for a hub id")
  parser.add_argument("--config", required=True, choices=list(fine_proofs.CONFIGS))
  parser.add_argument("--splits", required=True, nargs="+")
  parser.add_argument("--data-dir", required=True, help="writes {data-dir}/fine_proofs/{config}")
  parser.add_argument("--max-bad-share", required=True, type=float, help="0 to 1")
  args = parser.parse_args()
  logging.basicConfig(format="%(message)s")
  try:
    reports = fine_proofs.build(
      args.src,
      args.data_dir,
      config=args.config,
      splits=args.splits,
      revision=args.revision,
      max_bad_share=args.max_bad_share,
    )
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  figures = {
    split: {"read": report.read, "kept": report.kept, "bad": len(report.bad)}
    for split, report in reports.items()
  }
  print(json.dumps(figures))
  return 0


if __name__ == "__main__":
  sys.exit(main())
