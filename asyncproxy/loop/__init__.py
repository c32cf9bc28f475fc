"""The event loop: how tasks share it.

``heavy_work`` lets other tasks run between the steps of long work, ``write_coalescing`` groups small
writes, ``lag`` measures how late the loop runs.
May import: ``core``, ``wire``.
Begin with ``heavy_work``.
"""
