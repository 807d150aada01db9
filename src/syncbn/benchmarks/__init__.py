"""What ``syncbn benchmark`` times: one file for each section, of which `command` has the list.

How sections measure, report and draw is in `harness`; the section ``gpu`` is a folder of its own.
"""
