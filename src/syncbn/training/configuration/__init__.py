"""What an invocation of ``syncbn fit`` asks for, checked before it trains.

`checks` are of the words and the config, `lightning_support` lists the options of Lightning that are taken or refused,
and `run_plan` works out steps, validations and metrics in advance.
"""
