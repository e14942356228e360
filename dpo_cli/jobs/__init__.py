"""A command that runs somewhere else: its spec, the record of what was submitted, the worker there, and the backends.

`launch` submits and follows; `worker` is what a container starts. A container imports this package before anything
else, so nothing is imported here.
"""
