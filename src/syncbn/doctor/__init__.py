"""``syncbn doctor``: looks at a cluster the way ``syncbn fit`` would use it, before hours are spent on it.

Every rank collects facts about itself (`facts`, `configuration`), hands them to rank 0 through the key-value store
(`meeting`), which works when collectives do not, and takes part in a few trials (`trials`). Rank 0 judges them:
each check is a function of facts alone (`launch_checks`, `node_checks`, `trial_checks`).
"""
