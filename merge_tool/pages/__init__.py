"""Pages for a browser: each is one file, opened from the disk, that loads nothing else."""
