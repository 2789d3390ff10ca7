"""`python -m iqlite` is the `iqlite` command."""

from iqlite.cli import main

main()
