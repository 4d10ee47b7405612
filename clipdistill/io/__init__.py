"""Files, JSON lines, URLs, shipped resources and argument types, available to every other package."""
