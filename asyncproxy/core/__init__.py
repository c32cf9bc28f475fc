"""What a job is: its states, its outcome, its errors, and the events that observers see.

Pure data and rules. Nothing here does I/O, reads a clock or knows HTTP.
May import: nothing of ours.
Begin with ``jobs``: the states of a job, and the steps between them.
"""
