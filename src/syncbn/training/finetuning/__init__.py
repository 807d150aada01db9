"""Fine-tuning: the weights that a run starts from, what of them is frozen and for how long, and retrieval.

The chapter for users is docs/finetuning.md.
"""
