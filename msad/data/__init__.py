"""Annotations and pictures to batches. Imports the paper's files, nothing of engine."""
