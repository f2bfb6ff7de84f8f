"""Names of the files in a run's folder. Nothing here imports torch, so that folders can be looked at quickly."""

CONFIG = "config.yaml"
WEIGHTS, SPEC = "encoder.safetensors", "encoder.json"
"""The encoder of a finished run, and all that is needed to use it."""
EVALUATION = "evaluation.json"
"""What the newest evaluation found."""
STOPPED = "stopped.txt"
"""Why the last start ended, if another start would end in the same way."""
