"""A merge on many hosts: a plan file, workers that share no message, and receipts.

The plan file says what each part is; a worker makes parts and leaves a receipt for each; whoever finishes takes the
receipts for the shards of an ordinary merge that was interrupted. All of it lies in the work folder of OUT, which every
host must see. No engine, no server: engines start workers (engines.py), or a scheduler does.
"""
