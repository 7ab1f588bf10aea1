"""The page of one or several runs: loss, speed, grounding and events, in one HTML file."""
