"""The benchmark of routing quality: every method on the same queries, in every setting.

settings.py says what is asked of whom, libraries.py makes the libraries with decoys, cells.py runs
one method in one setting, tables.py turns the answers into scores, intervals and tables. All of it
reads labels, so nothing under router/ or merge/ may import it.
"""
