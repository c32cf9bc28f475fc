"""HTTP: the ways in for clients, and the pages for operators. Only this folder answers requests.

``async_api``, ``header_async`` and ``relay`` are three ways to the same ``service``;
``passthrough`` streams all other requests to the upstream; ``admin`` and ``health`` serve ``/-/``. The
other modules read requests and write responses.
May import: ``service`` and all folders before it.
Begin with ``async_api``.
"""
