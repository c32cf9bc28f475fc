-- Claims waiting jobs of upstreams that no node has served for some time, a hundred at the most. 3 length
-- of the lease, 4 that time in ms, 5 how many upstreams this node has given up, then these, then those that
-- it serves. {{record, claims, attempts}…}, {upstream, ms until its jobs are claimed, …}.
local time, lease, patience, last = now(), tonumber(ARGV[3]), tonumber(ARGV[4]), 5 + ARGV[5]
-- A node that was told to give an upstream up does not come back to it. Others that serve it have a lease to
-- say so.
for i = 6, last do call('ZADD', P .. 'served', 'LT', time - patience + lease, ARGV[i]) end
local claimed, waits, served = {}, {}, {}
if superseded() then return {claimed, waits} end
for i = last + 1, #ARGV do served[ARGV[i]] = true end
local totals = call('HGETALL', TOTALS)
for i = 1, #totals, 2 do
  local upstream = string.match(totals[i], '^w:(.*)$')
  if upstream and not served[upstream] and tonumber(totals[i + 1]) > 0 then
    local seen = tonumber(call('ZSCORE', P .. 'served', upstream) or 0)
    if seen + patience <= time then
      ripen(upstream, '+inf')
      local taken = 0
      while #claimed < 100 do
        local id = pop(upstream)
        if not id then break end
        local job = call('HMGET', job_key(id), 'j', 'a')
        if job[1] then
          taken = taken + 1
          claimed[#claimed + 1] = {job[1], hold(id, time, lease), job[2]}
        end
      end
      gone(upstream, taken)
    elseif seen + lease <= time then
      waits[#waits + 1] = upstream
      waits[#waits + 1] = seen + patience - time
    end
  end
end
return {claimed, waits}
