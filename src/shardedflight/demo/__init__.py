"""A stampede on real parts: `shardedflight demo`.

`command` reads the options; `run` conducts; `database` is what the queries cost something on;
`server` is the HTTP API, in a process of its own that `process` starts and ends; `load` is the
clients; `figures` is what was measured; `progress` shows it coming in, `report` and `plots` show
it afterwards. Public names of ShardedFlight only.
"""
