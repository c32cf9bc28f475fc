"""What an operator sees: logs, metrics, traces, and how long the store takes.

Each observer is told of the frozen events of ``core.events``. No decision depends on an observer.
May import: ``core``, ``wire``, ``loop``, ``stores``.
Begin with ``metrics``.
"""
