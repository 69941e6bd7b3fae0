"""Demonstration and benchmarks of shmx, importable as ``shmx.bench``."""
