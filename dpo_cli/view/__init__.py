"""What people see: progress, tables, plots and pairs side by side, drawn with rich.

Besides cli.py, the modules of this package are the only ones that import rich. They compute nothing: numbers come
from `stats`, records from the stages' files.
"""
