"""The operator's configuration: the YAML, typed and checked, and what it means to each part.

May import: all rooms before it (``core`` to ``web``). Only ``app`` and ``cli`` import it.
Begin with ``model``: every key, its type and its default.
"""
