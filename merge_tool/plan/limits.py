"""The limits of a merge that the command line's help names. Importing them loads no code that computes."""

LEAST_BYTES = 64_000_000  # of memory, for the whole process
MAX_JOBS = 8
