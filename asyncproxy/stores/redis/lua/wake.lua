-- Passes a turn on that this node has no use for. 3 upstream.
wake(ARGV[3])
return 0
