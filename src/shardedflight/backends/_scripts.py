"""What `redis.RedisBackend` has the server do, in Lua: each step is one script, so it is atomic.

For one name there are these keys, all in one slot of a cluster:

- `f`, a hash: the execution that can be joined. `t` its token, `i` the leader's inbox, `n` the
  number that the leader's process made up for its request; and for each process that follows a
  field, its inbox, with the number of the request by which it came to follow. It expires with the
  lease.
- `g` and the token, the same hash: an execution that was forgotten and still runs.
- `r`, a hash: the last outcome `p`, of the token `t`, which new callers may have until `u`.
- `t`: the greatest token so far, for all names of the shard.

An inbox is a sharded channel. A message is a kind, the name, the token, a colon, and a payload.
"""

__all__ = ["BEAT", "DONE", "FORGET", "GIVE", "JOIN", "LEAVE"]

_NOW = """
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end
"""

#: KEYS: f, r, t, g without its token. ARGV: my inbox, the number of my request, the lease in
#: milliseconds, the token that I followed or 0, the token of an outcome that I can not read or 0.
#: Asked twice with one number, it answers the same. What was forgotten goes on to serve those who
#: have followed it. Returns {0, token}: you lead; {1, token, milliseconds}: you follow, who has so
#: much of its lease left; {2, token, outcome}.
JOIN = (
    _NOW
    + """
if ARGV[4] ~= '0' then
  local forgotten = KEYS[4] .. ARGV[4]
  if redis.call('EXISTS', forgotten) == 1 then
    redis.call('HSET', forgotten, ARGV[1], ARGV[2])
    return {1, ARGV[4], redis.call('PTTL', forgotten)}
  end
end
local held = redis.call('HMGET', KEYS[2], 't', 'u', 'p')
if held[1] and held[1] ~= ARGV[5] then
  local followed = tonumber(ARGV[4])
  if (followed > 0 and tonumber(held[1]) >= followed) or tonumber(held[2]) > now() then
    return {2, held[1], held[3]}
  end
end
local leads = redis.call('HMGET', KEYS[1], 't', 'n', 'i')
if leads[1] then
  if leads[2] == ARGV[2] and leads[3] == ARGV[1] then return {0, leads[1]} end
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
  return {1, leads[1], redis.call('PTTL', KEYS[1])}
end
local last = tonumber(redis.call('GET', KEYS[3]) or '0')
local token = string.format('%.0f', math.max(now(), last + 1))
redis.call('SET', KEYS[3], token, 'PX', 86400000)
redis.call('HSET', KEYS[1], 't', token, 'n', ARGV[2], 'i', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {0, token}
"""
)

#: Finds the hash of an execution by its token, among KEYS[1], f, and KEYS[2], its g.
_MINE = """
local mine = KEYS[1]
if redis.call('HGET', mine, 't') ~= ARGV[1] then
  mine = KEYS[2]
  if redis.call('HGET', mine, 't') ~= ARGV[1] then return -1 end
end
local function tell(message)
  local told = 0
  for _, field in ipairs(redis.call('HKEYS', mine)) do
    if #field > 1 then
      redis.call('SPUBLISH', field, message)
      told = told + 1
    end
  end
  return told
end
"""

#: KEYS: f, g, r. ARGV: the token, the name, the outcome, how long new callers may have it and how
#: long it is kept for those who miss the message, in milliseconds, and the bytes that a message may
#: have. Returns how many were told; -1: another one leads, or nobody.
DONE = (
    _NOW
    + _MINE
    + """
local kept = mine == KEYS[1]
local head = ARGV[2] .. ARGV[1] .. ':'
local told
if kept and #ARGV[3] > tonumber(ARGV[6]) then
  told = tell('x' .. head)
else
  told = tell('d' .. head .. ARGV[3])
end
redis.call('DEL', mine)
local hold = tonumber(ARGV[4])
if kept and (told > 0 or hold > 0) then
  local fresh = string.format('%.0f', hold > 0 and now() + hold * 1000 or 0)
  redis.call('HSET', KEYS[3], 't', ARGV[1], 'u', fresh, 'p', ARGV[3])
  redis.call('PEXPIRE', KEYS[3], math.max(hold, tonumber(ARGV[5])))
end
return told
"""
)

#: KEYS: f, g. ARGV: the token, the name. The leader is lost: its followers are told to join anew.
GIVE = (
    _MINE
    + """
local told = tell('l' .. ARGV[2] .. ARGV[1] .. ':')
redis.call('DEL', mine)
return told
"""
)

#: KEYS: f, g. ARGV: the token, my inbox, the number by which it came to follow. Nobody of my
#: process waits any more: it is not told, and not counted. Somebody who has come since has a later
#: number. Returns 1, or 0 if there is nothing to be done; -1: there is no such execution.
LEAVE = (
    _MINE
    + """
if redis.call('HGET', mine, ARGV[2]) ~= ARGV[3] then return 0 end
return redis.call('HDEL', mine, ARGV[2])
"""
)

#: KEYS: f and g of each execution. ARGV: the lease, then their tokens. Returns how many go on.
BEAT = """
local renewed = 0
for i = 2, #ARGV do
  for _, key in ipairs({KEYS[2 * i - 3], KEYS[2 * i - 2]}) do
    if redis.call('HGET', key, 't') == ARGV[i] then
      redis.call('PEXPIRE', key, ARGV[1])
      renewed = renewed + 1
    end
  end
end
return renewed
"""

#: KEYS: f, r, g without its token. ARGV: the name, the token of the only one that is meant, or 0.
FORGET = """
local leads = redis.call('HMGET', KEYS[1], 't', 'i')
if ARGV[2] ~= '0' and leads[1] ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[2])
if not leads[1] then return 0 end
local message = 'f' .. ARGV[1] .. leads[1] .. ':'
redis.call('SPUBLISH', leads[2], message)
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  if #field > 1 then redis.call('SPUBLISH', field, message) end
end
redis.call('RENAME', KEYS[1], KEYS[3] .. leads[1])
return 1
"""
