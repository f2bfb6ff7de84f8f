"""A run's folder: who holds it, its checkpoints, its figures and where they are sent, and what stops it."""
