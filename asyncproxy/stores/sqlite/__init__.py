"""The store in a file, for one process. Jobs and results survive ``kill -9`` and a power loss.

``file`` opens the database, ``migrations`` bring it up to date, ``key_file`` reads its key. ``writer``
shares commits, ``readers`` reads in threads, ``queries`` has the SQL. ``results`` reads and counts
results, ``caches`` keeps recent ones, ``space`` makes the file smaller.
Begin with ``store``.
"""
