"""What is on the disk: the formats of data, each in a file, and `formats`, which finds out which one a folder holds."""
