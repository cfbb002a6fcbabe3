"""Trainer's mechanics without any algorithm: checkpoints, resuming, stage 1, checks, logs."""
