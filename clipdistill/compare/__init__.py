"""``clipdistill compare``: arms with equal numbers of trials and the same seeds, and what their differences show."""
