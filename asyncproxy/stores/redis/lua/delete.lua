-- Forgets a job. 3 id. 0: there is none.
local id, key = ARGV[3], job_key(ARGV[3])
local job = call('HMGET', key, 's', 'h', 'u', 'l', 't', 'k', 'w', 'e')
if not job[1] or (job[8] and tonumber(job[8]) <= now()) then return 0 end
call('UNLINK', key, parts_key(id))
drop_alias(id, job[6])
if job[1] == '2' then
  call('ZREM', RESULTS, job[5] .. ':' .. id)
  call('HINCRBY', TOTALS, 'result_bytes', -job[5])
  return 1
end
if job[1] == '0' then unqueue(id, job[3], job[4]) end
uncount(id, job[4], job[5])
if job[2] ~= '' and job[2] ~= NODE then tell(job[2], 'l' .. id) end
tell_waiters(job[7], 'd' .. id)
return 1
