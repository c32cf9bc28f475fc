"""The store in a file, for one process. Jobs and results survive ``kill -9`` and a power loss.

``file`` opens the database, ``key_file`` has its key, ``writer`` shares commits, ``space`` makes the
file smaller, ``store`` is the store.
Begin with ``store``.
"""
