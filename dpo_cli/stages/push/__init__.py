"""Data, an adapter or a run to a volume, bucket, the Hub or a folder. `run` is the stage."""
