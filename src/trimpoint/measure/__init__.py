"""Measuring: static counts, latency, memory, quality and its intervals, the environment."""
