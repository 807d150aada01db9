"""Every collective of the package: groups of ranks, the ranks' agreement to send a message, its one all-reduce
(`reduction`), the same as operators that a tracer sees (`traced`), and what the trainer asks of all ranks (`world`).
"""
