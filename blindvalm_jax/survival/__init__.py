"""What a run survives: being told to stop, and hanging (docs/reliability.md)."""
