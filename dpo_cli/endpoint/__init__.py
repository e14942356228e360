"""The client of OpenAI-compatible endpoints: pace, retries, money, batches."""
