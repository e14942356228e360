"""Is the DPO adapter better than the SFT adapter? `run` says in which steps that is found out."""
