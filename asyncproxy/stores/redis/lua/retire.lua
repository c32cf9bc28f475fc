-- Drops the alias of a result that was delivered, if it is for once, and lets the result expire in 4 ms at
-- the latest. 3 id.
local id, key = ARGV[3], job_key(ARGV[3])
local job = call('HMGET', key, 's', 'k', 't', 'e')
if job[1] ~= '2' or not job[2] or string.sub(job[2], 1, 1) ~= '1' then return 0 end
drop_alias(id, job[2])
call('HDEL', key, 'k')
local expiry = math.min(job[4], now() + ARGV[4])
call('ZADD', RESULTS, expiry, job[3] .. ':' .. id)
call('HSET', key, 'e', expiry)
if ARGV[1] == '' then
  call('PEXPIREAT', key, expiry)
  call('PEXPIREAT', parts_key(id), expiry)
end
return 1
