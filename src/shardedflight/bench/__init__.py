"""What a flight costs, as ratios measured within one run: `python -m shardedflight.bench`.

`benchmarks.py` says what is compared with what and `targets.py` what is to be reached; `measure.py`
says how it is compared. What is measured lives in `leading.py`, `following.py`, `memory.py` and
`scaling.py`; `peers.py` asks other libraries the same, `plain.py` the plain form of this one.
`model.py` is a model, `report.py` and `plots.py` are what there is to see.
"""
