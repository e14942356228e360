"""The whole pipeline on this machine: no key, no GPU, no network."""
