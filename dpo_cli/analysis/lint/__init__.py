"""What is wrong with a file of pairs, and a cleaned copy. `run` goes through the rules."""
