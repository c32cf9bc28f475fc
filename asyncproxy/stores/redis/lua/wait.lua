-- A job as it is, and that somebody waits for it here, if it is alive. 3 id.
local key = job_key(ARGV[3])
local job = call('HMGET', key, 's', 'n', 'a', 'j', 'f', 'p', 'e', 'w')
if job[1] and job[1] ~= '2' then
  local nodes = job[8] or ''
  if not string.find(',' .. nodes .. ',', ',' .. NODE .. ',', 1, true) then
    call('HSET', key, 'w', nodes == '' and NODE or nodes .. ',' .. NODE)
  end
end
return {job[1], job[2], job[3], job[4], job[5], job[6], job[7]}
