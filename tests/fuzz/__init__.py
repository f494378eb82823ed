"""Damaged input, drawn at random: each case works or ends in an error that names the file.

`python -m tests.fuzz sounds --count 500 --seed 7` runs the cases of the module `sounds`. Such a module has

- `prepare(folder, random)`: write what all cases share into an empty folder, and return it;
- `attempt(state, number, random)`: run one case and return its outcome in a few words; whatever it raises is a crash.
"""
