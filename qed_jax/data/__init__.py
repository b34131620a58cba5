"""From files and the hub to token rows: tokenizer, rows, problems, sft, packing, fine_proofs."""
