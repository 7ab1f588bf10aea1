"""Checkpoints of a run: written, kept, checked, compared and averaged."""
