"""Tensors and records in files: safetensors, lazy tensors, records, shards, exported models."""
