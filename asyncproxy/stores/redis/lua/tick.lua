-- Housekeeping. 3 whether lapsed leases are taken over (1), 4… upstreams. How many jobs of each have gone.
local time, gone_by = now(), {}
trim(time, 1000)
if ARGV[3] == '1' then recover(time, 100) end
for i = 4, #ARGV do gone_by[i - 3] = tonumber(call('HGET', TOTALS, 'd:' .. ARGV[i]) or 0) end
return gone_by
