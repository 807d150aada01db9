"""What `syncbn benchmark` times, one file for each section; how it measures is in `measure`."""
