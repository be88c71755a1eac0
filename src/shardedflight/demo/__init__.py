"""A stampede on real parts: `shardedflight demo`.

`command` reads the options; `run` conducts; `database` is what the queries cost something on;
`server` is the HTTP API, in processes of its own that `process` starts and ends; `tier` is the
backend that they may meet on, `valkey` an embedded server for it; `load` is the clients; `figures`
is what was measured, `series` how that of several processes adds up; `progress` shows it coming in,
`report` and `plots` show it afterwards. Public names of ShardedFlight only.
"""
