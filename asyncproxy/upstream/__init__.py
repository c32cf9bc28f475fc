"""The way to the gateways, and the only HTTP client of them.

``client`` is one gateway, ``exchange`` one HTTP/1.1 exchange with it, ``errors`` translates what the
library raises, ``registry`` holds the open upstreams, ``model_routes`` and ``target`` say which
upstream and which URL.
May import: all rooms before it (``core`` to ``observe``).
Begin with ``client``.
"""
