"""Pages to look at: one file each, opened from the disk, with nothing fetched from anywhere."""
