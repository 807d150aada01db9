"""Trained networks at work: predictions of images, and networks for other programs."""
