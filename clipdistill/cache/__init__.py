"""The teacher cache: what the teachers say of every stored view of every sample, computed once.

build.py makes the files that ``clipdistill.data.embeddings`` reads; command.py is ``clipdistill cache``.
"""
