"""What all errors have in common."""

from __future__ import annotations

import torch

from cachegraph.errors import InputError, out_of_memory


def test_any_terminal_can_show_a_message() -> None:
    error = InputError("bad name", place="a\ud800\x1b[31m/\u202eb.yaml", found="é\t1\n漢")
    assert str(error) == "a\\ud800\\x1b[31m/\\u202eb.yaml: bad name; found é\\t1\n漢"
    str(error).encode()


def test_out_of_memory_is_known_by_its_words() -> None:
    found = []
    for numbers in (2**55, 3):
        try:
            torch.ones(numbers) @ torch.ones(4)
        except RuntimeError as error:
            found.append(out_of_memory(error))
    assert found == [True, False]
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError())
