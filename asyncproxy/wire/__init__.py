"""Bytes in and bytes out: header fields, credentials, JSON, forms, the envelope of a job.

Pure functions. Everything that a client or an upstream sends is read here, in time linear in its
length.
May import: ``core``.
Begin with ``submission``: how a request body becomes a job. Then ``envelope``: how a job becomes a
response.
"""
