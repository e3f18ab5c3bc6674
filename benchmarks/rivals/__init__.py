"""Other ways to make a network smaller, given the same images as calibration.

`compress` of `repair.py` makes a rival within a budget of bytes or MACs and repairs it: low rank by
SVD or Tucker (`low_rank.py`), pruned channels (`pruning.py`) or palettes (`palette.py`).
"""
