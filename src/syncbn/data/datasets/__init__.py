"""What is on the disk: one file for each format, and `formats`, which finds out which one a folder holds.

`base` says what a data set is, `decoding` makes pixels of a file, `splits` finds training and validation folders, and
`selection` holds images out.
"""
