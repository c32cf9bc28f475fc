"""Takes jobs from the store, calls the upstream, decides what the answer means, records the outcome.

``dispatcher`` acts. ``retry`` and ``rate_limits`` decide, and are pure. ``workers`` bounds the
calls in flight.
May import: all rooms before it (``core`` to ``upstream``).
Begin with ``dispatcher``.
"""
