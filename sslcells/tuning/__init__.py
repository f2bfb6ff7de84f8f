"""Hyperparameter search: what is searched, the study that Optuna keeps, and its results."""
