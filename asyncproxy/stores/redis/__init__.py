"""The store on a Redis or Valkey server, for any number of processes.

Each operation is one Lua script (``lua/``) and one round trip. ``connection`` keeps the connections
open, ``node`` runs scripts on them, ``claims`` claims jobs, ``leases`` renews the claims.
Begin with ``store``, and ``lua/common.lua`` for the queue.
"""
