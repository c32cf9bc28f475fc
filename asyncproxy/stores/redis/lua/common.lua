-- What the scripts share. Each is this file, followed by its own: one atomic step of the store.
--
-- SCHEMA is the number of the format that this version knows (schema.py).
-- KEYS[1] is what every key begins with, ARGV[1] the time in milliseconds (empty: that of Redis, so that
-- the clocks of the nodes do not matter), ARGV[2] the node that asks.
--
-- A job is a hash. A step writes only the fields that it changes: a newer version may have others.
-- Alive: s its state (0 waits, 1 is processed), j the record, c the sealed call, n its
-- claims, a its attempts, h the node that claimed it last (empty: it was given back), u its upstream, l its
-- lane, o its order, t its size, p its turn, k its alias, w the nodes where somebody waits for it. Done:
-- s is 2, f (F, if it is large) the outcome, g the token of the finish, e its expiry, t its size; n and k as
-- before. parts:<id> are the parts of a large result, by their numbers.
--
-- A job waits in its lane (id by order). A credential of an upstream has its lanes that may go (by their
-- oldest job), an upstream the ring of its credentials (by their turns), and timers: jobs (j) that wait for
-- a backoff, and lanes (l) that are paused. So a lane is paused or let go as one thing.
local call = redis.call
local P, NODE = KEYS[1], ARGV[2]
local TOTALS, CREDENTIALS = P .. 'totals', P .. 'credentials'
local META = P .. 'meta'
local LEASES, CREATED, RESULTS = P .. 'leases', P .. 'created', P .. 'results'

local function now()
  if ARGV[1] ~= '' then return tonumber(ARGV[1]) end
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Whether a node of a later schema has started. What waits may be of kinds that this version does not know,
-- so it claims nothing any more. What it has claimed it brings to an end.
local function superseded() return tonumber(call('HGET', META, 'schema') or 0) > SCHEMA end

local function job_key(id) return P .. 'job:' .. id end
local function parts_key(id) return P .. 'parts:' .. id end
local function lane_key(lane) return P .. 'lane:' .. lane end
local function timers_key(upstream) return P .. 'timers:' .. upstream end
local function ring_key(upstream) return P .. 'ring:' .. upstream end
local function credential_of(lane) return string.match(lane, '^([^/]*)/') end
local function lanes_key(upstream, credential) return P .. 'lanes:' .. credential .. ':' .. upstream end

-- True if the node listens.
local function tell(node, message) return call('PUBLISH', P .. 'node:' .. node, message) > 0 end

-- Lets one of the nodes that wait for work ask again. One that is gone does not listen: the next one then.
local function wake(upstream)
  repeat
    local node = call('SPOP', P .. 'idle:' .. upstream)
  until not node or tell(node, 'w' .. upstream)
end

local function next_turn() return call('HINCRBY', TOTALS, 'turn', 1) end

-- Makes the oldest job of a lane known to its credential, and the credential to the ring.
local function announce(upstream, lane, order)
  local credential = credential_of(lane)
  call('ZADD', lanes_key(upstream, credential), order, lane)
  call('ZADD', ring_key(upstream), 'NX', next_turn(), credential)
end

local function withdraw(upstream, lane)
  local credential = credential_of(lane)
  local lanes = lanes_key(upstream, credential)
  call('ZREM', lanes, lane)
  if call('EXISTS', lanes) == 0 then call('ZREM', ring_key(upstream), credential) end
end

-- Announces a lane as it is now, or withdraws it.
local function refresh(upstream, lane)
  local head = call('ZRANGE', lane_key(lane), 0, 0, 'WITHSCORES')
  if head[1] and not call('ZSCORE', timers_key(upstream), 'l' .. lane) then
    announce(upstream, lane, head[2])
  else
    withdraw(upstream, lane)
  end
end

local function admit(id, upstream, lane, order)
  call('ZADD', lane_key(lane), order, id)
  if call('ZRANGE', lane_key(lane), 0, 0)[1] == id then refresh(upstream, lane) end
end

-- How many jobs of a lane wait for a backoff: a pause counts for them too.
local function delayed(lane, more)
  if call('HINCRBY', P .. 'delayed', lane, more) <= 0 then call('HDEL', P .. 'delayed', lane) end
end

-- Lets a job wait for its turn, or for a time first. How often jobs wait (w) and have gone (d) is counted.
local function enqueue(id, upstream, lane, order, due)
  call('HINCRBY', TOTALS, 'w:' .. upstream, 1)
  if due then
    call('ZADD', timers_key(upstream), due, 'j' .. id)
    delayed(lane, 1)
  else
    admit(id, upstream, lane, order)
  end
end

local function gone(upstream, count)
  call('HINCRBY', TOTALS, 'w:' .. upstream, -count)
  return call('HINCRBY', TOTALS, 'd:' .. upstream, count)
end

local function unqueue(id, upstream, lane)
  if call('ZREM', lane_key(lane), id) == 1 then
    refresh(upstream, lane)
  elseif call('ZREM', timers_key(upstream), 'j' .. id) == 1 then
    delayed(lane, -1)
  else
    return
  end
  gone(upstream, 1)
end

