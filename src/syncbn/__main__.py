"""``python -m syncbn``: the ``syncbn`` command."""

from syncbn.cli import main

if __name__ == "__main__":
    main()
