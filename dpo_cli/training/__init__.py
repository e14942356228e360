"""What `train` is made of: rows to token ids, the loop and its guards, the packed forward, the run folder."""
