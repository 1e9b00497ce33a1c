"""The Trainer, its checkpoints, averages and losses."""
