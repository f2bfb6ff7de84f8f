"""What is done with a trained encoder: called from Python, exported, run over folders of images, searched with."""
