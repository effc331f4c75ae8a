"""A merge on many hosts: a plan file, workers that share no message, and receipts.

The plan file says what each part is. A worker makes parts, and writes a receipt for each piece. `merge-tool finish`
treats pieces with receipts as finished shards of an ordinary, interrupted merge. Everything lies in the work folder of
OUT, which every host must see. There is no server: an engine (engines.py) or a scheduler starts the workers.
"""
