"""What several test folders share: writers of small checkpoints. Importable as `support` (see pytest's pythonpath)."""
