"""Thin adapters between noiseopt and training frameworks; import them as noiseopt.integrations."""
