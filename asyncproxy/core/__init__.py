"""What a job is: its states, its outcome, what can go wrong with it, what there is to observe.

Pure data and rules. Nothing here does I/O, reads a clock or knows HTTP.
May import: nothing of ours.
Begin with ``jobs``: the states of a job, and the steps between them.
"""
