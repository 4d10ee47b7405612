"""``clipdistill tune``: a search of settings on validation sets, which processes share and kills do not end."""
