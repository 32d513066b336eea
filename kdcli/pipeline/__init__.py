"""Runs steps of augmentation over rows: asking writers in order and never twice, resuming, planning."""
