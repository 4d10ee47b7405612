"""Test sets from shards, class folders and Hugging Face data sets."""
