"""Our models in lm-evaluation-harness, and our tasks for any of its models; an extra."""
