"""Files, JSON lines, URLs, shipped resources and argument types: what every other room may use."""
