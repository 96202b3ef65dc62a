"""Compression and recovery techniques: one file each, found by `trimpoint.method.all_methods`."""
