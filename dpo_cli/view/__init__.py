"""What people see: progress, tables, plots and pairs side by side, drawn with rich.

Besides cli.py, the modules of this package are the only ones that import rich. They compute nothing: numbers come
from `analysis`, rows from `data.row_index`. Every function takes the console to draw on; text that others wrote passes
through `text.safe`. Nothing is imported here: a command loads the one module that it shows its result with.
"""
