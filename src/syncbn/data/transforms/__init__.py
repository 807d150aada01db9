"""What is done to one image.

In training: random crops (`cropping`), shifts and mirroring (`augmentation`), colors (`photometric`). In evaluation:
1, 10 or 144 crops (`evaluation_crops`). `photo` decodes an image when a transform asks for its pixels.
"""
