"""The paper's experiments: each verb of ``syncbn paper`` trains, measures, and writes a table, a plot and a report."""
