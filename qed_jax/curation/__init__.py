"""Jobs that build data sets: rows in, rows out, with a card; curate.py is their program.

A job reads rows (`dataset`), asks a model or the rows of each other, keeps what is finished in a
`ledger`, and says which rows stay. `asking` bounds what is in flight and asks only what is missing.
"""
