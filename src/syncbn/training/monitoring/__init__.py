"""What watches a run while it trains: callbacks, each of which may be left out."""
