"""The limits of a merge that the command line's help names, without what computes with them."""

LEAST_BYTES = 64_000_000  # of memory, for the whole process
MAX_JOBS = 8
