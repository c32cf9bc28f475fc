"""Where jobs live until their results expire. Three backends have the same contract.

``memory`` keeps jobs in this process, ``sqlite`` in a file of this process, ``redis`` on a server
for many processes. ``fair_queue`` decides which job is next, ``codec`` encrypts data at rest.
May import: ``core``, ``wire``, ``loop``.
Begin with ``base``: the contract of every store. Then ``memory``, the shortest store.
"""
