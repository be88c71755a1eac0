"""What a flight costs, as ratios measured within one run: `python -m shardedflight.bench`.

`rows.py` says what is compared with what, `measure.py` how, `report.py` what is printed of it.
"""
