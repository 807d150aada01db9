"""The paper's experiments: each verb of ``syncbn paper`` trains, measures, and writes a table, a plot and a report.

One file for each figure or table, with its plot and its report beside it. `recipe_runs` runs the trainings by
``syncbn fit``, `rank_processes` runs a function on several ranks.
"""
