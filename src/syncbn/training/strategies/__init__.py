"""Lightning's strategies around the synchronised layers: DDP, DeepSpeed and FSDP2, by the names that users type."""
