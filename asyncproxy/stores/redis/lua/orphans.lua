-- Claims waiting jobs of upstreams that no node has served for some time, a hundred at the most. 3 length
-- of the lease, 4 that time in ms, 5… the upstreams that are served here. {record, claims, attempts}…
local time, reply, served = now(), {}, {}
for i = 5, #ARGV do served[ARGV[i]] = true end
local totals = call('HGETALL', TOTALS)
for i = 1, #totals, 2 do
  local upstream = string.match(totals[i], '^w:(.*)$')
  if upstream and not served[upstream] and tonumber(totals[i + 1]) > 0 then
    local seen = call('ZSCORE', P .. 'served', upstream)
    if not seen or seen + ARGV[4] <= time then
      ripen(upstream, '+inf')
      local taken = 0
      while #reply < 100 do
        local id = pop(upstream)
        if not id then break end
        local job = call('HMGET', job_key(id), 'j', 'a')
        if job[1] then
          taken = taken + 1
          reply[#reply + 1] = {job[1], hold(id, time, tonumber(ARGV[3])), job[2]}
        end
      end
      gone(upstream, taken)
    end
  end
end
return reply
