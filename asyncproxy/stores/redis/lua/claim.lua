-- Claims jobs. 3 length of the lease, 4 upstream, 5 how many at the most, 6 most bytes of the store, 7 bytes
-- of calls after which it is enough, 8 whether lapsed leases are taken over (1), 9 whether the upstream is
-- noted as served (1), 10 bytes of a call beyond which it is left out, to be fetched by itself, 11… lanes of
-- which the node may claim only so many more: lane, number, …
-- {when something is due, in ms (-1: unknown, -2: only newer versions may claim), jobs gone, whether to ask
-- again (1), {record, call, claims,
-- attempts}…}. A node that gets less than it asked for is noted as idle in the same step, so that it cannot
-- miss a job that comes.
local lease, upstream, count, most = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local time, idle = now(), P .. 'idle:' .. ARGV[4]
if superseded() then
  wake(upstream)
  return {-2, -1, 0}
end
if ARGV[8] == '1' then recover(time, 32) end
if ARGV[9] == '1' then call('ZADD', P .. 'served', 'GT', time, upstream) end

local function full()
  local bytes = call('HMGET', TOTALS, 'live_bytes', 'result_bytes')
  return (bytes[1] or 0) + (bytes[2] or 0) >= most
end
if full() then
  trim(time, 500)
  if full() then
    call('SADD', idle, NODE)
    local first = call('ZRANGE', RESULTS, 0, 0, 'WITHSCORES')
    return {first[2] and math.max(0, first[2] - time) or -1, -1, 0}
  end
end

local rooms = nil
for i = 11, #ARGV, 2 do
  rooms = rooms or {}
  rooms[ARGV[i]] = tonumber(ARGV[i + 1])
end

ripen(upstream, time)
local reply, taken, bytes = {-1, -1, 0}, 0, 0
while taken < count do
  if bytes >= tonumber(ARGV[7]) then
    reply[3] = 1
    break
  end
  local id = pop(upstream, rooms)
  if not id then break end
  local job = call('HMGET', job_key(id), 'j', 'c', 'a')
  if job[1] then
    taken, bytes = taken + 1, bytes + #job[2]
    local sealed = #job[2] > tonumber(ARGV[10]) and '' or job[2]
    reply[3 + taken] = {job[1], sealed, hold(id, time, lease), job[3]}
  end
end
if taken > 0 then reply[2] = gone(upstream, taken) end
if taken < count and reply[3] == 0 then
  call('SADD', idle, NODE)
  local first = call('ZRANGE', timers_key(upstream), 0, 0, 'WITHSCORES')
  if first[2] then reply[1] = math.max(0, first[2] - time) end
elseif call('EXISTS', ring_key(upstream)) == 1 then
  call('SREM', idle, NODE)
  wake(upstream)
end
return reply
