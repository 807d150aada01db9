"""Checkpoints: when one is written (`callback`), how (`files`), what of each rank is in it (`rank_state`), where a
run resumes (`resuming`) and what older ones mean (`earlier_data`).
"""
