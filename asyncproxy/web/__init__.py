"""HTTP: the ways in for clients, and the pages for operators. The only room that answers requests.

``async_api``, ``header_async`` and ``relay`` are three ways to the same ``service``;
``passthrough`` streams all else to the upstream; ``admin`` and ``health`` serve ``/-/``. The rest
reads requests and writes responses.
May import: ``service`` and all rooms before it.
Begin with ``async_api``.
"""
