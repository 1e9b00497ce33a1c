"""Clips: loading, dividing, decoding, features, windows."""
