-- Notes the schema and the key of a node that starts. 3 a token of its key. The schema that Redis holds now:
-- if that is a later one than the node's, nothing has changed.
local held = tonumber(call('HGET', META, 'schema'))
if held > SCHEMA then return held end
call('HSET', META, 'schema', SCHEMA, 'probe', ARGV[3])
return SCHEMA
