-- A node's sign of life. 3 length of the lease, 4 how many upstreams it serves, then these, then the claims
-- that it holds: id, claims, … The ids of those that are lost.
local time, lease, served = now(), tonumber(ARGV[3]), tonumber(ARGV[4])
for i = 5, 4 + served do call('ZADD', P .. 'served', 'GT', time, ARGV[i]) end
local lost = {}
for i = 5 + served, #ARGV, 2 do
  local id = ARGV[i]
  local job = call('HMGET', job_key(id), 's', 'n', 'h', 'u', 'l')
  if holds(job[1], job[2], job[3], ARGV[i + 1]) then
    if job[1] == '0' then
      unqueue(id, job[4], job[5])
      call('HSET', job_key(id), 's', 1)
    end
    call('ZADD', LEASES, time + lease, id)
  else
    lost[#lost + 1] = id
  end
end
return lost
