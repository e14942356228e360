"""Direct Preference Optimization of a LoRA adapter on a budget."""

__version__ = "0.1.0"
