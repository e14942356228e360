"""The packed forward pass: rows without padding, prompts shared by both sides, a kept reference."""
