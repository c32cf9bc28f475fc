"""The HTTP client of the gateways.

``client`` is one gateway, ``exchange`` one HTTP/1.1 exchange with it, ``errors`` translates the errors
of aiohttp, ``registry`` holds the open upstreams, ``model_routes`` selects the upstream of a model,
``target`` builds URLs.
May import: all folders before it (``core`` to ``observe``).
Begin with ``client``.
"""
