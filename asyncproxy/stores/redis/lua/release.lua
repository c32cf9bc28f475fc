-- Makes a claimed job wait again. 3 id, 4 claims, 5 attempts, 6 delay in ms, 7 whether the lane waits (1),
-- 8 whether the node claims right behind it (1), 9 upstream, 10 lane, 11 record, 12 call (each empty: the
-- same), 13 size, if there is another call. 0: the claim was lost.
local id, key = ARGV[3], job_key(ARGV[3])
local upstream, lane, delay = ARGV[9], ARGV[10], tonumber(ARGV[6])
local job = call('HMGET', key, 's', 'n', 'h', 'u', 'l', 'o', 't')
if not holds(job[1], job[2], job[3], ARGV[4]) then return 0 end
if job[1] == '0' then unqueue(id, job[4], job[5]) end
local order = job[6]
if job[4] ~= upstream then order = call('HINCRBY', TOTALS, 'seq', 1) end
call('ZREM', LEASES, id)
call('HSET', key, 's', 0, 'h', '', 'a', ARGV[5], 'u', upstream, 'l', lane, 'o', order)
if ARGV[11] ~= '' then call('HSET', key, 'j', ARGV[11]) end
if ARGV[12] ~= '' then
  call('HSET', key, 'c', ARGV[12], 't', ARGV[13])
  call('HINCRBY', TOTALS, 'live_bytes', ARGV[13] - job[7])
end
local due = delay > 0 and now() + delay
if ARGV[7] == '1' then
  enqueue(id, upstream, lane, order)
  if due then pause(upstream, lane, due) end
else
  enqueue(id, upstream, lane, order, due)
end
-- Also for a job that is not due: whoever waits has to know when it is.
if ARGV[8] ~= '1' then wake(upstream) end
return 1
