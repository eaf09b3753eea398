"""The benchmark of routing quality: every method on the same queries, in every setting.

settings.py says what is asked of whom, cells.py answers for one method in one setting, tables.py turns the
answers into scores, intervals and tables.
"""
