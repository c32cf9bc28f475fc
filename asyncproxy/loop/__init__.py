"""The event loop, kept fair and quick.

``heavy_work`` spaces out what takes long, ``write_coalescing`` groups small writes, ``lag``
measures how late the loop is.
May import: ``core``, ``wire``.
Begin with ``heavy_work``.
"""