-- A longer pause that is there stays.
local function pause(upstream, lane, till)
  call('ZADD', timers_key(upstream), 'GT', till, 'l' .. lane)
  withdraw(upstream, lane)
end

-- Lets go what has become due. A hundred at a time: no script may keep the others waiting for long.
local function ripen(upstream, time)
  local timers = timers_key(upstream)
  for _, due in ipairs(call('ZRANGE', timers, '-inf', time, 'BYSCORE', 'LIMIT', 0, 100)) do
    call('ZREM', timers, due)
    local name = string.sub(due, 2)
    if string.sub(due, 1, 1) == 'l' then
      refresh(upstream, name)
    else
      local job = call('HMGET', job_key(name), 'l', 'o')
      delayed(job[1], -1)
      admit(name, upstream, job[1], job[2])
    end
  end
end

-- The first lane of a credential that has a ready job and room for it (rooms: by lane; nil: room for all).
local function first_lane(lanes, rooms)
  if not rooms then return call('ZRANGE', lanes, 0, 0)[1] end
  local offset = 0
  while true do
    local some = call('ZRANGE', lanes, offset, offset + 63)
    for _, lane in ipairs(some) do
      if rooms[lane] ~= 0 then return lane end
    end
    if #some < 64 then return nil end
    offset = offset + 64
  end
end

-- Takes the next job out of the queue: the oldest one of the credential whose turn it is. A credential
-- without room keeps its turn.
local function pop(upstream, rooms)
  local ring, rank = ring_key(upstream), 0
  while true do
    local credential = call('ZRANGE', ring, rank, rank)[1]
    if not credential then return nil end
    local lanes = lanes_key(upstream, credential)
    local lane = first_lane(lanes, rooms)
    if not lane and rooms and call('EXISTS', lanes) == 1 then
      rank = rank + 1
    else
      local id = lane and call('ZPOPMIN', lane_key(lane))[1]
      local more = false
      if lane then
        local head = call('ZRANGE', lane_key(lane), 0, 0, 'WITHSCORES')
        if head[1] then
          call('ZADD', lanes, head[2], lane)
          more = true
        else
          call('ZREM', lanes, lane)
          more = call('EXISTS', lanes) == 1
        end
      end
      if more then
        call('ZADD', ring, next_turn(), credential)
      else
        call('ZREM', ring, credential)
      end
      if id then
        if rooms and rooms[lane] then rooms[lane] = rooms[lane] - 1 end
        return id
      end
    end
  end
end

-- Makes a job that is out of the queue the node's, until the lease runs out.
local function hold(id, time, lease)
  local key = job_key(id)
  local claims = call('HINCRBY', key, 'n', 1)
  call('HSET', key, 's', 1, 'h', NODE)
  call('ZADD', LEASES, time + lease, id)
  return claims
end

-- Whether a claim still counts. A lease that ran out lets others claim the job; until one does, its claim
-- counts all the same: an outcome that was paid for is not thrown away.
local function holds(state, claims, holder, claim)
  return claims == claim and (state == '1' or (state == '0' and holder == NODE))
end

-- Puts jobs whose lease has run out back to their old places.
local function recover(time, most)
  for _, id in ipairs(call('ZRANGE', LEASES, '-inf', time, 'BYSCORE', 'LIMIT', 0, most)) do
    call('ZREM', LEASES, id)
    local key = job_key(id)
    local job = call('HMGET', key, 's', 'u', 'l', 'o')
    if job[1] == '1' then
      call('HSET', key, 's', 0)
      enqueue(id, job[2], job[3], job[4])
      wake(job[2])
    end
  end
end

-- Gives back what expired results took. They are gone by themselves: this is the account of them.
local function trim(time, most)
  local expired = call('ZRANGE', RESULTS, '-inf', time, 'BYSCORE', 'LIMIT', 0, most)
  if #expired == 0 then return end
  local bytes, keys = 0, {}
  for i, member in ipairs(expired) do
    local size, id = string.match(member, '^(%d+):(.*)$')
    bytes, keys[2 * i - 1], keys[2 * i] = bytes + size, job_key(id), parts_key(id)
  end
  call('ZREM', RESULTS, unpack(expired))
  call('UNLINK', unpack(keys))
  call('HINCRBY', TOTALS, 'result_bytes', -bytes)
end

-- Forgets the name of a job (1 or 0: once or not, then the key), unless it is a later job's by now.
local function drop_alias(id, alias)
  if not alias then return end
  local key = P .. 'alias:' .. string.sub(alias, 2)
  if call('HGET', key, 'i') == id then call('DEL', key) end
end

-- Takes a live job off the accounts.
local function uncount(id, lane, size)
  call('HINCRBY', TOTALS, 'live', -1)
  call('HINCRBY', TOTALS, 'live_bytes', -size)
  local credential = credential_of(lane)
  if call('HINCRBY', CREDENTIALS, credential, -1) <= 0 then call('HDEL', CREDENTIALS, credential) end
  call('ZREM', LEASES, id)
  call('ZREM', CREATED, id)
end

-- Tells the other nodes where somebody waits for a job.
local function tell_waiters(nodes, message)
  for node in string.gmatch(nodes or '', '[^,]+') do
    if node ~= NODE then tell(node, message) end
  end
end
