"""Make WebDataset shards from image folders, tables, Hugging Face data sets and icon fonts.

    sources.from_image_folder ─┐             ┌─ writing.write_shards ────────────────> 0.tar .. n-1.tar, nshards.txt
    sources.from_csv ──────────┼─> samples ──┼─ writing.write_classification_folder ─> <split>/ of these, class names
    sources.from_hf_dataset ───┤             └─ writing.write_retrieval_folder ──────> <split>/ of these
    icons.render_icons ────────┘

command.py is ``clipdistill shards``.
"""
