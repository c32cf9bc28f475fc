-- Claims the waiting jobs that were created before a time, a hundred at the most. 3 length of the lease,
-- 4 that time. {record, claims, attempts}…
local time, reply, offset = now(), {}, 0
if superseded() then return reply end
repeat
  local ids = call('ZRANGE', CREATED, '-inf', ARGV[4], 'BYSCORE', 'LIMIT', offset, 100)
  for _, id in ipairs(ids) do
    local job = call('HMGET', job_key(id), 's', 'j', 'a', 'u', 'l')
    if job[1] == '0' and #reply < 100 then
      unqueue(id, job[4], job[5])
      reply[#reply + 1] = {job[2], hold(id, time, tonumber(ARGV[3])), job[3]}
    end
  end
  offset = offset + 100
until #ids < 100 or #reply == 100 or offset == 1000
return reply
