"""The conformance suite of tokenizer plugins: one call in one test of the plugin.

    def test_contract(tmp_path):
        check_tokenizer(MidiTokenizer(), tmp_path)

It prints what it found (`pytest -s` shows it) and needs no test framework. A tokenizer that breaks the contract of
`multidiff.tokenizer.ModalityTokenizer` raises an AssertionError that says what is wrong and what is expected. What only
the plugin can know, such as that text comes back unchanged, stays in the plugin's own tests. If `write` writes a `.txt`
file, `read` gets the words in it, as `metadata.jsonl` contains them. For any other file `read` gets the path.
"""

from multidiff.testing.conformance import check_tokenizer

__all__ = ["check_tokenizer"]
