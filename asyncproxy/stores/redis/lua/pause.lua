-- Pauses a lane in which somebody waits. 3 upstream, 4 lane, 5 for how long, in ms.
if call('EXISTS', lane_key(ARGV[4])) == 1 or call('HEXISTS', P .. 'delayed', ARGV[4]) == 1 then
  pause(ARGV[3], ARGV[4], now() + ARGV[5])
end
return 0
