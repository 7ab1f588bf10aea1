"""Rows read in pieces: caches of decoder and tower."""
