"""Several processes as one run: collectives, the watchdog that reports a dead rank, and signals."""
