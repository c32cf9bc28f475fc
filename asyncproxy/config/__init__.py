"""The operator's configuration: the YAML, typed and checked, and the options of each part from it.

May import: all folders before it (``core`` to ``web``). Only ``app`` and ``cli`` import it.
Begin with ``model``: every key, its type and its default.
"""
