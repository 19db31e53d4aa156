"""Recall and state tracking: tasks x models x learning rates x seeds."""
