"""Lightning's strategies around the synchronised layers, by the names that users type: `ddp`, `deepspeed`, `fsdp`.

`sharding` is what the strategies that divide weights have in common, and `deepspeed_state` the state of an optimizer
under DeepSpeed. The page for users is docs/strategies.md.
"""
