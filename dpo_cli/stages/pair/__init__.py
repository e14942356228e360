"""Preference pairs from judgments, scored rollouts or the file of another tool. `run` is the stage."""
