-- How full the store is: live jobs, those of them that are claimed, results, bytes. What has expired does
-- not count.
trim(now(), 1000)
local totals = call('HMGET', TOTALS, 'live', 'live_bytes', 'result_bytes')
local live, claimed = tonumber(totals[1] or 0), call('ZCARD', LEASES)
return {live, claimed, call('ZCARD', RESULTS), (totals[2] or 0) + (totals[3] or 0)}
