"""Evaluation tasks as data: what is asked, how it is scored, and what is known of it."""
