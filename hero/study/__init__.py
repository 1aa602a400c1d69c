"""Comparisons that can be trusted: the same world, tasks and turns for every arm, many seeds.

plan.py     what is compared: arms, starts, seeds, budgets; what may not differ between arms
cells.py    one run of one arm, evaluated at each budget
runner.py   all cells, side by side, each once; learning rates chosen on dev tasks
tables.py   what the rows say, with intervals, and what they cannot tell apart
"""
