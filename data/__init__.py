"""The experiment and the programs that fill its tables: see the list of files in README.md."""
