"""Compression and recovery techniques: one file each, found by `trimpoint.registry.all_methods`."""
