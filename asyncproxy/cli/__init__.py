"""The command line: ``serve``, ``check`` and ``demo``; signals, workers, reloading.

May import: everything. Nothing imports it.
Begin with ``main``.
"""
