"""Test sets: opened from shards, class folders or Hugging Face data sets."""
