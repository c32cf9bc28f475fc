"""The way to the gateways, and the only HTTP client of them.

``client`` sends a request and translates the errors of the library, ``exchange`` is one HTTP/1.1
exchange, ``registry`` holds the open upstreams, ``model_routes`` and ``target`` say which upstream
and which URL.
May import: all rooms before it (``core`` to ``observe``).
Begin with ``client``.
"""
