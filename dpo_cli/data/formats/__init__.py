"""Preference data of other tools: read into our `Preference` rows (preferences.py), written for theirs (export.py)."""
