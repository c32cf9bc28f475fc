"""Where jobs live until their results expire. Three backends keep the same promises.

``memory`` keeps them in this process, ``sqlite`` in a file of this process, ``redis`` on a server
for many processes. ``fair_queue`` decides which job is next, ``codec`` seals what is at rest.
May import: ``core``, ``wire``, ``loop``.
Begin with ``base``: what every store promises. Then ``memory``, the shortest store.
"""
