"""Planning problems: Sudoku, paths through stars and Countdown. Generators, verifiers, and how many a model solves."""
