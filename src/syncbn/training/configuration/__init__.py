"""What an invocation of ``syncbn fit`` asks for, checked before it trains."""
