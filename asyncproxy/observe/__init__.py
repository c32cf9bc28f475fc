"""The operator's view: logs, metrics, traces, and the durations of store operations.

Each observer gets the frozen events of ``core.events``. No decision depends on an observer.
May import: ``core``, ``wire``, ``loop``, ``stores``.
Begin with ``metrics``.
"""
