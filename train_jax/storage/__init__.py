"""Tensors and records in files: safetensors, lazy tensors, examples, shards, exported models."""
