"""The store on a Redis or Valkey server, for any number of processes.

Each operation is one Lua script (``lua/``) and one round trip. ``connection`` keeps the connections
open, ``claims`` and ``leases`` hold what this process has claimed.
Begin with ``store``, and ``lua/common.lua`` for the queue.
"""
