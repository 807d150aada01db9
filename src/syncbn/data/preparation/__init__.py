"""From downloaded images to shards: the verb ``syncbn prepare``.

`imagenet` and `folder` each make a plan (`plan`): which images there are, where their bytes lie, in which order they
are written. `job` carries a plan out on all cores (`conversion` for each image) and `summary` tells what came of it.
"""
