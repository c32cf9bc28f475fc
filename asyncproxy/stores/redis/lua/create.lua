-- Accepts a job. 3 id, 4 record, 5 sealed call, 6 upstream, 7 lane, 8 size, 9 time of creation, 10 most live
-- jobs, 11 most of a credential, 12 most bytes, 13 whether the node claims right behind it (1), 14 alias
-- (empty: none), 15 its fingerprint, 16 whether to attach (1), 17 whether it is for once (1).
-- {0, turn, gone}: accepted. {1, state, …}: the job that the alias names. {2}: that one is of another
-- request. {3}: too many of this credential. {4}: too many. {5}: no room.
local id, upstream, lane, size = ARGV[3], ARGV[6], ARGV[7], tonumber(ARGV[8])
local alias = ARGV[14] ~= '' and P .. 'alias:' .. ARGV[14]
if alias and ARGV[16] == '1' then
  local named = call('HMGET', alias, 'i', 'f')
  if named[1] then
    local there = call('HMGET', job_key(named[1]), 's', 'n', 'a', 'j', 'f', 'p', 'e')
    if there[1] and not (there[7] and tonumber(there[7]) <= now()) then
      if named[2] ~= ARGV[15] then return {2} end
      return {1, named[1], there[1], there[2], there[3], there[4], there[5], there[6], there[7]}
    end
  end
end

local credential = credential_of(lane)
if tonumber(call('HGET', CREDENTIALS, credential) or 0) >= tonumber(ARGV[11]) then return {3} end
local waiting, left = 'w:' .. upstream, 'd:' .. upstream
local totals = call('HMGET', TOTALS, 'live', 'live_bytes', 'result_bytes', 'seq', waiting, left)
for i = 1, 6 do totals[i] = tonumber(totals[i] or 0) end
if totals[1] >= tonumber(ARGV[10]) then return {4} end
local live_bytes, most = totals[2] + size, tonumber(ARGV[12])
if live_bytes > math.floor(most / 2) then return {5} end
if live_bytes + totals[3] > most then
  trim(now(), 500)
  if live_bytes + tonumber(call('HGET', TOTALS, 'result_bytes')) > most then return {5} end
end

local order = totals[4] + 1
call('HSET', TOTALS, 'live', totals[1] + 1, 'live_bytes', live_bytes, 'seq', order, waiting, totals[5] + 1)
call('HINCRBY', CREDENTIALS, credential, 1)
call('ZADD', CREATED, ARGV[9], id)
call('ZADD', lane_key(lane), order, id)
local ahead = call('ZCARD', lane_key(lane)) - 1
if ahead == 0 then refresh(upstream, lane) end
-- Its credential has one turn in a round of all that have something ready.
local ring = call('ZCARD', ring_key(upstream))
ahead = math.min(totals[5], ahead * math.max(1, ring))
local turn = totals[6] + ahead
call('HSET', job_key(id), 's', 0, 'j', ARGV[4], 'c', ARGV[5], 'n', 0, 'a', 0, 'h', '', 'u', upstream,
  'l', lane, 'o', order, 't', size, 'p', turn)
if alias then
  call('DEL', alias)
  call('HSET', alias, 'i', id, 'f', ARGV[15])
  call('HSET', job_key(id), 'k', ARGV[17] .. ARGV[14])
end
-- An empty ring: its lane is paused, and whoever paused it knows for how long.
if ARGV[13] ~= '1' and ring > 0 then wake(upstream) end
return {0, turn, totals[6]}
