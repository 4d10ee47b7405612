"""Report of a run as one HTML file: ``clipdistill report``."""
