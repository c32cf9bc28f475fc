-- Records the outcome of a claimed job. 3 id, 4 claims, 5 token, 6 outcome, 7 its size, 8 its lifetime in ms,
-- 9 its field, 10… its parts.
-- 1: recorded, by this call or by one before with the same token, whose reply was lost. 0: the claim was
-- lost. -1: the job waits, and is nobody's.
local id, key = ARGV[3], job_key(ARGV[3])
local job = call('HMGET', key, 's', 'n', 'h', 'u', 'l', 't', 'k', 'w', 'g')
if not job[1] then return 0 end
if job[1] == '2' then return job[9] == ARGV[5] and 1 or 0 end
if job[2] ~= ARGV[4] then return 0 end
if not holds(job[1], job[2], job[3], ARGV[4]) then return -1 end
if job[1] == '0' then unqueue(id, job[4], job[5]) end
local expiry = now() + math.max(1, ARGV[8])
uncount(id, job[5], job[6])
call('HINCRBY', TOTALS, 'result_bytes', ARGV[7])
call('ZADD', RESULTS, expiry, ARGV[7] .. ':' .. id)
-- As a new key: neither the call nor anything else of the live job stays.
call('DEL', key)
call('HSET', key, 's', 2, 'n', job[2], 'g', ARGV[5], ARGV[9], ARGV[6], 't', ARGV[7], 'e', expiry)
for i = 10, #ARGV do call('HSET', parts_key(id), i - 10, ARGV[i]) end
local alias = job[7]
if alias then call('HSET', key, 'k', alias) end
-- With a clock that is passed in, the scripts and the nodes look at the expiry themselves.
if ARGV[1] == '' then
  call('PEXPIREAT', key, expiry)
  if #ARGV >= 10 then call('PEXPIREAT', parts_key(id), expiry) end
  local name = alias and P .. 'alias:' .. string.sub(alias, 2)
  if name and call('HGET', name, 'i') == id then call('PEXPIREAT', name, expiry) end
end
tell_waiters(job[8], 'f' .. id)
return 1
