"""Records on disk: what they are (`records`), journals of them (`jsonl`), whole files (`files`), other formats."""
