"""The store in a file, for one process. Jobs and results survive ``kill -9`` and a power loss.

``file`` opens the database, ``key_file`` reads its key, ``writer`` shares commits, ``readers`` reads in
threads, ``queries`` has the SQL, ``caches`` keeps recent results, ``space`` makes the file smaller.
Begin with ``store``.
"""
