-- How full the store is: live jobs, results, bytes. What has expired does not count.
trim(now(), 1000)
local totals = call('HMGET', TOTALS, 'live', 'live_bytes', 'result_bytes')
return {tonumber(totals[1] or 0), call('ZCARD', RESULTS), (totals[2] or 0) + (totals[3] or 0)}
